#include "comm/watchdog.hpp"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "comm/last_words.hpp"
#include "comm/mpi_comm.hpp"
#include "src/base/host.hpp"
#include "src/base/log.hpp"

namespace arcus {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kHeartbeatTag = 1;

/// What ranks send each other. Trivially copyable, sent as bytes.
struct Message {
  Heartbeat beat;
  std::int64_t leaving = 0;  ///< this is the sender's last one
};

class NoWatchdog final : public Watchdog {
 public:
  void beat(std::int64_t /*step*/, std::int64_t /*layer*/, const char* /*what*/) override {}
};

/// Durations of the last steps, from when a rank was seen to begin each.
class StepTimes {
 public:
  void see(std::int64_t step, Clock::time_point now) {
    if (step == step_) return;
    // The first one began before anybody looked.
    if (step_ >= 0 && step > step_ && ++seen_ > 1) {
      // Short steps pass by between two looks.
      last_.push_back(std::chrono::duration<double>(now - begin_).count() /
                      static_cast<double>(step - step_));
      if (last_.size() > kMost) last_.pop_front();
    }
    step_ = step;
    begin_ = now;
  }
  /// 0 until a few steps were seen.
  double median() const {
    if (last_.size() < 3) return 0;
    std::vector<double> sorted(last_.begin(), last_.end());
    std::nth_element(sorted.begin(),
                     sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2), sorted.end());
    return sorted[sorted.size() / 2];
  }

 private:
  static constexpr std::size_t kMost = 31;
  std::int64_t step_ = -1;
  std::int64_t seen_ = 0;
  Clock::time_point begin_;
  std::deque<double> last_;
};

/// Message buffers and what is known of one other rank.
struct Peer {
  int rank = 0;
  Message incoming, outgoing;
  MPI_Request receiving = MPI_REQUEST_NULL, sending = MPI_REQUEST_NULL;
  Heartbeat last;
  Clock::time_point heard;
  bool left = false;        ///< its last message has come
  bool told = false;        ///< our last message is on its way
  std::string broken = {};  ///< MPI's error, if its connection is gone
};

/// The watching itself; lives on the heap apart from its owner because pending receives point into
/// it: after an error it is left to the end of the process.
class Monitor {
 public:
  Monitor(MPI_Comm comm, double stuck_after_s, std::vector<std::string> hosts)
      : comm_(comm), stuck_after_s_(stuck_after_s), hosts_(std::move(hosts)) {
    MPI_Comm_rank(comm, &rank_);
    MPI_Comm_size(comm, &size_);
    peers_.resize(static_cast<std::size_t>(size_ - 1));
    const auto now = Clock::now();
    for (int i = 1; i < size_; ++i) {
      Peer& peer = peers_[static_cast<std::size_t>(i - 1)];
      peer.rank = (rank_ + i) % size_;
      peer.heard = now;
    }
    moved_ = now;
    for (Peer& peer : peers_) receive(peer);  // NOLINT(clang-analyzer-optin.mpi.MPI-Checker)
  }

  void beat(std::int64_t step, std::int64_t layer, const char* what) {
    const std::lock_guard lock(mutex_);
    mine_.step = step;
    mine_.layer = layer;
    ++mine_.sequence;
    std::strncpy(mine_.collective, what, sizeof(mine_.collective) - 1);
  }

  /// Runs until every rank has said goodbye, or until `abandon`.
  void run() {
    std::unique_lock lock(mutex_);
    while (!abandoned_) {
      const bool leaving = leaving_;
      const Heartbeat mine = mine_;
      lock.unlock();
      forgive_sleep();
      const bool done = exchange(mine, leaving);
      if (!done) end_if_stuck(mine);
      if (!done) report_if_slow(mine);
      lock.lock();
      if (done) return;
      wake_.wait_for(lock, leaving ? kLeavingPeriod : period(),
                     [&] { return abandoned_ || leaving_ != leaving; });
    }
  }

  void leave() {
    const std::lock_guard lock(mutex_);
    leaving_ = true;
    wake_.notify_all();
  }
  void abandon() {
    const std::lock_guard lock(mutex_);
    abandoned_ = true;
    wake_.notify_all();
  }

 private:
  static constexpr std::chrono::milliseconds kLeavingPeriod{5};
  static constexpr double kLostAfter = 5;
  static constexpr double kSlowTimes = 3;  ///< the median step
  static constexpr double kStuckTimes = 10;
  static constexpr double kLeastSlow = 1;  ///< seconds: shorter waits happen
  static constexpr double kLeastStuck = 60;
  /// What others wait for the speaker's message, which itself waits for errors still under way.
  static constexpr std::chrono::seconds kSpeakerTime{4};

