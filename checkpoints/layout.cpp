#include "checkpoints/layout.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <sstream>

#include "checkpoints/files.hpp"
#include "src/base/hash.hpp"

namespace arcus {

std::uint64_t StoredTensor::hash() const { return hash_of_hashes(block_hashes); }

std::uint64_t StoredTensor::unit_hash(std::int64_t unit) const {
  const auto per_unit = static_cast<std::size_t>(blocks_per_unit(spec));
  return hash_of_hashes(
      std::span(block_hashes).subspan(static_cast<std::size_t>(unit) * per_unit, per_unit));
}

std::int64_t StoredTensor::bytes() const { return spec.num_rows() * layout::row_bytes(spec); }

const StoredTensor* Checkpoint::find(std::string_view name) const {
  const auto found = std::find_if(tensors.begin(), tensors.end(),
                                  [&](const StoredTensor& t) { return t.spec.name == name; });
  return found == tensors.end() ? nullptr : &*found;
}

std::uint64_t Checkpoint::digest() const {
  std::vector<std::string> lines;
  lines.reserve(tensors.size());
  for (const StoredTensor& tensor : tensors) {
    lines.push_back(fmt::format("{} {} {} {}\n", tensor.spec.name, name_of(tensor.spec.dtype),
                                layout::shape_text(tensor.spec), hex(tensor.hash())));
  }
  std::sort(lines.begin(), lines.end());
  return hash_text(fmt::format("{}", fmt::join(lines, "")));
}

std::int64_t Checkpoint::bytes() const {
  std::int64_t sum = 0;
  for (const StoredTensor& tensor : tensors) sum += tensor.bytes();
  return sum;
}

namespace layout {

std::filesystem::path checkpoints_folder(const std::filesystem::path& run_dir) {
  return run_dir / "checkpoints";
}

std::string step_name(std::int64_t step) { return fmt::format("step-{:08}", step); }

std::optional<std::int64_t> step_of_name(std::string_view name) {
  constexpr std::string_view kPrefix = "step-";
  if (!name.starts_with(kPrefix)) return std::nullopt;
  const std::string_view digits = name.substr(kPrefix.size());
  std::int64_t step = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), step);
  if (error != std::errc() || step_name(step) != name) return std::nullopt;
  return step;
}

void replace_folder(const std::filesystem::path& fresh, const std::filesystem::path& path,
                    bool exchange) {
  if (std::filesystem::exists(path)) {
    if (exchange && files::exchange_synced(fresh, path)) return;
    files::rename_synced(path, path.string() + kReplacedSuffix);
  }
  files::rename_synced(fresh, path);
}

void finish_replacements(const std::filesystem::path& folder) {
  std::error_code error;
  std::vector<std::filesystem::path> replaced;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    const std::filesystem::path& path = entry.path();
    if (path.extension() == kReplacedSuffix && step_of_name(path.stem().string())) {
      replaced.push_back(path);
    }
  }
  for (const std::filesystem::path& path : replaced) {
    std::filesystem::path name = path;
    name.replace_extension();
    if (std::filesystem::exists(name)) {
      std::filesystem::remove_all(path, error);
    } else {
      files::rename_synced(path, name);
    }
  }
}

std::string shard_name(std::int64_t rank) { return fmt::format("rank-{:05}.h5", rank); }

std::int64_t block_of_row(const TensorSpec& spec, std::int64_t row) {
  const std::int64_t unit = row / spec.unit_rows();
  const std::int64_t row_in_unit = row % spec.unit_rows();
  ARCUS_CHECK(row_in_unit % block_rows(spec) == 0,
              "row {} of tensor {} is not the first of a block of {} rows", row, spec.name,
              block_rows(spec));
  return unit * blocks_per_unit(spec) + row_in_unit / block_rows(spec);
}

BlockRange blocks_of(const TensorSpec& spec, RowRange rows) {
  ARCUS_CHECK(rows.begin >= 0 && rows.begin <= rows.end && rows.end <= spec.num_rows(),
              "rows {}..{} of tensor {}, which has {}", rows.begin, rows.end, spec.name,
              spec.num_rows());
  if (rows.begin == rows.end) return {};
  const std::int64_t last =
      rows.end == spec.num_rows() ? num_blocks(spec) : block_of_row(spec, rows.end);
  return {block_of_row(spec, rows.begin), last};
}

std::int64_t row_bytes(const TensorSpec& spec) {
  return spec.cols() * static_cast<std::int64_t>(size_of(spec.dtype));
}

std::string shape_text(const TensorSpec& spec) {
  return spec.shape.empty() ? "-" : fmt::format("{}", fmt::join(spec.shape, "x"));
}

std::string format_checksums(const std::vector<StoredFile>& files) {
  std::string text;
  for (const StoredFile& file : files) {
    text += fmt::format("{} {} {}\n", hex(file.hash), file.size, file.name);
  }
  return text + hex(hash_text(text)) + "\n";
}

std::vector<StoredFile> parse_checksums(const std::string& text,
                                        const std::filesystem::path& path) {
  constexpr std::size_t kLastLine = 17;  // 16 digits and the line end
  ARCUS_REQUIRE(text.size() > kLastLine, ExitCode::checkpoint, "{} is truncated ({} bytes)",
                path.string(), text.size());
  const std::string lines = text.substr(0, text.size() - kLastLine);
  ARCUS_REQUIRE(text.substr(lines.size()) == hex(hash_text(lines)) + "\n", ExitCode::checkpoint,
                "{} is damaged: its last line is not the hash of the lines above", path.string());
  std::vector<StoredFile> files;
  std::istringstream in(lines);
  std::string hash;
  StoredFile file;
  while (in >> hash >> file.size >> file.name) {
    file.hash = std::stoull(hash, nullptr, 16);
    files.push_back(file);
  }
  ARCUS_REQUIRE(in.eof() && !files.empty() && files[0].name == kIndexName, ExitCode::checkpoint,
                "{} does not list {} and the shards", path.string(), kIndexName);
  return files;
}

}  // namespace layout
}  // namespace arcus
