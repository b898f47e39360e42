#include "checkpoints/inspect.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "checkpoints/layout.hpp"
#include "src/base/hash.hpp"

namespace arcus {
namespace {

using nlohmann::json;

/// Short and printable; the tokenizer's model, for one, is not.
bool shown_as_text(const std::string& value) {
  constexpr std::size_t kLongest = 200;
  return value.size() <= kLongest && std::all_of(value.begin(), value.end(), [](char c) {
           return static_cast<unsigned char>(c) >= 0x20 && static_cast<unsigned char>(c) < 0x7f;
         });
}

std::int64_t num_elements(const Checkpoint& checkpoint) {
  std::int64_t sum = 0;
  for (const StoredTensor& tensor : checkpoint.tensors) sum += tensor.spec.num_elements();
  return sum;
}

std::string human_bytes(std::int64_t bytes) {
  if (bytes < (1 << 10)) return fmt::format("{} B", bytes);
  double value = static_cast<double>(bytes) / 1024;
  for (const char* unit : {"KiB", "MiB", "GiB"}) {
    if (value < 1024) return fmt::format("{:.1f} {}", value, unit);
    value /= 1024;
  }
  return fmt::format("{:.1f} TiB", value);
}

json tensor_json(const StoredTensor& tensor) {
  json result{{"name", tensor.spec.name},
              {"dtype", name_of(tensor.spec.dtype)},
              {"shape", tensor.spec.shape},
              {"bytes", tensor.bytes()},
              {"hash", hex(tensor.hash())}};
  if (tensor.spec.num_units > 1) {
    for (std::int64_t unit = 0; unit < tensor.spec.num_units; ++unit) {
      result["unit_hashes"].push_back(hex(tensor.unit_hash(unit)));
    }
  }
  return result;
}

}  // namespace

std::string describe_text(const Checkpoint& checkpoint) {
  const CheckpointInfo& info = checkpoint.info;
  std::string text = fmt::format(
      "checkpoint   {}\nstep         {}\nrun          {}\nwritten by   {}, {} rank{}\n"
      "fingerprint  {}\ntensors      {}, {} elements, {}\ndigest       {}\n",
      checkpoint.path.string(), info.step, info.run_id, info.created_by, info.num_ranks,
      info.num_ranks == 1 ? "" : "s", info.fingerprint, checkpoint.tensors.size(),
      num_elements(checkpoint), human_bytes(checkpoint.bytes()), hex(checkpoint.digest()));
  for (const auto& [key, value] : info.extra) {
    text += fmt::format("{:<12} {}\n", key,
                        shown_as_text(value) ? value : fmt::format("{} bytes", value.size()));
  }
  std::size_t width = 0;
  for (const StoredTensor& tensor : checkpoint.tensors) {
    width = std::max(width, tensor.spec.name.size());
  }
  for (const StoredTensor& tensor : checkpoint.tensors) {
    text += fmt::format("{:<{}}  {:<4}  {:<16}  {:>10}  {}\n", tensor.spec.name, width,
                        name_of(tensor.spec.dtype), layout::shape_text(tensor.spec),
                        human_bytes(tensor.bytes()), hex(tensor.hash()));
  }
  return text;
}

json describe_json(const Checkpoint& checkpoint) {
  const CheckpointInfo& info = checkpoint.info;
  json result{{"path", checkpoint.path.string()},
              {"step", info.step},
              {"run_id", info.run_id},
              {"created_by", info.created_by},
              {"num_ranks", info.num_ranks},
              {"fingerprint", info.fingerprint},
              {"config", info.config_text},
              {"digest", hex(checkpoint.digest())},
              {"bytes", checkpoint.bytes()},
              {"num_elements", num_elements(checkpoint)},
              {"extra", json::object()},
              {"tensors", json::array()}};
  for (const auto& [key, value] : info.extra) {
    result["extra"][key] = shown_as_text(value) ? json(value) : json{{"bytes", value.size()}};
  }
  for (const StoredTensor& tensor : checkpoint.tensors) {
    result["tensors"].push_back(tensor_json(tensor));
  }
  return result;
}

std::uint64_t checkpoint_digest(const std::filesystem::path& path, bool verify) {
  const Checkpoint checkpoint = open_checkpoint(path);
  if (verify) verify_checkpoint(checkpoint);
  return checkpoint.digest();
}

}  // namespace arcus
