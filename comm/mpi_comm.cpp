#include "comm/mpi_comm.hpp"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>

#include "comm/backends.hpp"
#include "comm/last_words.hpp"
#include "comm/mpi_shared_memory.hpp"
#include "comm/reduce.hpp"

namespace arcus {
namespace {

enum Tag { kRowTag = 1, kScalarTag = 2, kReduceTag = 3 };

/// Bytes of one piece of reduce_scatter_v: large enough for the network, small enough for the
/// cache.
constexpr std::int64_t kPieceBytes = std::int64_t{1} << 18;

int rank_in(MPI_Comm comm) {
  int rank = 0;
  ARCUS_MPI(MPI_Comm_rank(comm, &rank));
  return rank;
}

int size_of_comm(MPI_Comm comm) {
  int size = 0;
  ARCUS_MPI(MPI_Comm_size(comm, &size));
  return size;
}

MPI_Datatype mpi_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return MPI_FLOAT;
    case DType::f64:
      return MPI_DOUBLE;
    case DType::bf16:
      return MPI_UINT16_T;  // moved only, never reduced
    case DType::i32:
      return MPI_INT32_T;
    case DType::i64:
      return MPI_INT64_T;
    case DType::u8:
      return MPI_UINT8_T;
    case DType::u16:
      return MPI_UINT16_T;
    case DType::u32:
      return MPI_UINT32_T;
    case DType::u64:
      return MPI_UINT64_T;
  }
  ARCUS_FAIL(ExitCode::internal, "no MPI type for {}", name_of(dtype));
}

/// Integer sums wrap: unsigned arithmetic says so, and the bits are the same.
MPI_Datatype reduction_type(DType dtype, ReduceOp op) {
  if (op == ReduceOp::sum && dtype == DType::i64) return MPI_UINT64_T;
  if (op == ReduceOp::sum && dtype == DType::i32) return MPI_UINT32_T;
  return mpi_type(dtype);
}

MPI_Op mpi_op(ReduceOp op) {
  return op == ReduceOp::sum ? MPI_SUM : op == ReduceOp::max ? MPI_MAX : MPI_MIN;
}

std::string error_text(int status) {
  std::array<char, MPI_MAX_ERROR_STRING> text{};
  int length = 0;
  MPI_Error_string(status, text.data(), &length);
  return {text.data(), static_cast<std::size_t>(length)};
}

int checked_count(std::int64_t count) {
  ARCUS_REQUIRE(count <= std::numeric_limits<int>::max(), ExitCode::comm,
                "{} rows for one rank in one exchange; MPI carries at most 2^31 - 1: make the "
                "micro-batch smaller",
                count);
  return static_cast<int>(count);
}

bool finalized() {
  int flag = 0;
  MPI_Finalized(&flag);
  return flag != 0;
}

}  // namespace

void check_mpi(int status, const char* call, const char* file, int line) {
  if (status == MPI_SUCCESS) return;
  const std::string_view text(call);
  throw Error(ExitCode::comm,
              fmt::format("{} failed: {}", text.substr(0, text.find('(')), error_text(status)),
              file, line);
}

MpiHandle::MpiHandle(MPI_Comm comm) : comm_(comm) {
  ARCUS_MPI(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN));
}

MpiHandle::~MpiHandle() {
  // Freeing is collective: a rank that leaves by an exception must not wait for the others in it.
  if (comm_ == MPI_COMM_NULL || finalized() || std::uncaught_exceptions() > 0) return;
  MPI_Comm_free(&comm_);
}

namespace {

/// The ranks of `comm` that share a machine with this one, in order.
MpiHandle node_of(MPI_Comm comm) {
  MPI_Comm node = MPI_COMM_NULL;
  ARCUS_MPI(MPI_Comm_split_type(comm, MPI_COMM_TYPE_SHARED, rank_in(comm), MPI_INFO_NULL, &node));
  return MpiHandle(node);
}

}  // namespace

MpiExchange::MpiExchange(int size)
    : requests_(4 * static_cast<std::size_t>(size)),
      statuses_(requests_.size()),
      expected_(requests_.size()) {}

void MpiExchange::receive(void* data, std::int64_t count, MPI_Datatype type, int peer, int tag,
                          MPI_Comm comm) {
  const auto i = static_cast<std::size_t>(num_requests_);
  expected_[i] = {type, count, peer};
  ARCUS_MPI(MPI_Irecv(data, checked_count(count), type, peer, tag, comm, &requests_[i]));
  ++num_requests_;
}

