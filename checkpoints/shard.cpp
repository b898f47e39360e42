#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <future>
#include <nlohmann/json.hpp>

#include "checkpoints/files.hpp"
#include "checkpoints/layout.hpp"
#include "checkpoints/writer.hpp"
#include "src/base/hash.hpp"
#include "src/base/hdf5.hpp"

namespace arcus::writer {
namespace {

using nlohmann::json;

constexpr std::int64_t kPieceBytes = std::int64_t{1} << 26;

void require_valid(const TensorSpec& spec) {
  ARCUS_CHECK(!spec.name.empty() && spec.shape.size() <= 3 && spec.num_units >= 1 &&
                  spec.num_rows() % spec.num_units == 0,
              "tensor \"{}\" of shape {} and {} units cannot be saved", spec.name,
              layout::shape_text(spec), spec.num_units);
}

/// A view's rows that this rank writes.
std::vector<StateSlice> slices_to_write(int rank, const StateView& view) {
  std::vector<StateSlice> slices;
  std::int64_t row = 0;
  for (const StateSlice& slice : view.slices) {
    ARCUS_CHECK(slice.rows.begin >= row, "slices of tensor {} are not ascending and disjoint",
                view.spec.name);
    layout::blocks_of(view.spec, slice.rows);
    row = slice.rows.end;
    if (slice.rows.begin < slice.rows.end) slices.push_back(slice);
  }
  if (!view.replicated) return slices;
  const std::int64_t num_rows = view.spec.num_elements() == 0 ? 0 : view.spec.num_rows();
  ARCUS_CHECK(num_rows == 0 || (slices.size() == 1 && slices[0].rows.begin == 0 && row == num_rows),
              "replicated tensor {} is not whole on this rank", view.spec.name);
  if (rank != 0) slices.clear();
  return slices;
}

std::int64_t slice_bytes(const TensorSpec& spec, const StateSlice& slice) {
  return (slice.rows.end - slice.rows.begin) * layout::row_bytes(spec);
}

void hash_blocks(ShardTensor& tensor, Progress& progress) {
  const std::int64_t row_bytes = layout::row_bytes(tensor.spec);
  tensor.block_hashes.clear();
  for (const StateSlice& slice : tensor.slices) {
    const layout::BlockRange blocks = layout::blocks_of(tensor.spec, slice.rows);
    for (std::int64_t block = blocks.first; block < blocks.last; ++block) {
      const RowRange rows = block_range(tensor.spec, block);
      const auto* data =
          static_cast<const char*>(slice.data) + (rows.begin - slice.rows.begin) * row_bytes;
      tensor.block_hashes.push_back(
          hash_bytes(data, static_cast<std::size_t>((rows.end - rows.begin) * row_bytes)));
      ++progress;
    }
  }
}

/// Equal on all ranks that save the same tensors.
std::string table_text(std::span<const TensorSpec> specs) {
  std::string text;
  for (const TensorSpec& spec : specs) {
    text += fmt::format("{} {} {} {}\n", spec.name, name_of(spec.dtype), layout::shape_text(spec),
                        spec.num_units);
  }
  return text;
}

void add_shard_tensor(StoredTensor& tensor, std::int64_t rank, const json& part) {
  std::int64_t shard_row = 0;
  auto hash = part.at("hashes").begin();
  for (const json& pair : part.at("slices")) {
    const RowRange rows{pair.at(0).get<std::int64_t>(), pair.at(1).get<std::int64_t>()};
    tensor.ranges.push_back(
        {rows, rank, shard_row,
         part.at("offset").get<std::int64_t>() + shard_row * layout::row_bytes(tensor.spec)});
    shard_row += rows.end - rows.begin;
    const layout::BlockRange blocks = layout::blocks_of(tensor.spec, rows);
    for (std::int64_t block = blocks.first; block < blocks.last; ++block, ++hash) {
      tensor.block_hashes[static_cast<std::size_t>(block)] = hash->get<std::uint64_t>();
    }
  }
}

/// Every row exactly once.
void require_coverage(StoredTensor& tensor) {
  std::sort(tensor.ranges.begin(), tensor.ranges.end(),
            [](const StoredRange& a, const StoredRange& b) { return a.rows.begin < b.rows.begin; });
  std::int64_t row = 0;
  for (const StoredRange& range : tensor.ranges) {
    ARCUS_CHECK(range.rows.begin <= row, "no rank saves rows {}..{} of tensor {}", row,
                range.rows.begin, tensor.spec.name);
    ARCUS_CHECK(range.rows.begin == row,
                "rows {}..{} of tensor {} are saved twice, the second time by rank {}",
                range.rows.begin, row, tensor.spec.name, range.shard);
    row = range.rows.end;
  }
  ARCUS_CHECK(row == tensor.spec.num_rows() || tensor.spec.num_elements() == 0,
              "no rank saves rows {}..{} of tensor {}", row, tensor.spec.num_rows(),
              tensor.spec.name);
}

}  // namespace

std::int64_t ShardTensor::num_rows() const {
  std::int64_t sum = 0;
  for (const StateSlice& slice : slices) sum += slice.rows.end - slice.rows.begin;
  return sum;
}

ShardContent collect(int rank, std::span<const StateView> views) {
  ShardContent content;
  for (const StateView& view : views) {
    require_valid(view.spec);
    const auto tensor_idx = static_cast<std::int64_t>(content.specs.size());
    content.specs.push_back(view.spec);
    if (view.spec.num_elements() == 0) continue;
    ShardTensor tensor{view.spec, tensor_idx, slices_to_write(rank, view), {}, 0};
    if (tensor.slices.empty()) continue;
    content.tensors.push_back(std::move(tensor));
  }
  return content;
}

std::int64_t bytes_of(const ShardContent& content) {
  std::int64_t bytes = 0;
  for (const ShardTensor& tensor : content.tensors) {
    for (const StateSlice& slice : tensor.slices) bytes += slice_bytes(tensor.spec, slice);
  }
  return bytes;
}

void copy_state(ShardContent& content, char* memory, Progress& progress) {
  for (ShardTensor& tensor : content.tensors) {
    for (StateSlice& slice : tensor.slices) {
      const std::int64_t bytes = slice_bytes(tensor.spec, slice);
      std::memcpy(memory, slice.data, static_cast<std::size_t>(bytes));
      slice.data = memory;
      memory += bytes;
      ++progress;
    }
  }
}

void hash_state(ShardContent& content, Progress& progress) {
  for (ShardTensor& tensor : content.tensors) hash_blocks(tensor, progress);
}

namespace {

/// xxh3 of a shard's file, whose rows are taken from memory: reading them back would cost more than
/// all hashing. The rest of it is read.
class FileHash {
 public:
  explicit FileHash(const std::filesystem::path& path)
      : path_(path), descriptor_(files::open_for_reading(path)) {}
  ~FileHash() { ::close(descriptor_); }
  FileHash(const FileHash&) = delete;
  FileHash& operator=(const FileHash&) = delete;

