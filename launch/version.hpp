#pragma once

#include <string>

namespace arcus {

/// Everything `arcus --version` says: version, commit, instruction sets, compiler, libraries.
std::string version_text();
/// "0.1.0 (1a2b3c4)".
std::string version_line();

}  // namespace arcus
