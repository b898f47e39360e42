#pragma once

#include <string>
#include <string_view>

namespace arcus {

/// Makes a stream of bytes printable: whole UTF-8 characters pass, a character that is not complete
/// yet waits for its other bytes, anything else becomes U+FFFD.
class Utf8Stream {
 public:
  /// What may be printed after `bytes` have come.
  std::string push(std::string_view bytes);
  /// What is left at the end: U+FFFD for an incomplete character.
  std::string finish();

 private:
  std::string pending_;
};

}  // namespace arcus