void MpiExchange::send(const void* data, std::int64_t count, MPI_Datatype type, int peer, int tag,
                       MPI_Comm comm) {
  const auto i = static_cast<std::size_t>(num_requests_);
  expected_[i] = {type, -1, peer};
  ARCUS_MPI(MPI_Isend(data, checked_count(count), type, peer, tag, comm, &requests_[i]));
  ++num_requests_;
}

bool MpiExchange::test() {
  if (num_requests_ == 0) return true;
  int complete = 0;
  const int status = MPI_Testall(num_requests_, requests_.data(), &complete, statuses_.data());
  if (status == MPI_SUCCESS && complete == 0) return false;
  finish(status);
  return true;
}

void MpiExchange::wait() {
  if (num_requests_ == 0) return;
  finish(MPI_Waitall(num_requests_, requests_.data(), statuses_.data()));
}

void MpiExchange::finish(int status) {
  const auto n = static_cast<std::size_t>(std::exchange(num_requests_, 0));
  for (std::size_t i = 0; i < n; ++i) {
    const Expected& expected = expected_[i];
    ARCUS_REQUIRE(status != MPI_ERR_IN_STATUS || statuses_[i].MPI_ERROR == MPI_SUCCESS ||
                      statuses_[i].MPI_ERROR == MPI_ERR_PENDING,
                  ExitCode::comm, "exchange with rank {} failed: {}", expected.peer,
                  error_text(statuses_[i].MPI_ERROR));
    if (expected.count < 0 || status != MPI_SUCCESS) continue;
    int received = 0;
    ARCUS_MPI(MPI_Get_count(&statuses_[i], expected.type, &received));
    // MPI itself says nothing when fewer rows come than were asked for.
    ARCUS_REQUIRE(received == expected.count, ExitCode::comm,
                  "rank {} sent {} rows where {} were expected", expected.peer, received,
                  expected.count);
  }
  ARCUS_MPI(status);
}

MpiComm::MpiComm(MpiHandle comm, CommunicatorOptions options)
    : Communicator(rank_in(comm.get()), size_of_comm(comm.get()), options),
      comm_(std::move(comm)),
      exchange_(size()),
      counts_(static_cast<std::size_t>(size())),
      offsets_(counts_.size()),
      recv_counts_(counts_.size()),
      recv_offsets_(counts_.size()),
      pieces_(size() > 1 ? 2 * kPieceBytes : 0) {
  const MpiHandle node = node_of(handle());
  node_local_rank_ = rank_in(node.get());
  node_size_ = size_of_comm(node.get());
}

MpiComm::~MpiComm() {
  if (finalized()) return;
  for (auto& [bytes, type] : row_types_) MPI_Type_free(&type);
}

std::unique_ptr<SharedMemory> MpiComm::share_memory(std::int64_t bytes) {
  // Every rank sees the same: a node's ranks are either all of the communicator or not.
  if (node_size_ < size()) return nullptr;
  return share_over_processes(handle(), bytes);
}

void MpiComm::abort(ExitCode code, std::string_view message) {
  say_last_words(rank_in(MPI_COMM_WORLD), size_of_comm(MPI_COMM_WORLD), code, message);
  MPI_Abort(MPI_COMM_WORLD, static_cast<int>(code));
  std::_Exit(static_cast<int>(code));
}

MPI_Datatype MpiComm::row_type(std::int64_t row_bytes) {
  for (const auto& [bytes, type] : row_types_) {
    if (bytes == row_bytes) return type;
  }
  MPI_Datatype type = MPI_DATATYPE_NULL;
  ARCUS_MPI(MPI_Type_contiguous(checked_count(row_bytes), MPI_BYTE, &type));
  ARCUS_MPI(MPI_Type_commit(&type));
  row_types_.emplace_back(row_bytes, type);
  return type;
}

/// One array of an exchange: the rows, or what travels beside them.
struct MpiComm::Step {
  const char* send;
  char* recv;
  std::int64_t row_bytes;
  int tag;
  MPI_Datatype type;
};

