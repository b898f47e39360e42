#pragma once

#include <string>

namespace arcus {

/// Everything `arcus --version` says: version, commit, instruction sets, compiler, libraries.
std::string version_text();
/// The instruction set in use and the matrix library, which bits depend on.
std::string arithmetic_libraries();
/// "0.1.0 (1a2b3c4)".
std::string version_line();

}  // namespace arcus