  /// Short enough to be in time, long enough to cost nothing.
  std::chrono::milliseconds period() const {
    const auto wanted = static_cast<std::int64_t>(stuck_after() * 100);
    return std::chrono::milliseconds(std::clamp<std::int64_t>(wanted, 10, 150 + size_));
  }
  double stuck_after() const {
    return stuck_after_s_ > 0 ? stuck_after_s_
                              : std::max(kLeastStuck, kStuckTimes * steps_.median());
  }
  double lost_after() const { return std::min(kLostAfter, stuck_after() / 2); }

  /// This process, and so probably the whole job, was not running for a while: that is nobody's
  /// silence.
  void forgive_sleep() {
    const auto now = Clock::now();
    const auto gap = now - std::exchange(looked_, now);
    if (gap < std::chrono::duration<double>(lost_after() / 2)) return;
    moved_ += gap;
    for (Peer& peer : peers_) peer.heard += gap;
  }

  // The analyser looks for MPI_Wait; requests here are completed by MPI_Test, in later calls.
  // NOLINTBEGIN(clang-analyzer-optin.mpi.MPI-Checker)
  void receive(Peer& peer) {
    note(peer, MPI_Irecv(&peer.incoming, sizeof(Message), MPI_BYTE, peer.rank, kHeartbeatTag, comm_,
                         &peer.receiving));
  }

  /// Takes what has come and sends the own heartbeat on; true when all is said.
  bool exchange(const Heartbeat& mine, bool leaving) {
    if (mine.sequence != mine_seen_) moved_ = Clock::now();
    mine_seen_ = mine.sequence;
    steps_.see(mine.step, Clock::now());
    bool done = leaving;
    for (Peer& peer : peers_) {
      take(peer);
      send(peer, mine, leaving);
      done = done && peer.left && peer.told && peer.sending == MPI_REQUEST_NULL;
    }
    return done;
  }

  void take(Peer& peer) {
    while (!peer.left && peer.broken.empty()) {
      int complete = 0;
      note(peer, MPI_Test(&peer.receiving, &complete, MPI_STATUS_IGNORE));
      if (complete == 0 || !peer.broken.empty()) return;
      const auto now = Clock::now();
      peer.heard = now;
      if (peer.incoming.beat.sequence != peer.last.sequence) moved_ = now;
      peer.last = peer.incoming.beat;
      peer.left = peer.incoming.leaving != 0;
      if (!peer.left) receive(peer);
    }
  }

  /// One message under way per peer at most, so that a peer that sleeps is not flooded.
  void send(Peer& peer, const Heartbeat& mine, bool leaving) {
    if (!peer.broken.empty()) return;
    int complete = 1;
    note(peer, MPI_Test(&peer.sending, &complete, MPI_STATUS_IGNORE));
    if (complete == 0 || peer.told) return;
    peer.outgoing = {mine, leaving ? 1 : 0};
    peer.told = leaving;
    note(peer, MPI_Isend(&peer.outgoing, sizeof(Message), MPI_BYTE, peer.rank, kHeartbeatTag, comm_,
                         &peer.sending));
  }

  // NOLINTEND(clang-analyzer-optin.mpi.MPI-Checker)

  static void note(Peer& peer, int status) {
    if (status == MPI_SUCCESS || !peer.broken.empty()) return;
    char text[MPI_MAX_ERROR_STRING] = {};
    int length = 0;
    MPI_Error_string(status, text, &length);
    peer.broken = text;
  }

  static double seconds_since(Clock::time_point then) {
    return std::chrono::duration<double>(Clock::now() - then).count();
  }

  void end_if_stuck(const Heartbeat& mine) {
    const bool lost = std::any_of(peers_.begin(), peers_.end(),
                                  [this](const Peer& peer) { return !peer.left && silent(peer); });
    if (!lost && seconds_since(moved_) < stuck_after()) return;
    if (speaker() == rank_) {
      say_last_words(rank_, size_, ExitCode::comm, diagnosis(mine));
    } else {
      std::this_thread::sleep_for(kSpeakerTime);
    }
    // Not MPI_Abort: the training thread may hold MPI's locks for ever.
    std::_Exit(static_cast<int>(ExitCode::comm));
  }

  /// A silent rank is lost, or stopped as a whole: even its watchdog says nothing.
  bool silent(const Peer& peer) const {
    return !peer.broken.empty() || seconds_since(peer.heard) > lost_after();
  }

  /// The lowest rank whose watchdog is alive reports for all: they have seen the same heartbeats.
  int speaker() const {
    int lowest = rank_;
    for (const Peer& peer : peers_) {
      if (!peer.left && !silent(peer)) lowest = std::min(lowest, peer.rank);
    }
    return lowest;
  }

  static std::string place(const Heartbeat& beat) {
    if (beat.sequence == 0) return "before its first step";
    return fmt::format("at step {}, layer {}, in {} (beat {})", beat.step, beat.layer,
                       beat.collective[0] == '\0' ? "between collectives" : beat.collective,
                       beat.sequence);
  }

