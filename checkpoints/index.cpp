#include <nlohmann/json.hpp>
#include <numeric>

#include "checkpoints/files.hpp"
#include "checkpoints/layout.hpp"
#include "src/base/hash.hpp"
#include "src/base/hdf5.hpp"

namespace arcus::layout {
namespace {

using nlohmann::json;

constexpr const char* kFormatName = "arcus-checkpoint";
constexpr std::int64_t kRangeColumns = 6;
constexpr ExitCode kCode = ExitCode::checkpoint;

void write_bytes(h5::File& file, const std::string& name, std::string_view bytes) {
  file.write(name, {static_cast<std::int64_t>(bytes.size())},
             reinterpret_cast<const std::uint8_t*>(bytes.data()));
}

std::string read_bytes(const h5::File& file, const std::string& name) {
  const auto bytes = file.read<std::uint8_t>(name);
  return {bytes.begin(), bytes.end()};
}

/// A scalar cannot be virtual, so the index holds its value.
void copy_scalar(h5::File& file, const std::string& name, const StoredTensor& tensor,
                 const std::filesystem::path& folder) {
  ARCUS_CHECK(tensor.ranges.size() == 1, "scalar {} has {} ranges", tensor.spec.name,
              tensor.ranges.size());
  const StoredRange& range = tensor.ranges.front();
  const h5::File shard = h5::File::open(folder / shard_name(range.shard), kCode);
  std::vector<char> value(size_of(tensor.spec.dtype));
  shard.dataset(tensor.spec.name).read_rows(range.shard_row, 1, value.data());
  file.create_dataset(name, tensor.spec.dtype, {}).write_rows(0, 1, value.data());
}

void write_tensor(h5::File& file, const StoredTensor& tensor,
                  std::span<const std::int64_t> shard_rows, const std::filesystem::path& folder) {
  const TensorSpec& spec = tensor.spec;
  const std::string name = "tensors/" + spec.name;
  if (spec.shape.empty()) return copy_scalar(file, name, tensor, folder);
  if (tensor.ranges.empty()) {  // no elements
    file.create_dataset(name, spec.dtype, spec.shape);
    return;
  }
  std::vector<h5::VirtualSource> sources;
  for (const StoredRange& range : tensor.ranges) {
    sources.push_back({.file = shard_name(range.shard),
                       .dataset = spec.name,
                       .source_rows = shard_rows[static_cast<std::size_t>(range.shard)],
                       .source_begin = range.shard_row,
                       .begin = range.rows.begin,
                       .rows = range.rows.end - range.rows.begin});
  }
  file.create_virtual_dataset(name, spec.dtype, spec.shape, sources);
}

/// Rows of a tensor's dataset in each shard.
std::vector<std::int64_t> rows_by_shard(const StoredTensor& tensor, std::int64_t num_shards) {
  std::vector<std::int64_t> rows(static_cast<std::size_t>(num_shards), 0);
  for (const StoredRange& range : tensor.ranges) {
    rows[static_cast<std::size_t>(range.shard)] += range.rows.end - range.rows.begin;
  }
  return rows;
}

void write_tables(h5::File& file, const std::vector<StoredTensor>& tensors) {
  json table = json::array();
  std::vector<std::uint64_t> hashes;
  std::vector<std::int64_t> ranges;
  for (const StoredTensor& tensor : tensors) {
    table.push_back({{"name", tensor.spec.name},
                     {"dtype", name_of(tensor.spec.dtype)},
                     {"shape", tensor.spec.shape},
                     {"num_units", tensor.spec.num_units},
                     {"first_block", hashes.size()},
                     {"num_blocks", tensor.block_hashes.size()},
                     {"first_range", ranges.size() / kRangeColumns},
                     {"num_ranges", tensor.ranges.size()},
                     {"hash", hex(tensor.hash())}});
    hashes.insert(hashes.end(), tensor.block_hashes.begin(), tensor.block_hashes.end());
    for (const StoredRange& range : tensor.ranges) {
      const auto tensor_idx = static_cast<std::int64_t>(table.size()) - 1;
      ranges.insert(ranges.end(), {tensor_idx, range.rows.begin, range.rows.end - range.rows.begin,
                                   range.shard, range.shard_row, range.offset});
    }
  }
  write_bytes(file, "tensor_table", table.dump());
  file.write("block_hashes", {static_cast<std::int64_t>(hashes.size())}, hashes.data());
  file.write("ranges", {static_cast<std::int64_t>(ranges.size()) / kRangeColumns, kRangeColumns},
             ranges.data());
}

StoredTensor read_tensor(const json& row, std::span<const std::uint64_t> hashes,
                         std::span<const std::int64_t> ranges) {
  StoredTensor tensor;
  tensor.spec.name = row.at("name").get<std::string>();
  tensor.spec.dtype = dtype_from_name(row.at("dtype").get<std::string>());
  tensor.spec.shape = row.at("shape").get<std::vector<std::int64_t>>();
  tensor.spec.num_units = row.at("num_units").get<std::int64_t>();
  const auto blocks = hashes.subspan(row.at("first_block").get<std::size_t>(),
                                     row.at("num_blocks").get<std::size_t>());
  tensor.block_hashes.assign(blocks.begin(), blocks.end());
  const auto first = row.at("first_range").get<std::size_t>();
  for (std::size_t i = first; i < first + row.at("num_ranges").get<std::size_t>(); ++i) {
    const auto cell = ranges.subspan(i * kRangeColumns, kRangeColumns);
    tensor.ranges.push_back({{cell[1], cell[1] + cell[2]}, cell[3], cell[4], cell[5]});
  }
  return tensor;
}

void write_info(h5::File& file, const CheckpointInfo& info, std::uint64_t digest) {
  file.write_attribute("format", kFormatName);
  file.write_attribute("format_version", kFormatVersion);
  file.write_attribute("step", info.step);
  file.write_attribute("config", info.config_text);
  file.write_attribute("fingerprint", info.fingerprint);
  file.write_attribute("run_id", info.run_id);
  file.write_attribute("created_by", info.created_by);
  file.write_attribute("num_ranks", info.num_ranks);
  file.write_attribute("digest", hex(digest));
  for (const auto& [key, value] : info.extra) {
    ARCUS_CHECK(!key.empty() && key.find('/') == std::string::npos,
                "extra information of a checkpoint has the key \"{}\"", key);
    write_bytes(file, "extra/" + key, value);
  }
}

CheckpointInfo read_info(const h5::File& file) {
  CheckpointInfo info;
  info.step = file.int_attribute("step");
  info.config_text = file.text_attribute("config");
  info.fingerprint = file.text_attribute("fingerprint");
  info.run_id = file.text_attribute("run_id");
  info.created_by = file.text_attribute("created_by");
  info.num_ranks = file.int_attribute("num_ranks");
  constexpr std::string_view kPrefix = "extra/";
  for (const std::string& name : file.dataset_names()) {
    if (name.starts_with(kPrefix)) {
      info.extra[name.substr(kPrefix.size())] = read_bytes(file, name);
    }
  }
  return info;
}

void require_format(const h5::File& file) {
  ARCUS_REQUIRE(file.has_attribute("format") && file.text_attribute("format") == kFormatName, kCode,
                "{} is no Arcus checkpoint", file.path().string());
  const std::int64_t version = file.int_attribute("format_version");
  ARCUS_REQUIRE(version == kFormatVersion, kCode,
                "{} has format version {}, this program reads {}; use the Arcus that wrote it",
                file.path().string(), version, kFormatVersion);
}

}  // namespace

void write_index(const std::filesystem::path& folder, const Checkpoint& checkpoint) {
  h5::File file = h5::File::create(folder / kIndexName, kCode);
  write_info(file, checkpoint.info, checkpoint.digest());
  for (const StoredTensor& tensor : checkpoint.tensors) {
    write_tensor(file, tensor, rows_by_shard(tensor, checkpoint.info.num_ranks), folder);
  }
  write_tables(file, checkpoint.tensors);
  file.close();
}

void read_index(Checkpoint& checkpoint) {
  const h5::File file = h5::File::open(checkpoint.path / kIndexName, kCode);
  require_format(file);
  checkpoint.info = read_info(file);
  const auto hashes = file.read<std::uint64_t>("block_hashes");
  const auto ranges = file.read<std::int64_t>("ranges");
  try {
    for (const json& row : json::parse(read_bytes(file, "tensor_table"))) {
      checkpoint.tensors.push_back(read_tensor(row, hashes, ranges));
    }
  } catch (const json::exception& error) {
    ARCUS_FAIL(kCode, "{}: the tensor table is no valid JSON: {}", file.path().string(),
               error.what());
  }
}

}  // namespace arcus::layout
