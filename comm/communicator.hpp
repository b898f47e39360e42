#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "comm/shared_memory.hpp"
#include "kernels/stream.hpp"
#include "src/base/error.hpp"
#include "src/base/tensor.hpp"

namespace arcus {

enum class ReduceOp { sum, max, min };

/// Rows sent to and received from every rank. Counts and offsets are in rows, one entry per rank;
/// they and the buffers must live until the exchange is complete.
struct AllToAllV {
  const void* send = nullptr;
  std::span<const std::int64_t> send_counts, send_offsets;
  void* recv = nullptr;
  std::span<const std::int64_t> recv_counts, recv_offsets;
  std::int64_t row_bytes = 0;
  /// A few bytes that travel beside every row, with the same counts and offsets; 0 = none. All
  /// ranks pass the same number.
  const void* send_scalars = nullptr;
  void* recv_scalars = nullptr;
  std::int64_t scalar_bytes = 0;
};

struct AllReduce {
  TensorView buffer;  ///< contiguous, in place
  ReduceOp op = ReduceOp::sum;
};

/// Every rank's part is `counts[rank]` elements at `offsets[rank]` of `buffer`; in place.
struct AllGatherV {
  TensorView buffer;  ///< [1, n]
  std::span<const std::int64_t> counts, offsets;
};

/// buffer = sum over ranks; afterwards rank r's part (counts[r] elements at offsets[r]) holds the
/// sum, the rest is unspecified. In place.
struct ReduceScatterV {
  TensorView buffer;  ///< [1, n]
  std::span<const std::int64_t> counts, offsets;
};

struct Broadcast {
  TensorView buffer;
  int root = 0;
};

struct CommunicatorOptions {
  bool reproducible = true;  ///< refuse reductions of floating-point numbers
  bool checked = false;      ///< verify that all ranks make the same call (costs a small exchange)
  /// Take every so many consecutive ranks for a node (tests, and several "nodes" on one machine);
  /// 0 = as the ranks really share machines.
  int ranks_per_node = 0;
  /// Most elements one MPI call may carry; larger collectives go in pieces. Tests lower it.
  std::int64_t max_call_elements = std::numeric_limits<std::int32_t>::max();
};

/// Collectives of a fixed set of ranks. Every rank makes the same calls in the same order; calls
/// are ordered on the stream given and return an Event, which `Stream::wait` completes. The public
/// functions check their arguments (both values in the message); backends move bytes. At most one
/// unfinished all_to_all_v per communicator.
///
/// Without `checked`, a rank that is refused here throws alone and the others wait for it until
/// somebody calls abort; in checked mode every rank throws.
class Communicator {
 public:
  virtual ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  const CommunicatorOptions& options() const { return options_; }

  Event all_to_all_v(Stream& stream, const AllToAllV& args);
  Event all_reduce(Stream& stream, const AllReduce& args);
  Event all_gather_v(Stream& stream, const AllGatherV& args);
  Event reduce_scatter_v(Stream& stream, const ReduceScatterV& args);
  Event broadcast(Stream& stream, const Broadcast& args);
  void barrier(Stream& stream);
  /// A barrier where the stream is measured with waits apart (Profile); else nothing.
  void meet(Stream& stream);
  /// Ranks with the same colour form a communicator, ordered by (key, rank).
  std::unique_ptr<Communicator> split(int color, int key);
  /// This rank's node: the ranks of this communicator on it, in order. Collective.
  std::unique_ptr<Communicator> split_by_node();
  /// Memory that all ranks can address (`bytes` of it here; may differ between ranks), or null on
  /// all ranks alike where they cannot: on several nodes, say. Collective.
  virtual std::unique_ptr<SharedMemory> share_memory(std::int64_t bytes);
  /// Throws if another rank is known to have failed; for loops that wait for a flag.
  virtual void check_peers() {}
  /// Bytes that went to other ranks in another way than by these calls.
  void count_sent(std::int64_t bytes) { sent_bytes_ += bytes; }
  /// Ends all ranks of the job with this rank's message as the last line of the log. Does not
  /// return; called where an error reaches the top of a rank. (Ranks that are threads of one
  /// process throw the message instead.)
  [[noreturn]] virtual void abort(ExitCode code, std::string_view message) = 0;
  /// Ranks per node seen by this communicator's rank: the first rank of its node, for placement.
  virtual int node_local_rank() const { return rank_; }
  virtual int node_size() const { return size_; }

  /// Bytes this rank has sent to other ranks since the start; for reductions and gathers those that
  /// the best known algorithm sends.
  std::int64_t sent_bytes() const { return sent_bytes_; }
  /// Time this rank has spent inside collectives that block, since the start; what an all_to_all_v
  /// leaves to wait for counts where it is waited for (Stream::waited_seconds).
  double blocked_seconds() const { return blocked_seconds_; }

 protected:
  Communicator(int rank, int size, CommunicatorOptions options);
  virtual Event do_all_to_all_v(const AllToAllV& args) = 0;
  virtual Event do_all_reduce(const AllReduce& args) = 0;
  virtual Event do_all_gather_v(const AllGatherV& args) = 0;
  virtual Event do_reduce_scatter_v(const ReduceScatterV& args) = 0;
  virtual Event do_broadcast(const Broadcast& args) = 0;
  virtual void do_barrier() = 0;
  virtual std::unique_ptr<Communicator> do_split(int color, int key) = 0;
  /// As ranks really share machines; all on one unless a backend knows better.
  virtual std::unique_ptr<Communicator> do_split_by_node() { return do_split(0, rank_); }

 private:
  template <class Fn>
  Event timed(Fn&& fn) {
    const auto begin = std::chrono::steady_clock::now();
    const Event event = fn();
    blocked_seconds_ +=
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    return event;
  }

  struct Call;
  struct CallCheck;
  /// What every collective does first: `validate()`, in checked mode the comparison with the calls
  /// of the other ranks.
  template <class Validate>
  void enter(const Call& call, Validate&& validate);
  void compare_calls(const Call& mine);
  void compare_counts(const AllToAllV& args);

  int rank_;
  int size_;
  CommunicatorOptions options_;
  std::int64_t sent_bytes_ = 0;
  double blocked_seconds_ = 0;
  std::unique_ptr<CallCheck> check_;  ///< buffers of checked mode
};

/// All ranks' texts, in rank order, on every rank; and rank `root`'s text on every rank.
std::vector<std::string> gather_texts(Communicator& comm, Stream& stream, std::string_view text);
std::string broadcast_text(Communicator& comm, Stream& stream, std::string_view text, int root = 0);
/// Runs `fn` on every rank; if it threw on some rank, all ranks throw the error of the lowest such
/// rank, its number in front. Use it where a rank may fail between two collectives; `fn` itself
/// contains none.
void agree_on_errors(Communicator& comm, Stream& stream, const std::function<void()>& fn);

}  // namespace arcus
