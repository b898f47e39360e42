#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "src/base/error.hpp"
#include "src/data/prepare.hpp"
#include "tests/support/temporary_folder.hpp"

namespace arcus::testing {

/// A folder of its own for one test, and files in it.
class TempDir {
 public:
  std::filesystem::path operator/(const std::string& name) const { return folder_.path() / name; }

  std::string write(const std::string& name, const std::string& content) const {
    const auto path = folder_.path() / name;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path, std::ios::binary) << content;
    return path.string();
  }

 private:
  TemporaryFolder folder_;
};

inline std::string read_file(const std::filesystem::path& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

/// The exit code and message of the arcus::Error that `action` throws; fails when it throws none.
struct Failure {
  ExitCode code = ExitCode::ok;
  std::string message;
};
inline Failure failure_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return {error.code(), error.what()};
  }
  ADD_FAILURE() << "no error was thrown";
  return {};
}
inline void expect_failure(ExitCode code, const std::vector<std::string>& words,
                           const std::function<void()>& action) {
  const Failure failure = failure_of(action);
  EXPECT_EQ(static_cast<int>(failure.code), static_cast<int>(code)) << failure.message;
  for (const std::string& word : words) {
    EXPECT_NE(failure.message.find(word), std::string::npos)
        << "\"" << word << "\" is missing in: " << failure.message;
  }
}

inline void append_utf8(char32_t c, std::string& text) {
  const auto put = [&](std::uint32_t byte) { text.push_back(static_cast<char>(byte)); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xC0 | (c >> 6));
    put(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    put(0xE0 | (c >> 12));
    put(0x80 | ((c >> 6) & 0x3F));
    put(0x80 | (c & 0x3F));
  } else {
    put(0xF0 | (c >> 18));
    put(0x80 | ((c >> 12) & 0x3F));
    put(0x80 | ((c >> 6) & 0x3F));
    put(0x80 | (c & 0x3F));
  }
}

/// Valid UTF-8 without NUL that dwells on what tokenizers get wrong.
inline std::string random_text(std::mt19937_64& random, std::size_t code_points) {
  static const std::vector<std::string> hard{
      " ",
      "  ",
      "\n",
      "\r\n",
      "\t",
      "\r",
      "\v\f",
      "\x01",
      "\x7F",
      "0123456789",
      "  \n",
      "the ",
      "\xC2\xA0",
      "\xE2\x96\x81",
      "\xE2\x96\x81\xE2\x96\x81",
      "\xE2\x96\x82",
      "\xE2\x81\x87",
      "\xEF\xBB\xBF",
      "\xEF\xBF\xBD",
      "\xEF\xAC\x81",
      "e\xCC\x81",
      "\xE3\x80\x80",
      "\xE2\x80\x8B",
      "\xF0\x9F\x91\xA8\xE2\x80\x8D\xF0\x9F\x91\xA9\xE2\x80\x8D\xF0\x9F\x91\xA7",
      "</s>",
      "<unk>",
      "<0x41>",
      "\xE4\xB8\xAD\xE6\x96\x87",
      "\xD0\x9F\xD1\x80\xD0\xB8",
      "for (;;) {\n"};
  std::string text;
  for (std::size_t i = 0; i < code_points; ++i) {
    switch (random() % 4) {
      case 0:
        text += hard[random() % hard.size()];
        break;
      case 1:
        append_utf8(static_cast<char32_t>(1 + random() % 0x7F), text);
        break;
      case 2:
        append_utf8(static_cast<char32_t>(1 + random() % 0xD7FF), text);
        break;
      default:
        append_utf8(static_cast<char32_t>(0xE000 + random() % (0x110000 - 0xE000)), text);
    }
  }
  return text;
}

/// Repeatable text with words, digits and indentation, at least `bytes` long.
inline std::string plain_text(std::uint64_t seed, std::size_t bytes) {
  static const std::vector<std::string> words{
      "the",  "router", "sends",   "tokens", "to", "experts", "and",    "back", "again",
      "with", "its",    "weights", "1984",   "42", "if (x)",  "return", "while"};
  std::mt19937_64 random(seed);
  std::string text;
  while (text.size() < bytes) {
    text += words[random() % words.size()];
    text += random() % 9 == 0 ? (random() % 4 == 0 ? "\n\n" : ".\n    ") : " ";
  }
  return text;
}

}  // namespace arcus::testing
