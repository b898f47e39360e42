#include "launch/adapters.hpp"

#include <vector>

#include "src/base/error.hpp"
#include "src/model/lora.hpp"

namespace arcus {
namespace {

std::vector<float> read_unit(TensorReader& reader, const StoredTensor& tensor, std::int64_t unit) {
  const std::int64_t rows = tensor.spec.unit_rows();
  std::vector<float> values(static_cast<std::size_t>(rows * tensor.spec.cols()));
  reader.read(tensor, {unit * rows, (unit + 1) * rows}, values.data());
  return values;
}

}  // namespace

std::optional<StoredAdapters> StoredAdapters::find(const Checkpoint& checkpoint,
                                                   const LoraConfig& lora,
                                                   const TensorSpec& weight) {
  if (!weight.name.ends_with(".weight")) return std::nullopt;
  const StoredTensor* a = checkpoint.find(lora_a_name(weight.name));
  const StoredTensor* b = checkpoint.find(lora_b_name(weight.name));
  if (a == nullptr && b == nullptr) return std::nullopt;
  const auto fits = [&](const StoredTensor* tensor, std::int64_t rows, std::int64_t cols) {
    return tensor != nullptr && tensor->spec.dtype == DType::f32 &&
           tensor->spec.num_units == weight.num_units && tensor->spec.unit_rows() == rows &&
           tensor->spec.cols() == cols;
  };
  ARCUS_REQUIRE(weight.dtype == DType::f32 && fits(a, lora.rank, weight.cols()) &&
                    fits(b, weight.unit_rows(), lora.rank),
                ExitCode::checkpoint,
                "{}: the adapters of {} are not a pair of rank {} that fits it",
                checkpoint.path.string(), weight.name, lora.rank);
  return StoredAdapters(*a, *b, lora.scale());
}

void StoredAdapters::merge(TensorReader& reader, std::int64_t unit, std::span<float> w) const {
  const std::vector<float> a = read_unit(reader, *a_, unit);
  const std::vector<float> b = read_unit(reader, *b_, unit);
  merge_lora(w, w, a, b, b_->spec.unit_rows(), a_->spec.cols(), a_->spec.unit_rows(), scale_);
}

}  // namespace arcus