Event MpiComm::do_all_to_all_v(const AllToAllV& args) {
  ARCUS_CHECK(!exchange_.active(), "an exchange is under way on this communicator already");
  std::array<Step, 2> steps = {
      {{static_cast<const char*>(args.send), static_cast<char*>(args.recv), args.row_bytes, kRowTag,
        row_type(args.row_bytes)},
       {static_cast<const char*>(args.send_scalars), static_cast<char*>(args.recv_scalars),
        args.scalar_bytes, kScalarTag, MPI_DATATYPE_NULL}}};
  const std::size_t num_steps = args.scalar_bytes > 0 ? 2 : 1;
  if (num_steps == 2) steps[1].type = row_type(args.scalar_bytes);
  // All receives first, so that rows find their place at once; peers in a different order on every
  // rank, so that not all send to rank 0 first.
  for (int i = 1; i < size(); ++i) {
    const int peer = (rank() + size() - i) % size();
    const auto p = static_cast<std::size_t>(peer);
    for (std::size_t s = 0; s < num_steps && args.recv_counts[p] > 0; ++s) {
      exchange_.receive(steps[s].recv + args.recv_offsets[p] * steps[s].row_bytes,
                        args.recv_counts[p], steps[s].type, peer, steps[s].tag, handle());
    }
  }
  for (int i = 1; i < size(); ++i) {
    const int peer = (rank() + i) % size();
    const auto p = static_cast<std::size_t>(peer);
    for (std::size_t s = 0; s < num_steps && args.send_counts[p] > 0; ++s) {
      exchange_.send(steps[s].send + args.send_offsets[p] * steps[s].row_bytes, args.send_counts[p],
                     steps[s].type, peer, steps[s].tag, handle());
    }
  }
  const auto me = static_cast<std::size_t>(rank());
  for (std::size_t s = 0; s < num_steps && args.send_counts[me] > 0; ++s) {
    std::memcpy(steps[s].recv + args.recv_offsets[me] * steps[s].row_bytes,
                steps[s].send + args.send_offsets[me] * steps[s].row_bytes,
                static_cast<std::size_t>(args.send_counts[me] * steps[s].row_bytes));
  }
  return exchange_.active() ? Event(&exchange_) : Event();
}

void MpiComm::library_all_to_all_v(const AllToAllV& args) {
  for (std::size_t r = 0; r < counts_.size(); ++r) {
    counts_[r] = checked_count(args.send_counts[r]);
    offsets_[r] = checked_count(args.send_offsets[r]);
    recv_counts_[r] = checked_count(args.recv_counts[r]);
    recv_offsets_[r] = checked_count(args.recv_offsets[r]);
  }
  const MPI_Datatype type = row_type(args.row_bytes);
  ARCUS_MPI(MPI_Alltoallv(args.send, counts_.data(), offsets_.data(), type, args.recv,
                          recv_counts_.data(), recv_offsets_.data(), type, handle()));
}

void library_all_to_all_v(Communicator& comm, const AllToAllV& args) {
  auto* mpi = dynamic_cast<MpiComm*>(&comm);
  ARCUS_CHECK(mpi != nullptr, "MPI_Alltoallv needs an MPI communicator");
  mpi->library_all_to_all_v(args);
}

Event MpiComm::do_all_reduce(const AllReduce& args) {
  const auto bytes = static_cast<std::int64_t>(size_of(args.buffer.dtype));
  const std::int64_t n = args.buffer.size(), step = options().max_call_elements;
  for (std::int64_t i = 0; i < n; i += step) {
    ARCUS_MPI(MPI_Allreduce(MPI_IN_PLACE, static_cast<char*>(args.buffer.data) + i * bytes,
                            static_cast<int>(std::min(step, n - i)),
                            reduction_type(args.buffer.dtype, args.op), mpi_op(args.op), handle()));
  }
  return {};
}

Event MpiComm::do_all_gather_v(const AllGatherV& args) {
  const auto bytes = static_cast<std::int64_t>(size_of(args.buffer.dtype));
  auto* data = static_cast<char*>(args.buffer.data);
  std::int64_t end = 0;
  for (std::size_t r = 0; r < counts_.size(); ++r) {
    end = std::max(end, args.offsets[r] + args.counts[r]);
  }
  if (end > options().max_call_elements) {  // offsets of MPI_Allgatherv are int as well
    for (int root = 0; root < size(); ++root) {
      const auto r = static_cast<std::size_t>(root);
      broadcast_part(data + args.offsets[r] * bytes, args.counts[r], args.buffer.dtype, root);
    }
    return {};
  }
  for (std::size_t r = 0; r < counts_.size(); ++r) {
    counts_[r] = static_cast<int>(args.counts[r]);
    offsets_[r] = args.counts[r] == 0 ? 0 : static_cast<int>(args.offsets[r]);
  }
  const MPI_Datatype type = mpi_type(args.buffer.dtype);
  ARCUS_MPI(
      MPI_Allgatherv(MPI_IN_PLACE, 0, type, data, counts_.data(), offsets_.data(), type, handle()));
  return {};
}

