#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "src/base/hash.hpp"
#include "src/data/manifest.hpp"

namespace arcus {

/// What a token file says of itself (attributes, FORMAT.md).
struct TokenFileInfo {
  std::string domain;
  Split split = Split::train;
  std::uint64_t tokenizer_hash = 0;
  std::int64_t vocab_size = 0;
  std::int32_t eos_id = 0;
  bool masked = false;  ///< it says which tokens are learned
};

/// The narrowest type for ids below vocab_size.
DType token_dtype(std::int64_t vocab_size);

/// Writes one token file, document by document. A contiguous HDF5 dataset needs its length first,
/// so tokens go to a spool file beside it and are copied when they are all there; memory holds
/// 16 bytes a document, and 24 a learned span.
class TokenWriter {
 public:
  TokenWriter(std::filesystem::path dir, TokenFileInfo info);

  /// Tokens of the current document, without EOS. All are learned unless the file is masked.
  void append(std::span<const std::int32_t> ids, bool learned = true);
  /// Ends the document, whose text has `bytes` bytes, with EOS, which is learned.
  void end_document(std::int64_t bytes);
  /// Writes the file, removes the spool and says what dataset.json has to record.
  FileRecord finish();

 private:
  template <class T>
  void append_as(std::span<const std::int32_t> ids);
  void write_spool(const void* data, std::size_t bytes);
  void write_file(const FileRecord& record);
  std::filesystem::path spool_path() const { return dir_ / (name_ + ".spool"); }

  struct CloseFile {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  std::filesystem::path dir_;
  TokenFileInfo info_;
  std::string name_;
  DType dtype_;
  std::unique_ptr<std::FILE, CloseFile> spool_;
  StreamHash hash_;
  std::vector<char> buffer_;
  std::vector<std::int64_t> document_offsets_{0};
  std::vector<std::int64_t> document_bytes_;
  std::vector<std::int64_t> spans_;  ///< of learned tokens: begin, end, learned ones before
  std::int64_t num_tokens_ = 0;
  std::int64_t num_targets_ = 0;
};

}  // namespace arcus
