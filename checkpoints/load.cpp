#include <unistd.h>

#include <algorithm>
#include <set>

#include "checkpoints/files.hpp"
#include "checkpoints/layout.hpp"
#include "src/base/hash.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;
constexpr ExitCode kCode = ExitCode::checkpoint;

void require_size(const fs::path& path, std::int64_t size) {
  std::error_code error;
  ARCUS_REQUIRE(fs::exists(path, error) || error, kCode, "{} is missing", path.string());
  const auto found = static_cast<std::int64_t>(fs::file_size(path, error));
  ARCUS_REQUIRE(!error, kCode, "cannot read {}: {}", path.string(), error.message());
  ARCUS_REQUIRE(found == size, kCode, "{} has {} bytes instead of {}{}", path.string(), found, size,
                found < size ? " (truncated)" : "");
}

/// The index belongs to this folder and to these shards.
void require_consistent(const Checkpoint& checkpoint) {
  const auto& [path, info, tensors, files] = checkpoint;
  const auto named_step = layout::step_of_name(path.filename().string());
  ARCUS_REQUIRE(!named_step || *named_step == info.step, kCode, "{} is of step {}",
                (path / layout::kIndexName).string(), info.step);
  ARCUS_REQUIRE(static_cast<std::int64_t>(files.size()) == info.num_ranks + 1, kCode,
                "{} lists {} shards, the index says {}", (path / layout::kChecksumsName).string(),
                files.size() - 1, info.num_ranks);
  for (std::int64_t rank = 0; rank < info.num_ranks; ++rank) {
    ARCUS_REQUIRE(files[static_cast<std::size_t>(rank) + 1].name == layout::shard_name(rank), kCode,
                  "{} does not list {} in its place", (path / layout::kChecksumsName).string(),
                  layout::shard_name(rank));
  }
}

const StoredRange& range_of_row(const StoredTensor& tensor, std::int64_t row) {
  const auto after = std::upper_bound(
      tensor.ranges.begin(), tensor.ranges.end(), row,
      [](std::int64_t r, const StoredRange& range) { return r < range.rows.begin; });
  ARCUS_REQUIRE(after != tensor.ranges.begin() && row < std::prev(after)->rows.end, kCode,
                "no shard holds row {} of tensor {}", row, tensor.spec.name);
  return *std::prev(after);
}

/// Reads rows block by block, for the sake of their hashes.
void check_blocks(TensorReader& reader, const StoredTensor& tensor, RowRange rows,
                  std::vector<char>& buffer) {
  const layout::BlockRange blocks = layout::blocks_of(tensor.spec, rows);
  for (std::int64_t block = blocks.first; block < blocks.last; ++block) {
    const RowRange part = block_range(tensor.spec, block);
    buffer.resize(
        static_cast<std::size_t>((part.end - part.begin) * layout::row_bytes(tensor.spec)));
    reader.read(tensor, part, buffer.data());
  }
}

std::string describe(const TensorSpec& spec) {
  return fmt::format("{} {} in {} units", name_of(spec.dtype), layout::shape_text(spec),
                     spec.num_units);
}

}  // namespace

TensorReader::~TensorReader() {
  for (const auto& [shard, descriptor] : descriptors_) ::close(descriptor);
}

int TensorReader::open_shard(std::int64_t shard) {
  constexpr std::size_t kMaxOpen = 64;  // far below the usual limit of 1024 open files
  const auto found = descriptors_.find(shard);
  if (found != descriptors_.end()) return found->second;
  if (descriptors_.size() == kMaxOpen) {
    ::close(descriptors_.begin()->second);
    descriptors_.erase(descriptors_.begin());
  }
  const int descriptor = files::open_for_reading(checkpoint_.path / layout::shard_name(shard));
  return descriptors_.emplace(shard, descriptor).first->second;
}

void TensorReader::read(const StoredTensor& tensor, RowRange rows, void* out) {
  const std::int64_t row_bytes = layout::row_bytes(tensor.spec);
  const layout::BlockRange blocks = layout::blocks_of(tensor.spec, rows);
  for (std::int64_t block = blocks.first; block < blocks.last; ++block) {
    const RowRange part = block_range(tensor.spec, block);
    const StoredRange& range = range_of_row(tensor, part.begin);
    const fs::path path = checkpoint_.path / layout::shard_name(range.shard);
    const std::int64_t bytes = (part.end - part.begin) * row_bytes;
    auto* target = static_cast<char*>(out) + (part.begin - rows.begin) * row_bytes;
    files::read_at(open_shard(range.shard),
                   range.offset + (part.begin - range.rows.begin) * row_bytes, target, bytes, path);
    bytes_read_ += bytes;
    const std::uint64_t hash = hash_bytes(target, static_cast<std::size_t>(bytes));
    ARCUS_REQUIRE(hash == tensor.block_hashes[static_cast<std::size_t>(block)], kCode,
                  "tensor {} is damaged: rows {}..{} in {} have the hash {}, the index says {}",
                  tensor.spec.name, part.begin, part.end, path.string(), hex(hash),
                  hex(tensor.block_hashes[static_cast<std::size_t>(block)]));
  }
}