  void rows_at(std::int64_t offset, const void* data, std::int64_t bytes) {
    ARCUS_CHECK(offset >= at_, "{}: rows at byte {}, after byte {}", path_.string(), offset, at_);
    read_until(offset);
    hash_.update(data, static_cast<std::size_t>(bytes));
    at_ += bytes;
  }
  std::uint64_t finish(std::int64_t size) {
    read_until(size);
    return hash_.digest();
  }

 private:
  void read_until(std::int64_t end) {
    std::vector<char> bytes(static_cast<std::size_t>(end - at_));
    files::read_at(descriptor_, at_, bytes.data(), end - at_, path_);
    hash_.update(bytes.data(), bytes.size());
    at_ = end;
  }
  const std::filesystem::path& path_;
  int descriptor_;
  std::int64_t at_ = 0;
  StreamHash hash_;
};

std::uint64_t hash_shard(const std::filesystem::path& path, std::int64_t size,
                         const ShardContent& content, Progress& progress) {
  // Small tensors may stand in gaps before larger ones.
  std::vector<const ShardTensor*> tensors;
  for (const ShardTensor& tensor : content.tensors) tensors.push_back(&tensor);
  std::sort(tensors.begin(), tensors.end(),
            [](const ShardTensor* a, const ShardTensor* b) { return a->offset < b->offset; });
  FileHash hash(path);
  for (const ShardTensor* tensor : tensors) {
    std::int64_t offset = tensor->offset;
    for (const StateSlice& slice : tensor->slices) {
      hash.rows_at(offset, slice.data, slice_bytes(tensor->spec, slice));
      offset += slice_bytes(tensor->spec, slice);
      ++progress;
    }
  }
  return hash.finish(size);
}

void write_tensor(h5::File& file, ShardTensor& tensor, files::WriteBehind& disk,
                  Progress& progress) {
  h5::Shape shape{tensor.num_rows()};
  if (tensor.spec.shape.size() > 1) shape.push_back(tensor.spec.cols());
  h5::Dataset dataset = file.create_dataset(tensor.spec.name, tensor.spec.dtype, shape);
  tensor.offset = dataset.offset();
  const std::int64_t row_bytes = layout::row_bytes(tensor.spec);
  const std::int64_t most = std::max<std::int64_t>(1, kPieceBytes / row_bytes);
  std::int64_t row = 0;
  for (const StateSlice& slice : tensor.slices) {
    for (std::int64_t begin = slice.rows.begin; begin < slice.rows.end; begin += most) {
      const std::int64_t rows = std::min(most, slice.rows.end - begin);
      dataset.write_rows(
          row, rows, static_cast<const char*>(slice.data) + (begin - slice.rows.begin) * row_bytes);
      disk.wrote(tensor.offset + row * row_bytes, rows * row_bytes);
      row += rows;
      ++progress;
    }
  }
  // Hashes need the processor, while the disk works by itself.
  hash_blocks(tensor, progress);
}

}  // namespace

StoredFile write_shard(const std::filesystem::path& folder, int rank, std::int64_t step,
                       ShardContent& content, Progress& progress) {
  const std::filesystem::path path = folder / layout::shard_name(rank);
  h5::File file = h5::File::create(path, ExitCode::checkpoint);
  file.write_attribute("format", "arcus-shard");
  file.write_attribute("step", step);
  file.write_attribute("rank", std::int64_t{rank});
  {
    files::WriteBehind disk(path);
    for (ShardTensor& tensor : content.tensors) write_tensor(file, tensor, disk, progress);
  }
  file.close();
  auto synced = std::async(std::launch::async, [&] { files::sync(path); });
  const auto size = static_cast<std::int64_t>(std::filesystem::file_size(path));
  const std::uint64_t hash = hash_shard(path, size, content, progress);
  synced.get();
  ++progress;
  return {layout::shard_name(rank), size, hash};
}

std::string pack_report(const ShardContent& content, const StoredFile& file) {
  json report{{"table", hash_text(table_text(content.specs))},
              {"name", file.name},
              {"size", file.size},
              {"hash", file.hash},
              {"tensors", json::array()}};
  for (const ShardTensor& tensor : content.tensors) {
    json slices = json::array();
    for (const StateSlice& slice : tensor.slices) {
      slices.push_back({slice.rows.begin, slice.rows.end});
    }
    report["tensors"].push_back({{"tensor", tensor.tensor_idx},
                                 {"offset", tensor.offset},
                                 {"slices", std::move(slices)},
                                 {"hashes", tensor.block_hashes}});
  }
  std::string bytes;
  json::to_msgpack(report, bytes);
  return bytes;
}

Checkpoint assemble(std::span<const std::string> reports, std::span<const TensorSpec> specs) {
  Checkpoint checkpoint;
  for (const TensorSpec& spec : specs) {
    const auto blocks = spec.num_elements() == 0 ? 0 : num_blocks(spec);
    checkpoint.tensors.push_back(
        {spec, std::vector<std::uint64_t>(static_cast<std::size_t>(blocks)), {}});
  }
  const std::uint64_t table = hash_text(table_text(specs));
  for (std::size_t rank = 0; rank < reports.size(); ++rank) {
    const json report = json::from_msgpack(reports[rank]);
    ARCUS_CHECK(report.at("table").get<std::uint64_t>() == table,
                "ranks 0 and {} save different tensors", rank);
    checkpoint.files.push_back({report.at("name").get<std::string>(),
                                report.at("size").get<std::int64_t>(),
                                report.at("hash").get<std::uint64_t>()});
    for (const json& part : report.at("tensors")) {
      add_shard_tensor(checkpoint.tensors.at(part.at("tensor").get<std::size_t>()),
                       static_cast<std::int64_t>(rank), part);
    }
  }
  for (StoredTensor& tensor : checkpoint.tensors) require_coverage(tensor);
  return checkpoint;
}

}  // namespace arcus::writer
