#include "src/train/batch.hpp"

#include <algorithm>

namespace arcus {

BatchBuffers::BatchBuffers(std::int64_t max_seqs, std::int64_t seq_len) : seq_len_(seq_len) {
  const auto tokens = static_cast<std::size_t>(max_seqs * seq_len);
  tokens_.resize(static_cast<std::size_t>(seq_len) + 1);
  sequence_offsets_.resize(static_cast<std::size_t>(max_seqs) + 1);
  for (auto* buffer : {&ids_, &targets_, &position_, &first_key_}) buffer->resize(tokens);
  for (std::size_t t = 0; t < tokens; ++t) {
    position_[t] = static_cast<std::int32_t>(static_cast<std::int64_t>(t) % seq_len);
  }
}

MicroBatch BatchBuffers::view(std::int64_t number, std::int64_t num_seqs) {
  for (std::size_t s = 0; s < sequence_offsets_.size(); ++s) {
    sequence_offsets_[s] = static_cast<std::int64_t>(s) * seq_len_;
  }
  const std::int64_t tokens = num_seqs * seq_len_;
  const auto row = [&](const std::vector<std::int32_t>& buffer) {
    return ConstTensorView(buffer.data(), DType::i32, 1, tokens);
  };
  return {.number = number,
          .num_seqs = num_seqs,
          .seq_len = seq_len_,
          .first_token = std::max<std::int64_t>(0, number) * static_cast<std::int64_t>(ids_.size()),
          .sequence_offsets = {sequence_offsets_.data(), static_cast<std::size_t>(num_seqs) + 1},
          .ids = row(ids_),
          .targets = row(targets_),
          .position = row(position_),
          .first_key = row(first_key_)};
}

MicroBatch BatchBuffers::fill(const BatchSampler& sampler, std::int64_t number,
                              std::int64_t num_seqs, std::int64_t first_sample) {
  const auto length = static_cast<std::size_t>(seq_len_);
  for (std::int64_t s = 0; s < num_seqs; ++s) {
    const auto at = static_cast<std::size_t>(s * seq_len_);
    sampler.sample(first_sample + s, tokens_, std::span(first_key_).subspan(at, length),
                   std::span(targets_).subspan(at, length));
    std::copy(tokens_.begin(), tokens_.end() - 1, ids_.begin() + static_cast<std::ptrdiff_t>(at));
  }
  return view(number, num_seqs);
}

MicroBatch BatchBuffers::fill(const EvalSampler& sampler, std::int64_t number,
                              std::int64_t num_seqs, std::int64_t first_window,
                              std::int64_t& num_targets, std::int64_t& target_bytes) {
  const auto length = static_cast<std::size_t>(seq_len_);
  for (std::int64_t s = 0; s < num_seqs; ++s) {
    const auto at = static_cast<std::size_t>(s * seq_len_);
    const auto targets = std::span(targets_).subspan(at, length);
    target_bytes += sampler.sample(first_window + s, std::span(ids_).subspan(at, length), targets,
                                   std::span(first_key_).subspan(at, length));
    num_targets += std::count_if(targets.begin(), targets.end(), [](auto id) { return id >= 0; });
  }
  MicroBatch batch = view(number, num_seqs);
  batch.num_padding_tokens = seq_len_ - sampler.num_real_tokens(first_window + num_seqs - 1);
  sequence_offsets_[static_cast<std::size_t>(num_seqs)] = batch.num_real_tokens();
  return batch;
}

MicroBatch BatchBuffers::fill(std::span<const std::int32_t> ids,
                              std::span<const std::int32_t> targets, std::int64_t number) {
  std::copy(ids.begin(), ids.end(), ids_.begin());
  std::copy(targets.begin(), targets.end(), targets_.begin());
  std::fill(first_key_.begin(), first_key_.end(), 0);
  return view(number, static_cast<std::int64_t>(ids.size()) / seq_len_);
}

MicroBatch BatchBuffers::idle() { return view(-1, 0); }

}  // namespace arcus
