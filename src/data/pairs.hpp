#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace arcus {

/// A piece of a document's text. Nothing is learned from the tokens of one that is not `learned`:
/// they are read, but never a target.
struct TextPart {
  std::string text;
  bool learned = true;
};

/// How prompts and answers become text: what is written in place of {system}, {prompt} and
/// {answer}; "\n", "\t" and "\\" stand for the characters, "{{" and "}}" for braces. What leads up
/// to {system}, and itself, is written once, where there is a system text; the rest once for every
/// turn. The answer and what follows it are learned.
class PairTemplate {
 public:
  static constexpr const char* kPlain = "{system}{prompt}{answer}";

  /// Throws (usage) unless {prompt} and {answer} occur once, in this order, and {system}, if at
  /// all, once before them.
  explicit PairTemplate(const std::string& text);

  struct Turn {
    std::string prompt, answer;
  };
  /// Neighbouring parts differ in `learned`; none is empty. Throws (data) where there is a system
  /// text and no place for it.
  std::vector<TextPart> render(const std::string& system, const std::vector<Turn>& turns) const;
  /// What an answer follows, without a system text.
  std::string prompt(const std::string& text) const {
    return before_prompt_ + text + before_answer_;
  }

 private:
  bool has_system_ = false;
  std::string before_system_, before_prompt_, before_answer_, after_answer_;
};

/// The parts of one line of a file of pairs: a JSON object with texts "prompt" and "answer" and
/// perhaps "system", or with "messages", a list of {"role", "content"} where user and assistant
/// take turns, perhaps after one of system, the last one of assistant. Other keys are left alone.
/// Throws (data) saying what else it is.
std::vector<TextPart> read_pair(std::string_view line, const PairTemplate& how);

}  // namespace arcus