  std::string name(int rank) const {
    return fmt::format("rank {} on {}", rank, hosts_[static_cast<std::size_t>(rank)]);
  }

  /// Says once for whom the others wait.
  void report_if_slow(const Heartbeat& mine) {
    const double median = steps_.median();
    const double still = seconds_since(moved_);
    if (median == 0 || still < std::max(kLeastSlow, kSlowTimes * median)) {
      reported_slow_ = false;
      return;
    }
    if (std::exchange(reported_slow_, true) || speaker() != rank_) return;
    int slowest = rank_;
    Heartbeat place_of_slowest = mine;
    bool others_ahead = false;
    for (const Peer& peer : peers_) {
      if (peer.left || peer.last.sequence == place_of_slowest.sequence) continue;
      others_ahead = true;
      if (peer.last.sequence > place_of_slowest.sequence) continue;
      slowest = peer.rank;
      place_of_slowest = peer.last;
    }
    spdlog::warn("{} for {:.1f} s, a step takes {:.2f} s: {}{}",
                 others_ahead ? "the others wait" : "nobody has moved", still, median,
                 others_ahead ? name(slowest) + " is slow, " : "all are ", place(place_of_slowest));
  }

  /// Who is lost, who is late, and where everybody stands.
  std::string diagnosis(const Heartbeat& mine) const {
    std::string lost, late, waiting;
    std::int64_t first = mine.sequence, last = mine.sequence;
    for (const Peer& peer : peers_) {
      if (peer.left) continue;
      first = std::min(first, peer.last.sequence);
      last = std::max(last, peer.last.sequence);
    }
    for (int rank = 0; rank < size_; ++rank) {
      const Peer* peer = find(rank);
      if (peer != nullptr && peer->left) continue;
      const Heartbeat& beat = peer == nullptr ? mine : peer->last;
      if (peer != nullptr && silent(*peer)) {
        lost += fmt::format("; {} is lost ({}), last seen {}", name(rank),
                            peer->broken.empty()
                                ? fmt::format("silent for {:.1f} s", seconds_since(peer->heard))
                                : peer->broken,
                            place(beat));
      } else if (beat.sequence == first && first != last) {
        late += fmt::format("; {} is late, {}", name(rank), place(beat));
      } else {
        waiting += fmt::format("; {} waits {}", name(rank), place(beat));
      }
    }
    return fmt::format("no rank has moved for {:.1f} s{}{}{}", seconds_since(moved_), lost, late,
                       waiting);
  }

  const Peer* find(int rank) const {
    for (const Peer& peer : peers_) {
      if (peer.rank == rank) return &peer;
    }
    return nullptr;
  }

  MPI_Comm comm_;
  double stuck_after_s_;
  int rank_ = 0, size_ = 1;
  std::vector<Peer> peers_;
  Clock::time_point moved_;
  Clock::time_point looked_ = Clock::now();  ///< when this thread last ran
  std::int64_t mine_seen_ = 0;
  StepTimes steps_;
  bool reported_slow_ = false;
  std::vector<std::string> hosts_;  ///< by rank

  std::mutex mutex_;
  std::condition_variable wake_;
  Heartbeat mine_;
  bool leaving_ = false;
  bool abandoned_ = false;
};

class MpiWatchdog final : public Watchdog {
 public:
  MpiWatchdog(MpiHandle comm, double stuck_after_s, std::vector<std::string> hosts)
      : comm_(std::move(comm)),
        monitor_(std::make_unique<Monitor>(comm_.get(), stuck_after_s, std::move(hosts))),
        exceptions_(std::uncaught_exceptions()),
        thread_([monitor = monitor_.get()] {
          use_all_processors();
          monitor->run();
        }) {}

  ~MpiWatchdog() override {
    if (std::uncaught_exceptions() > exceptions_) {
      // This rank is on its way out; the others cannot say goodbye to it.
      monitor_->abandon();
      thread_.join();
      static_cast<void>(monitor_.release());
      return;
    }
    monitor_->leave();
    thread_.join();
  }

  void beat(std::int64_t step, std::int64_t layer, const char* what) override {
    monitor_->beat(step, layer, what);
  }

 private:
  MpiHandle comm_;
  std::unique_ptr<Monitor> monitor_;
  int exceptions_;
  std::thread thread_;
};

}  // namespace

std::unique_ptr<Watchdog> make_watchdog(Communicator& world, double stuck_after_s) {
  const auto* mpi = dynamic_cast<MpiComm*>(&world);
  if (mpi == nullptr || world.size() == 1) return std::make_unique<NoWatchdog>();
  Stream stream(1);
  std::vector<std::string> hosts = gather_texts(world, stream, node_name());
  MPI_Comm copy = MPI_COMM_NULL;
  ARCUS_MPI(MPI_Comm_dup(mpi->handle(), &copy));
  return std::make_unique<MpiWatchdog>(MpiHandle(copy), stuck_after_s, std::move(hosts));
}

}  // namespace arcus