/// Pairwise exchange: in step i every rank sends what rank (me + i) sums and adds what it gets from
/// rank (me - i). Bytes sent: all but the own part. Needs two pieces of memory, where MPI's own
/// call would need the whole part once more.
Event MpiComm::do_reduce_scatter_v(const ReduceScatterV& args) {
  for (int i = 1; i < size(); ++i) {
    exchange_and_add(args, (rank() + i) % size(), (rank() + size() - i) % size());
  }
  return {};
}

void MpiComm::exchange_and_add(const ReduceScatterV& args, int to, int from) {
  const DType dtype = args.buffer.dtype;
  const auto bytes = static_cast<std::int64_t>(size_of(dtype));
  const std::int64_t step = std::min(kPieceBytes / bytes, options().max_call_elements);
  const auto me = static_cast<std::size_t>(rank()), t = static_cast<std::size_t>(to);
  char* sum = static_cast<char*>(args.buffer.data) + args.offsets[me] * bytes;
  const char* theirs = static_cast<const char*>(args.buffer.data) + args.offsets[t] * bytes;
  const auto length = [&](std::int64_t total, std::int64_t piece) {
    return static_cast<int>(std::clamp<std::int64_t>(total - piece * step, 0, step));
  };
  const auto num_pieces = (std::max(args.counts[me], args.counts[t]) + step - 1) / step;
  for (std::int64_t piece = 0; piece <= num_pieces; ++piece) {
    std::array<MPI_Request, 2> requests = {MPI_REQUEST_NULL, MPI_REQUEST_NULL};
    const int incoming = length(args.counts[me], piece), outgoing = length(args.counts[t], piece);
    char* slot = pieces_.data() + piece % 2 * kPieceBytes;
    if (incoming > 0) {
      ARCUS_MPI(
          MPI_Irecv(slot, incoming, mpi_type(dtype), from, kReduceTag, handle(), &requests[0]));
    }
    if (outgoing > 0) {
      ARCUS_MPI(MPI_Isend(theirs + piece * step * bytes, outgoing, mpi_type(dtype), to, kReduceTag,
                          handle(), &requests[1]));
    }
    // The piece before is added while this one travels.
    if (piece > 0 && length(args.counts[me], piece - 1) > 0) {
      reduce_elements(dtype, ReduceOp::sum, sum + (piece - 1) * step * bytes,
                      pieces_.data() + (piece - 1) % 2 * kPieceBytes,
                      length(args.counts[me], piece - 1));
    }
    ARCUS_MPI(MPI_Waitall(2, requests.data(), MPI_STATUSES_IGNORE));
  }
}

void MpiComm::broadcast_part(char* data, std::int64_t elements, DType dtype, int root) {
  const auto bytes = static_cast<std::int64_t>(size_of(dtype));
  const std::int64_t step = options().max_call_elements;
  for (std::int64_t i = 0; i < elements; i += step) {
    ARCUS_MPI(MPI_Bcast(data + i * bytes, static_cast<int>(std::min(step, elements - i)),
                        mpi_type(dtype), root, handle()));
  }
}

Event MpiComm::do_broadcast(const Broadcast& args) {
  broadcast_part(static_cast<char*>(args.buffer.data), args.buffer.size(), args.buffer.dtype,
                 args.root);
  return {};
}

void MpiComm::do_barrier() { ARCUS_MPI(MPI_Barrier(handle())); }

std::unique_ptr<Communicator> MpiComm::do_split(int color, int key) {
  MPI_Comm part = MPI_COMM_NULL;
  ARCUS_MPI(MPI_Comm_split(handle(), color, key, &part));
  return std::make_unique<MpiComm>(MpiHandle(part), options());
}

std::unique_ptr<Communicator> MpiComm::do_split_by_node() {
  return std::make_unique<MpiComm>(node_of(handle()), options());
}

}  // namespace arcus
