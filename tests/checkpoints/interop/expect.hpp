#pragma once

#include <gtest/gtest.h>

#include <string>

#include "src/base/error.hpp"

namespace arcus::test {

/// The message of the Error that `fn` throws.
template <class Fn>
std::string error_of(Fn&& fn, ExitCode code = ExitCode::data) {
  try {
    fn();
  } catch (const Error& error) {
    EXPECT_EQ(static_cast<int>(error.code()), static_cast<int>(code)) << error.what();
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

#define EXPECT_CONTAINS(text, part)                          \
  EXPECT_NE(std::string(text).find(part), std::string::npos) \
      << "\"" << (text) << "\" does not mention \"" << (part) << "\""

}  // namespace arcus::test