namespace layout {

fs::path normalized(const fs::path& path) {
  const fs::path result = fs::absolute(path).lexically_normal();
  return result.has_filename() ? result : result.parent_path();
}

Checkpoint open(const fs::path& path, bool check_shards) {
  Checkpoint checkpoint;
  checkpoint.path = normalized(path);
  ARCUS_REQUIRE(fs::is_directory(checkpoint.path), kCode, "{} is no checkpoint: no such folder",
                checkpoint.path.string());
  const fs::path checksums = checkpoint.path / kChecksumsName;
  ARCUS_REQUIRE(fs::exists(checksums), kCode, "{} is missing", checksums.string());
  checkpoint.files = parse_checksums(files::read_text(checksums), checksums);
  for (std::size_t i = 0; i < (check_shards ? checkpoint.files.size() : 1); ++i) {
    require_size(checkpoint.path / checkpoint.files[i].name, checkpoint.files[i].size);
  }
  const fs::path index = checkpoint.path / kIndexName;
  const std::uint64_t hash = files::hash(index);
  ARCUS_REQUIRE(hash == checkpoint.files[0].hash, kCode,
                "{} is damaged or of another checkpoint: its hash is {}, {} says {}",
                index.string(), hex(hash), kChecksumsName, hex(checkpoint.files[0].hash));
  read_index(checkpoint);
  require_consistent(checkpoint);
  return checkpoint;
}

void require_match(const Checkpoint& checkpoint, std::span<const StateView> views, Match match) {
  std::map<std::string_view, const StoredTensor*> stored;
  for (const StoredTensor& tensor : checkpoint.tensors) stored[tensor.spec.name] = &tensor;
  std::vector<std::string> missing;
  std::vector<std::string> different;
  for (const StateView& view : views) {
    const auto found = stored.find(view.spec.name);
    if (found == stored.end()) {
      missing.push_back(view.spec.name);
      continue;
    }
    const std::string there = describe(found->second->spec);
    const std::string here = describe(view.spec);
    if (there != here) {
      different.push_back(fmt::format("{} (checkpoint: {}; run: {})", view.spec.name, there, here));
    }
    stored.erase(found);
  }
  std::vector<std::string> extra;
  if (match == Match::exact) {
    for (const auto& [name, tensor] : stored) extra.emplace_back(name);
  }
  std::string problems;
  if (!missing.empty()) problems += fmt::format("; missing in it: {}", list_names(missing));
  if (!extra.empty()) problems += fmt::format("; unknown to this run: {}", list_names(extra));
  if (!different.empty()) problems += fmt::format("; different: {}", list_names(different));
  ARCUS_REQUIRE(problems.empty(), kCode,
                "{} does not fit this run{}; use the configuration stored in it (arcus inspect)",
                checkpoint.path.string(), problems);
}

namespace {

/// Calls read(reader, tensor, slice) for all that the views name; returns the bytes read.
template <class Read>
std::int64_t for_each_slice(const Checkpoint& checkpoint, std::span<const StateView> views,
                            const std::function<void()>& while_reading, Read&& read) {
  std::map<std::string_view, const StoredTensor*> stored;
  for (const StoredTensor& tensor : checkpoint.tensors) stored[tensor.spec.name] = &tensor;
  TensorReader reader(checkpoint);
  for (const StateView& view : views) {
    for (const StateSlice& slice : view.slices) {
      if (view.spec.num_elements() == 0) continue;
      read(reader, *stored.at(view.spec.name), slice);
      if (while_reading) while_reading();
    }
  }
  return reader.bytes_read();
}

}  // namespace

std::int64_t read_views(const Checkpoint& checkpoint, std::span<const StateView> views,
                        const std::function<void()>& while_reading) {
  return for_each_slice(
      checkpoint, views, while_reading,
      [](TensorReader& reader, const StoredTensor& tensor, const StateSlice& slice) {
        reader.read(tensor, slice.rows, slice.data);
      });
}

void check_views(const Checkpoint& checkpoint, std::span<const StateView> views,
                 const std::function<void()>& while_reading) {
  std::vector<char> buffer;
  for_each_slice(checkpoint, views, while_reading,
                 [&](TensorReader& reader, const StoredTensor& tensor, const StateSlice& slice) {
                   check_blocks(reader, tensor, slice.rows, buffer);
                 });
}

}  // namespace layout

Checkpoint open_checkpoint(const fs::path& path) { return layout::open(path, true); }

void verify_checkpoint(const Checkpoint& checkpoint) {
  TensorReader reader(checkpoint);
  std::vector<char> buffer;
  for (const StoredTensor& tensor : checkpoint.tensors) {
    for (const StoredRange& range : tensor.ranges) check_blocks(reader, tensor, range.rows, buffer);
  }
  for (const StoredFile& file : checkpoint.files) {
    const fs::path path = checkpoint.path / file.name;
    const std::uint64_t hash = files::hash(path);
    ARCUS_REQUIRE(hash == file.hash, kCode,
                  "{} is damaged outside the tensors' data: its hash is {}, {} says {}",
                  path.string(), hex(hash), layout::kChecksumsName, hex(file.hash));
  }
}

}  // namespace arcus
