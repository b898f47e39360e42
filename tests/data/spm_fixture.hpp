#pragma once

#include <sentencepiece_trainer.h>

#include <string>
#include <unordered_map>

#include "tests/data/tokenizer_fixture.hpp"

namespace arcus::testing {

/// A tokenizer.model as others make them: in the way of Llama 2, with `changes` to the trainer's
/// arguments.
inline std::string train_foreign_spm(
    const std::unordered_map<std::string, std::string>& changes = {}) {
  std::unordered_map<std::string, std::string> arguments{{"model_type", "bpe"},
                                                         {"vocab_size", "700"},
                                                         {"character_coverage", "0.98"},
                                                         {"byte_fallback", "true"},
                                                         {"split_digits", "true"},
                                                         {"allow_whitespace_only_pieces", "true"},
                                                         {"normalization_rule_name", "identity"},
                                                         {"remove_extra_whitespaces", "false"},
                                                         {"unk_id", "0"},
                                                         {"bos_id", "1"},
                                                         {"eos_id", "2"},
                                                         {"pad_id", "-1"},
                                                         {"num_threads", "1"},
                                                         {"minloglevel", "2"}};
  for (const auto& [name, value] : changes) arguments[name] = value;
  std::vector<std::string> lines;
  std::istringstream stream(training_text());
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  class Lines final : public sentencepiece::SentenceIterator {
   public:
    explicit Lines(const std::vector<std::string>& lines) : lines_(lines) {}
    bool done() const override { return next_ >= lines_.size(); }
    void Next() override { ++next_; }
    const std::string& value() const override { return lines_[next_]; }
    sentencepiece::util::Status status() const override { return {}; }

   private:
    const std::vector<std::string>& lines_;
    std::size_t next_ = 0;
  } iterator(lines);
  std::string model;
  const auto status = sentencepiece::SentencePieceTrainer::Train(arguments, &iterator, &model);
  EXPECT_TRUE(status.ok()) << status.ToString();
  return model;
}

}  // namespace arcus::testing
