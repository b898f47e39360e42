#include "launch/portable.hpp"

#include <algorithm>

#include "launch/adapters.hpp"
#include "src/base/error.hpp"

namespace arcus {

PortableModel portable_model(const Config& config, const ModelConfig& resolved) {
  return {.model = resolved,
          .routing = config.routing,
          .overrides = resolve_overrides(config),
          .context_length = std::max(resolved.max_positions, config.train.seq_len)};
}

ModelConfig stored_model(const Checkpoint& checkpoint, const Config& config) {
  const StoredTensor* embedding = checkpoint.find("model.embed_tokens.weight");
  ARCUS_REQUIRE(embedding != nullptr, ExitCode::checkpoint, "{} holds no model",
                checkpoint.path.string());
  return resolve(config.model, embedding->spec.shape[0]);
}

std::string why_not_exportable(const Config& config, const ModelConfig& resolved) {
  const PortableModel model = portable_model(config, resolved);
  std::string reason;
  for (const Target target : {Target::hf, Target::gguf}) {
    try {
      choose_family(model, target);
      return {};
    } catch (const Error& error) {
      if (reason.empty()) reason = error.what();
    }
  }
  return reason;
}

std::unique_ptr<Tokenizer> stored_tokenizer(const CheckpointInfo& info) {
  const auto kind = info.extra.find(extra_key::kTokenizerKind);
  const auto stored = info.extra.find(extra_key::kTokenizer);
  if (kind == info.extra.end() || stored == info.extra.end()) return nullptr;
  return load_tokenizer(kind->second, stored->second);
}

UnitReader read_from(const Checkpoint& checkpoint, const LoraConfig& lora) {
  auto reader = std::make_shared<TensorReader>(checkpoint);
  return [reader, lora, &checkpoint](const ModelUnit& unit, std::span<float> out) {
    const StoredTensor* tensor = checkpoint.find(unit.tensor);
    ARCUS_REQUIRE(tensor != nullptr, ExitCode::checkpoint, "{} has no tensor {}",
                  checkpoint.path.string(), unit.tensor);
    ARCUS_REQUIRE(tensor->spec.dtype == DType::f32, ExitCode::checkpoint,
                  "{}: {} is stored as {}, not f32", checkpoint.path.string(), unit.tensor,
                  name_of(tensor->spec.dtype));
    const std::int64_t rows = tensor->spec.unit_rows();
    ARCUS_REQUIRE(std::ssize(out) == rows * tensor->spec.cols(), ExitCode::checkpoint,
                  "{}: {} has {} numbers a unit, the configuration asks for {}",
                  checkpoint.path.string(), unit.tensor, rows * tensor->spec.cols(), out.size());
    reader->read(*tensor, {unit.unit * rows, (unit.unit + 1) * rows}, out.data());
    const auto adapters = StoredAdapters::find(checkpoint, lora, tensor->spec);
    if (adapters) adapters->merge(*reader, unit.unit, out);
  };
}

}  // namespace arcus
