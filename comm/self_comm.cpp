#include <cstdlib>
#include <cstring>

#include "comm/backends.hpp"
#include "comm/last_words.hpp"

namespace arcus {
namespace {

class SelfComm final : public Communicator {
 public:
  explicit SelfComm(CommunicatorOptions options) : Communicator(0, 1, options) {}

  [[noreturn]] void abort(ExitCode code, std::string_view message) override {
    say_last_words(0, 1, code, message);
    std::_Exit(static_cast<int>(code));
  }

 protected:
  Event do_all_to_all_v(const AllToAllV& args) override {
    copy(args.recv, args.send, args, args.row_bytes);
    if (args.scalar_bytes > 0) copy(args.recv_scalars, args.send_scalars, args, args.scalar_bytes);
    return {};
  }
  Event do_all_reduce(const AllReduce& /*args*/) override { return {}; }
  Event do_all_gather_v(const AllGatherV& /*args*/) override { return {}; }
  Event do_reduce_scatter_v(const ReduceScatterV& /*args*/) override { return {}; }
  Event do_broadcast(const Broadcast& /*args*/) override { return {}; }
  void do_barrier() override {}
  std::unique_ptr<Communicator> do_split(int /*color*/, int /*key*/) override {
    return std::make_unique<SelfComm>(options());
  }

 private:
  static void copy(void* to, const void* from, const AllToAllV& args, std::int64_t row_bytes) {
    if (args.send_counts[0] == 0) return;
    std::memcpy(static_cast<char*>(to) + args.recv_offsets[0] * row_bytes,
                static_cast<const char*>(from) + args.send_offsets[0] * row_bytes,
                static_cast<std::size_t>(args.send_counts[0] * row_bytes));
  }
};

}  // namespace

std::unique_ptr<Communicator> make_self_communicator(CommunicatorOptions options) {
  return std::make_unique<SelfComm>(options);
}

}  // namespace arcus
