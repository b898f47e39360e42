#include "checkpoints/interop/export_model.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "checkpoints/files.hpp"
#include "checkpoints/interop/gguf_config.hpp"
#include "checkpoints/interop/safetensors.hpp"
#include "src/base/error.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;

FileType type_of(const PlannedTensor& tensor, const ExportSource& source) {
  return tensor.always_f32 ? FileType::f32 : source.type;
}

std::vector<FileTensor> described(std::span<const PlannedTensor> plan, const ExportSource& source) {
  std::vector<FileTensor> tensors;
  for (const PlannedTensor& planned : plan) {
    const FileType type = type_of(planned, source);
    tensors.push_back({.name = planned.name,
                       .type = type,
                       .shape = planned.shape,
                       .bytes = bytes_of(type, planned.num_elements())});
  }
  return tensors;
}

/// Turns planned tensors into bytes, unit by unit.
class TensorEncoder {
 public:
  TensorEncoder(const ExportSource& source, const ExportProgress& progress, std::int64_t all_bytes)
      : source_(source), progress_(progress), all_bytes_(all_bytes) {
    for (const TensorSpec& spec : portable_tensors(source.model)) specs_.emplace(spec.name, spec);
  }

  template <class Writer>
  void write(const PlannedTensor& planned, Writer& writer) {
    const FileType type = type_of(planned, source_);
    if (!planned.constants.empty()) {
      put(encode(type, planned.constants, planned.name), writer);
    } else if (planned.pieces.empty()) {
      write_zeros(bytes_of(type, planned.num_elements()), writer);
    }
    for (const ModelUnit& piece : planned.pieces) {
      const TensorSpec& spec = specs_.at(piece.tensor);
      values_.resize(static_cast<std::size_t>(spec.num_elements() / spec.num_units));
      source_.read(piece, values_);
      if (planned.paired_head_dim > 0) pair_rows(planned.paired_head_dim, spec.cols(), values_);
      if (planned.shift_to_zero) shift(values_);
      put(encode(type, values_, planned.name), writer);
    }
  }

  /// b - min(b), where that is below zero.
  static void shift(std::vector<float>& values) {
    const float least = *std::ranges::min_element(values);
    if (least >= 0) return;
    for (float& value : values) value -= least;
  }

 private:
  template <class Writer>
  void put(std::string_view bytes, Writer& writer) {
    writer.write(bytes);
    done_bytes_ += std::ssize(bytes);
    if (progress_) progress_(done_bytes_, all_bytes_);
  }
  template <class Writer>
  void write_zeros(std::int64_t bytes, Writer& writer) {
    const std::string zeros(static_cast<std::size_t>(std::min<std::int64_t>(bytes, 1 << 20)), '\0');
    for (std::int64_t left = bytes; left > 0; left -= std::ssize(zeros)) {
      put(std::string_view(zeros).substr(0, static_cast<std::size_t>(left)), writer);
    }
  }

  const ExportSource& source_;
  const ExportProgress& progress_;
  std::int64_t all_bytes_;
  std::int64_t done_bytes_ = 0;
  std::map<std::string, TensorSpec> specs_;
  std::vector<float> values_;
};

std::vector<PlannedTensor> plan_of(const ExportSource& source, Target target) {
  return target == Target::hf
             ? hf_tensors(source.model, *source.family, written_spelling(*source.family))
             : gguf_tensors(source.model, *source.family);
}

/// The plan cut where a shard is full; a tensor is never cut.
std::vector<std::span<const PlannedTensor>> cut_into_shards(std::span<const PlannedTensor> plan,
                                                            const ExportSource& source,
                                                            std::int64_t shard_bytes) {
  std::vector<std::span<const PlannedTensor>> shards;
  std::size_t begin = 0;
  std::int64_t bytes = 0;
  for (std::size_t i = 0; i < plan.size(); ++i) {
    const std::int64_t more = bytes_of(type_of(plan[i], source), plan[i].num_elements());
    if (bytes > 0 && bytes + more > shard_bytes) {
      shards.push_back(plan.subspan(begin, i - begin));
      begin = i;
      bytes = 0;
    }
    bytes += more;
  }
  shards.push_back(plan.subspan(begin));
  return shards;
}

void write_index(const fs::path& directory, std::int64_t bytes,
                 const std::map<std::string, std::string>& file_of) {
  const nlohmann::ordered_json index{{"metadata", {{"total_size", bytes}}},
                                     {"weight_map", file_of}};
  files::write_synced(directory / "model.safetensors.index.json", index.dump(2) + "\n");
}

const char* torch_dtype(FileType type) {
  return type == FileType::f32 ? "float32" : type == FileType::bf16 ? "bfloat16" : "float16";
}

std::int32_t eos_of(const ExportSource& source) {
  return source.tokenizer != nullptr ? source.tokenizer->eos_id() : -1;
}

}  // namespace

std::int64_t export_bytes(const ExportSource& source, Target target) {
  std::int64_t bytes = 0;
  for (const FileTensor& tensor : described(plan_of(source, target), source)) bytes += tensor.bytes;
  return bytes;
}

void write_hf(const ExportSource& source, const fs::path& directory, const ExportProgress& progress,
              std::int64_t shard_bytes) {
  files::write_synced(
      directory / "config.json",
      hf_config_text(source.model, *source.family, torch_dtype(source.type), eos_of(source)));
  files::write_synced(directory / "generation_config.json",
                      hf_generation_config_text(eos_of(source)));
  if (source.tokenizer != nullptr) {
    for (const auto& [name, text] :
         hf_tokenizer_files(*source.tokenizer, source.model.model.vocab_size)) {
      files::write_synced(directory / name, text);
    }
  }
  std::vector<PlannedTensor> plan = plan_of(source, Target::hf);
  // Wide numbers first, so that none starts where a narrow one's odd count ends.
  std::ranges::stable_partition(plan, &PlannedTensor::always_f32);
  const auto shards = cut_into_shards(plan, source, shard_bytes);
  const std::int64_t bytes = export_bytes(source, Target::hf);
  TensorEncoder encoder(source, progress, bytes);
  std::map<std::string, std::string> file_of;
  for (std::size_t i = 0; i < shards.size(); ++i) {
    const std::string name =
        shards.size() == 1 ? "model.safetensors"
                           : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
    SafetensorsWriter writer(directory / name, described(shards[i], source));
    for (const PlannedTensor& planned : shards[i]) {
      encoder.write(planned, writer);
      file_of[planned.name] = name;
    }
    writer.finish();
  }
  if (shards.size() > 1) write_index(directory, bytes, file_of);
}

void write_gguf(const ExportSource& source, const fs::path& file, const ExportProgress& progress) {
  GgufKeys keys = gguf_model_keys(source.model, *source.family, source.type, source.name);
  if (source.tokenizer != nullptr) {
    for (auto& key : gguf_tokenizer_keys(*source.tokenizer, source.model.model.vocab_size)) {
      keys.push_back(std::move(key));
    }
  } else {
    keys.emplace_back("tokenizer.ggml.model", std::string("none"));
  }
  const std::vector<PlannedTensor> plan = plan_of(source, Target::gguf);
  TensorEncoder encoder(source, progress, export_bytes(source, Target::gguf));
  GgufWriter writer(file, keys, described(plan, source));
  for (const PlannedTensor& planned : plan) encoder.write(planned, writer);
  writer.finish();
}

}  // namespace arcus
