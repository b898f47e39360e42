#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "src/base/dtype.hpp"

namespace arcus {

enum class Split { train, valid };
inline constexpr std::array<Split, 2> kSplits{Split::train, Split::valid};
const char* name_of(Split split);

/// What dataset.json records of one token file (FORMAT.md).
struct FileRecord {
  std::string file;             ///< name inside the data set's folder
  std::int64_t file_bytes = 0;  ///< size of the file
  DType dtype = DType::u16;     ///< of the tokens
  std::int64_t num_tokens = 0;
  std::optional<std::int64_t> num_targets;  ///< tokens that may be learned; nothing: all of them
  std::int64_t num_documents = 0;
  std::int64_t num_bytes = 0;       ///< text that the tokens stand for
  std::int64_t tokens_offset = 0;   ///< where the tokens begin in the file
  std::uint64_t tokens_hash = 0;    ///< xxh3 of the tokens
  std::uint64_t metadata_hash = 0;  ///< xxh3 of the file's other bytes
  std::int64_t tokens_end() const {
    return tokens_offset + num_tokens * static_cast<std::int64_t>(size_of(dtype));
  }
};

struct DomainRecord {
  std::string name;
  FileRecord train, valid;
  const FileRecord& file(Split split) const { return split == Split::train ? train : valid; }
};

/// A data set's table of contents, the file dataset.json.
struct Manifest {
  static constexpr std::int64_t kVersion = 1;
  /// Where some tokens must not be learned, which programs that know version 1 would not see.
  static constexpr std::int64_t kVersionWithTargets = 2;
  std::string tokenizer_kind;
  std::string tokenizer_file;  ///< "" when the kind needs none
  std::uint64_t tokenizer_hash = 0;
  std::int64_t vocab_size = 0;
  std::int32_t eos_id = 0;
  std::string made_by;        ///< how `prepare` was asked to make it: for people
  std::string pair_template;  ///< of its pairs; "" where there are none
  std::vector<DomainRecord> domains;

  /// Writes `dir`/dataset.json, which carries a hash of its own content.
  void save(const std::filesystem::path& dir) const;
  /// Throws (data) naming the file when it is missing, damaged or of another version.
  static Manifest load(const std::filesystem::path& dir);
};

/// Columns of `target_spans`: first token, end, learned tokens before.
inline constexpr std::int64_t kSpanColumns = 3;

/// xxh3 of all bytes of `path` but [begin, end).
std::uint64_t hash_file_without(const std::filesystem::path& path, std::int64_t begin,
                                std::int64_t end);

}  // namespace arcus
