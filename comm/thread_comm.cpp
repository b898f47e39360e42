#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "comm/backends.hpp"
#include "comm/reduce.hpp"
#include "kernels/arena.hpp"

namespace arcus {
namespace {

/// Thrown on ranks that cannot go on because of another rank; never the cause of a failure.
class PeerFailure : public Error {
 public:
  explicit PeerFailure(const std::string& message)
      : Error(ExitCode::comm, message, __FILE__, __LINE__) {}
};

enum class Op { none, all_to_all_v, all_reduce, all_gather_v, reduce_scatter_v, broadcast, split };

/// What the threads of one communicator share: a barrier, and per rank what its current call is.
class World {
 public:
  struct Entry {
    Op op = Op::none;
    const void* args = nullptr;
    int color = 0, key = 0;
    char* memory = nullptr;
    std::shared_ptr<World> child;  ///< split: made by the lowest rank of a colour
    int child_rank = 0;
  };

  explicit World(int size) : entries_(static_cast<std::size_t>(size)) {}

  int size() const { return static_cast<int>(entries_.size()); }
  Entry& entry(int rank) { return entries_[static_cast<std::size_t>(rank)]; }

  /// Returns once all ranks have arrived, or throws on all that have if one never will.
  void meet() {
    std::unique_lock lock(mutex_);
    if (!failure_.empty()) throw PeerFailure(failure_);
    const auto generation = generation_;
    if (arrive()) return;
    changed_.wait(lock, [&] { return generation_ != generation || !failure_.empty(); });
    if (generation_ == generation) throw PeerFailure(failure_);
  }

  /// Like meet, after a successful meet: all are sure to come, since between the two ranks only
  /// copy. Must not end early, or a rank's buffers would go while others still read them.
  void part() {
    std::unique_lock lock(mutex_);
    const auto generation = generation_;
    if (arrive()) return;
    changed_.wait(lock, [&] { return generation_ != generation; });
  }

  /// Ends this and later meetings, here and in all communicators split off.
  void poison(const std::string& why) {
    std::vector<std::weak_ptr<World>> children;
    {
      const std::lock_guard lock(mutex_);
      if (failure_.empty()) failure_ = why;
      children = children_;
      changed_.notify_all();
    }
    for (auto& child : children) {
      if (auto world = child.lock()) world->poison(why);
    }
  }

  /// Memory that lives as long as this does: other ranks may be reading it when its owner fails.
  char* keep(std::int64_t bytes) {
    const std::lock_guard lock(mutex_);
    auto& arena = memory_.emplace_back("shared memory of threads", bytes);
    return static_cast<char*>(arena.allocate_bytes(bytes));
  }

  void check() {
    const std::lock_guard lock(mutex_);
    if (!failure_.empty()) throw PeerFailure(failure_);
  }

  std::shared_ptr<World> make_child(int size) {
    auto child = std::make_shared<World>(size);
    const std::lock_guard lock(mutex_);
    if (!failure_.empty()) child->failure_ = failure_;
    children_.push_back(child);
    return child;
  }

  /// This rank makes no further calls.
  void leave(int rank) {
    const std::lock_guard lock(mutex_);
    if (failure_.empty()) {
      failure_ = fmt::format("rank {} of {} has left while others wait for it in a collective",
                             rank, size());
    }
    changed_.notify_all();
  }

 private:
  /// True for the last one. The mutex is held.
  bool arrive() {
    if (++arrived_ < size()) return false;
    arrived_ = 0;
    ++generation_;
    changed_.notify_all();
    return true;
  }

