#include "launch/made_up_data.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <fstream>
#include <string>

#include "src/base/rng.hpp"
#include "src/data/prepare.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;

constexpr std::uint64_t kDocuments = 64;
constexpr std::uint64_t kCharacters = 16000;  ///< of a document

/// A document of characters from U+0020 to U+07FF: one or two bytes, so that most byte values
/// occur.
std::string made_up_text(const Rng& rng, std::uint64_t document, double repeated) {
  std::string text;
  for (std::uint64_t i = 0; i < kCharacters; ++i) {
    const auto words = rng.words(document, i);
    if (static_cast<double>(words[0]) < repeated * 0x1p32) {
      text += 'a';
    } else if (words[1] % 2 == 0 || repeated > 0) {
      text += static_cast<char>(' ' + words[2] % 95);
    } else {
      const std::uint32_t code = 0x80 + words[2] % (0x800 - 0x80);
      text += static_cast<char>(0xC0 | code >> 6);
      text += static_cast<char>(0x80 | (code & 0x3F));
    }
  }
  return text;
}

}  // namespace

MadeUpData::MadeUpData(Session& session, double repeated)
    : owner_(session.comm().node_local_rank() == 0) {
  // Ranks of one node share the folder, whose first rank names it; nodes may share a disk.
  const auto node = session.comm().split_by_node();
  const std::string name = broadcast_text(
      *node, session.stream(), fmt::format("arcus-bench-{}-{}", session.rank(), getpid()));
  dir_ = fs::temp_directory_path() / name;
  session.together([&] {
    if (owner_) write(repeated);
  });
}

MadeUpData::~MadeUpData() {
  std::error_code ignored;
  if (owner_) fs::remove_all(dir_, ignored);
}

void MadeUpData::write(double repeated) const {
  fs::create_directories(dir_ / "text");
  const Rng rng(1, "bench", "text");
  for (std::uint64_t document = 0; document < kDocuments; ++document) {
    std::ofstream(dir_ / "text" / fmt::format("{}.txt", document))
        << made_up_text(rng, document, repeated);
  }
  PrepareOptions options{.out = dir_ / "tokens", .force = true};
  options.domains = {{.name = "made-up", .paths = {(dir_ / "text").string()}}};
  prepare(options);
}

}  // namespace arcus
