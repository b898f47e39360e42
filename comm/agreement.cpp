#include <exception>
#include <numeric>
#include <optional>

#include "comm/communicator.hpp"

namespace arcus {
namespace {

/// What went wrong on this rank, if anything.
std::optional<Error> run_and_catch(const std::function<void()>& fn) {
  try {
    fn();
    return std::nullopt;
  } catch (const std::exception& exception) {
    return as_error(exception);
  }
}

/// Rank `failed`'s error on all ranks, its place in the source included.
Error broadcast_error(Communicator& comm, Stream& stream, const std::optional<Error>& mine,
                      ExitCode code, int failed) {
  std::string line, file, message;
  if (comm.rank() == failed) {
    line = std::to_string(mine->line());
    file = mine->file();
    message = mine->what();
  }
  line = broadcast_text(comm, stream, line, failed);
  file = broadcast_text(comm, stream, file, failed);
  message = broadcast_text(comm, stream, message, failed);
  if (comm.size() > 1) message = fmt::format("rank {}: {}", failed, message);
  return {code, message, file, std::stoi(line)};
}

/// Exclusive prefix sum.
std::vector<std::int64_t> offsets_of(const std::vector<std::int64_t>& counts) {
  std::vector<std::int64_t> offsets(counts.size());
  std::exclusive_scan(counts.begin(), counts.end(), offsets.begin(), std::int64_t{0});
  return offsets;
}

/// Every rank's number, in rank order.
std::vector<std::int64_t> gather_numbers(Communicator& comm, Stream& stream, std::int64_t mine) {
  const auto size = static_cast<std::size_t>(comm.size());
  std::vector<std::int64_t> numbers(size), ones(size, 1), indices(size);
  std::iota(indices.begin(), indices.end(), std::int64_t{0});
  numbers[static_cast<std::size_t>(comm.rank())] = mine;
  const TensorView buffer(numbers.data(), DType::i64, 1, comm.size());
  stream.wait(comm.all_gather_v(stream, {buffer, ones, indices}));
  return numbers;
}

}  // namespace

std::vector<std::string> gather_texts(Communicator& comm, Stream& stream, std::string_view text) {
  const auto counts = gather_numbers(comm, stream, static_cast<std::int64_t>(text.size()));
  const auto offsets = offsets_of(counts);
  std::string all(static_cast<std::size_t>(offsets.back() + counts.back()), '\0');
  text.copy(all.data() + offsets[static_cast<std::size_t>(comm.rank())], text.size());
  const TensorView buffer(all.data(), DType::u8, 1, static_cast<std::int64_t>(all.size()));
  stream.wait(comm.all_gather_v(stream, {buffer, counts, offsets}));
  std::vector<std::string> texts;
  for (std::size_t r = 0; r < counts.size(); ++r) {
    texts.push_back(
        all.substr(static_cast<std::size_t>(offsets[r]), static_cast<std::size_t>(counts[r])));
  }
  return texts;
}

std::string broadcast_text(Communicator& comm, Stream& stream, std::string_view text, int root) {
  auto length = static_cast<std::int64_t>(text.size());
  stream.wait(comm.broadcast(stream, {TensorView(&length, DType::i64, 1, 1), root}));
  std::string result(static_cast<std::size_t>(length), '\0');
  if (comm.rank() == root) result = text;
  stream.wait(comm.broadcast(stream, {TensorView(result.data(), DType::u8, 1, length), root}));
  return result;
}

void agree_on_errors(Communicator& comm, Stream& stream, const std::function<void()>& fn) {
  const std::optional<Error> mine = run_and_catch(fn);
  const auto codes =
      gather_numbers(comm, stream, mine ? static_cast<std::int64_t>(mine->code()) : 0);
  int failed = 0;
  while (failed < comm.size() && codes[static_cast<std::size_t>(failed)] == 0) ++failed;
  if (failed == comm.size()) return;
  const auto code = static_cast<ExitCode>(codes[static_cast<std::size_t>(failed)]);
  throw broadcast_error(comm, stream, mine, code, failed);
}

}  // namespace arcus