  std::vector<Entry> entries_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int arrived_ = 0;
  std::uint64_t generation_ = 0;
  std::string failure_;
  std::vector<std::weak_ptr<World>> children_;
  std::deque<Arena> memory_;
};

char* at(void* base, std::int64_t index, std::int64_t bytes) {
  return static_cast<char*>(base) + index * bytes;
}
const char* at(const void* base, std::int64_t index, std::int64_t bytes) {
  return static_cast<const char*>(base) + index * bytes;
}
void copy(void* to, const void* from, std::int64_t bytes) {
  if (bytes > 0 && to != from) std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

/// Addresses of memory that the ranks' world keeps.
class ThreadMemory final : public SharedMemory {
 public:
  ThreadMemory(std::vector<char*> parts, std::int64_t bytes) {
    parts_ = std::move(parts);
    bytes_ = bytes;
  }
};

class ThreadComm final : public Communicator {
 public:
  ThreadComm(std::shared_ptr<World> world, int rank, CommunicatorOptions options)
      : Communicator(rank, world->size(), options), world_(std::move(world)) {}
  ~ThreadComm() override { world_->leave(rank()); }

  [[noreturn]] void abort(ExitCode code, std::string_view message) override {
    ARCUS_FAIL(code, "{}", message);
  }
  std::unique_ptr<SharedMemory> share_memory(std::int64_t bytes) override {
    World::Entry& mine = world_->entry(rank());
    mine.memory = world_->keep(bytes);
    world_->meet();
    std::vector<char*> parts;
    parts.reserve(static_cast<std::size_t>(size()));
    for (int peer = 0; peer < size(); ++peer) parts.push_back(world_->entry(peer).memory);
    world_->part();
    return std::make_unique<ThreadMemory>(std::move(parts), bytes);
  }
  void check_peers() override { world_->check(); }

 protected:
  Event do_all_to_all_v(const AllToAllV& args) override {
    run(Op::all_to_all_v, args, [&] {
      std::string error;
      for (int peer = 0; peer < size(); ++peer) receive_from(peer, args, error);
      return error;
    });
    return {};
  }

  Event do_all_reduce(const AllReduce& args) override {
    run(Op::all_reduce, args, [&] {
      for (int peer = 0; peer < size(); ++peer) {
        const auto& other = args_of<AllReduce>(peer);
        if (other.buffer.size() == args.buffer.size() && other.buffer.dtype == args.buffer.dtype &&
            other.op == args.op) {
          continue;
        }
        return fmt::format("all_reduce: rank {} has {} elements of {}, rank {} has {} of {}",
                           rank(), args.buffer.size(), name_of(args.buffer.dtype), peer,
                           other.buffer.size(), name_of(other.buffer.dtype));
      }
      const std::int64_t n = args.buffer.size();
      reduce_share(args, n * rank() / size(), n * (rank() + 1) / size());
      return std::string();
    });
    return {};
  }

  Event do_all_gather_v(const AllGatherV& args) override {
    run(Op::all_gather_v, args, [&] {
      const auto bytes = static_cast<std::int64_t>(size_of(args.buffer.dtype));
      for (int peer = 0; peer < size(); ++peer) {
        const auto p = static_cast<std::size_t>(peer);
        const auto& other = args_of<AllGatherV>(peer);
        if (other.counts[p] != args.counts[p] || other.buffer.dtype != args.buffer.dtype) {
          return fmt::format(
              "all_gather_v: rank {} gives {} elements of {}, rank {} expects {} of {}", peer,
              other.counts[p], name_of(other.buffer.dtype), rank(), args.counts[p],
              name_of(args.buffer.dtype));
        }
        copy(at(args.buffer.data, args.offsets[p], bytes),
             at(other.buffer.data, other.offsets[p], bytes), args.counts[p] * bytes);
      }
      return std::string();
    });
    return {};
  }

  Event do_reduce_scatter_v(const ReduceScatterV& args) override {
    run(Op::reduce_scatter_v, args, [&] {
      const auto bytes = static_cast<std::int64_t>(size_of(args.buffer.dtype));
      const auto me = static_cast<std::size_t>(rank());
      for (int peer = 0; peer < size(); ++peer) {
        const auto& other = args_of<ReduceScatterV>(peer);
        if (other.counts[me] != args.counts[me] || other.buffer.dtype != args.buffer.dtype) {
          return fmt::format(
              "reduce_scatter_v: rank {} has {} elements of {} for rank {}, which "
              "has {} of {}",
              peer, other.counts[me], name_of(other.buffer.dtype), rank(), args.counts[me],
              name_of(args.buffer.dtype));
        }
        if (peer == rank()) continue;
        reduce_elements(args.buffer.dtype, ReduceOp::sum,
                        at(args.buffer.data, args.offsets[me], bytes),
                        at(other.buffer.data, other.offsets[me], bytes), args.counts[me]);
      }
      return std::string();
    });
    return {};
  }

  Event do_broadcast(const Broadcast& args) override {
    run(Op::broadcast, args, [&] {
      const auto& root = args_of<Broadcast>(args.root);
      if (root.root != args.root || root.buffer.size() != args.buffer.size() ||
          root.buffer.dtype != args.buffer.dtype) {
        return fmt::format(
            "broadcast: rank {} gives {} elements of {} (root {}), rank {} expects "
            "{} of {}",
            args.root, root.buffer.size(), name_of(root.buffer.dtype), root.root, rank(),
            args.buffer.size(), name_of(args.buffer.dtype));
      }
      copy(args.buffer.data, root.buffer.data,
           args.buffer.size() * static_cast<std::int64_t>(size_of(args.buffer.dtype)));
      return std::string();
    });
    return {};
  }

  void do_barrier() override { world_->meet(); }

  std::unique_ptr<Communicator> do_split(int color, int key) override {
    World::Entry& mine = world_->entry(rank());
    mine.op = Op::split;
    mine.color = color;
    mine.key = key;
    mine.child.reset();
    world_->meet();
    if (first_of_color(color) == rank()) make_children(color);
    world_->part();
    // The entry is this rank's own again only after everybody has read what it needs of it.
    auto child = std::move(mine.child);
    return std::make_unique<ThreadComm>(std::move(child), mine.child_rank, options());
  }

 private:
  template <class Args>
  const Args& args_of(int peer) {
    return *static_cast<const Args*>(world_->entry(peer).args);
  }

  /// Shows `args` to the other ranks while `body` moves bytes; an error it returns is thrown when
  /// nobody reads this rank's buffers any more.
  template <class Args, class Body>
  void run(Op op, const Args& args, Body&& body) {
    World::Entry& mine = world_->entry(rank());
    mine.op = op;
    mine.args = &args;
    world_->meet();
    std::string error = unequal_ops(op);
    if (error.empty()) error = body();
    world_->part();
    ARCUS_REQUIRE(error.empty(), ExitCode::comm, "{}", error);
  }

  std::string unequal_ops(Op op) {
    for (int peer = 0; peer < size(); ++peer) {
      if (world_->entry(peer).op != op) {
        return fmt::format("ranks {} and {} are in different collectives", rank(), peer);
      }
    }
    return {};
  }

  void receive_from(int peer, const AllToAllV& args, std::string& error) {
    const auto me = static_cast<std::size_t>(rank()), p = static_cast<std::size_t>(peer);
    const auto& other = args_of<AllToAllV>(peer);
    const bool same_rows = other.row_bytes == args.row_bytes;
    if (other.send_counts[me] != args.recv_counts[p] || !same_rows) {
      error += fmt::format(
          "all_to_all_v: rank {} sends {} rows of {} bytes, rank {} expects {} of "
          "{}; ",
          peer, other.send_counts[me], other.row_bytes, rank(), args.recv_counts[p],
          args.row_bytes);
      return;
    }
    const std::int64_t rows = args.recv_counts[p];
    if (rows == 0) return;
    if (other.scalar_bytes != args.scalar_bytes) {
      error +=
          fmt::format("all_to_all_v: {} bytes beside each row of rank {}, rank {} expects {}; ",
                      other.scalar_bytes, peer, rank(), args.scalar_bytes);
      return;
    }
    copy(at(args.recv, args.recv_offsets[p], args.row_bytes),
         at(other.send, other.send_offsets[me], args.row_bytes), rows * args.row_bytes);
    if (args.scalar_bytes == 0) return;
    copy(at(args.recv_scalars, args.recv_offsets[p], args.scalar_bytes),
         at(other.send_scalars, other.send_offsets[me], args.scalar_bytes),
         rows * args.scalar_bytes);
  }

  /// Elements [begin, end) of the result, written into every rank's buffer: ranks' shares are
  /// disjoint, so no rank reads what another has overwritten.
  void reduce_share(const AllReduce& args, std::int64_t begin, std::int64_t end) {
    alignas(64) std::array<char, 4096> sum;
    const auto bytes = static_cast<std::int64_t>(size_of(args.buffer.dtype));
    const std::int64_t step = static_cast<std::int64_t>(sum.size()) / bytes;
    for (std::int64_t i = begin; i < end; i += step) {
      const std::int64_t n = std::min(step, end - i);
      copy(sum.data(), at(args_of<AllReduce>(0).buffer.data, i, bytes), n * bytes);
      for (int peer = 1; peer < size(); ++peer) {
        reduce_elements(args.buffer.dtype, args.op, sum.data(),
                        at(args_of<AllReduce>(peer).buffer.data, i, bytes), n);
      }
      for (int peer = 0; peer < size(); ++peer) {
        copy(at(args_of<AllReduce>(peer).buffer.data, i, bytes), sum.data(), n * bytes);
      }
    }
  }

  int first_of_color(int color) {
    int peer = 0;
    while (world_->entry(peer).color != color) ++peer;
    return peer;
  }

  void make_children(int color) {
    std::vector<std::pair<int, int>> members;  // (key, rank)
    for (int peer = 0; peer < size(); ++peer) {
      const auto& entry = world_->entry(peer);
      if (entry.color == color) members.emplace_back(entry.key, peer);
    }
    std::sort(members.begin(), members.end());
    const auto child = world_->make_child(static_cast<int>(members.size()));
    for (std::size_t i = 0; i < members.size(); ++i) {
      world_->entry(members[i].second).child = child;
      world_->entry(members[i].second).child_rank = static_cast<int>(i);
    }
  }

  std::shared_ptr<World> world_;
};

/// One rank's life: its error, if any, and whether that is another rank's fault.
struct Outcome {
  std::exception_ptr error;
  bool consequence = false;
};

Outcome run_rank(const std::shared_ptr<World>& world, int rank, CommunicatorOptions options,
                 const std::function<void(Communicator&)>& body) {
  Outcome outcome;
  try {
    ThreadComm comm(world, rank, options);
    body(comm);
    return outcome;
  } catch (const PeerFailure&) {
    outcome = {std::current_exception(), true};
  } catch (...) {
    outcome = {std::current_exception(), false};
  }
  world->poison(fmt::format("rank {} of {} has failed", rank, world->size()));
  return outcome;
}

}  // namespace

void run_on_threads(int num_ranks, CommunicatorOptions options,
                    const std::function<void(Communicator&)>& body) {
  ARCUS_CHECK(num_ranks > 0, "run_on_threads with {} ranks", num_ranks);
  const auto world = std::make_shared<World>(num_ranks);
  std::vector<Outcome> outcomes(static_cast<std::size_t>(num_ranks));
  std::vector<std::thread> threads;
  threads.reserve(outcomes.size());
  for (int rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      outcomes[static_cast<std::size_t>(rank)] = run_rank(world, rank, options, body);
    });
  }
  for (auto& thread : threads) thread.join();
  for (const bool consequence : {false, true}) {
    for (const auto& outcome : outcomes) {
      if (outcome.error && outcome.consequence == consequence) {
        std::rethrow_exception(outcome.error);
      }
    }
  }
}

}  // namespace arcus
