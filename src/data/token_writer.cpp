#include "src/data/token_writer.hpp"

#include <cerrno>
#include <cstring>
#include <numeric>

#include "src/base/error.hpp"
#include "src/base/hdf5.hpp"
#include "src/data/mapped_file.hpp"

namespace arcus {

DType token_dtype(std::int64_t vocab_size) {
  return vocab_size <= (std::int64_t{1} << 16) ? DType::u16 : DType::u32;
}

TokenWriter::TokenWriter(std::filesystem::path dir, TokenFileInfo info)
    : dir_(std::move(dir)),
      info_(std::move(info)),
      name_(info_.domain + "." + name_of(info_.split) + ".h5"),
      dtype_(token_dtype(info_.vocab_size)),
      spool_(std::fopen(spool_path().c_str(), "wb")) {
  ARCUS_REQUIRE(spool_ != nullptr, ExitCode::data, "cannot write {}: {}", spool_path().string(),
                std::strerror(errno));
}

template <class T>
void TokenWriter::append_as(std::span<const std::int32_t> ids) {
  buffer_.resize(ids.size() * sizeof(T));
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const auto id = static_cast<T>(ids[i]);
    std::memcpy(buffer_.data() + i * sizeof(T), &id, sizeof(T));
  }
}

void TokenWriter::append(std::span<const std::int32_t> ids, bool learned) {
  const auto count = static_cast<std::int64_t>(ids.size());
  if (info_.masked && learned && count > 0) {
    if (!spans_.empty() && spans_[spans_.size() - 2] == num_tokens_) {
      spans_[spans_.size() - 2] += count;
    } else {
      spans_.insert(spans_.end(), {num_tokens_, num_tokens_ + count, num_targets_});
    }
    num_targets_ += count;
  }
  if (dtype_ == DType::u16) {
    append_as<std::uint16_t>(ids);
  } else {
    append_as<std::uint32_t>(ids);
  }
  hash_.update(buffer_.data(), buffer_.size());
  write_spool(buffer_.data(), buffer_.size());
  num_tokens_ += count;
}

void TokenWriter::write_spool(const void* data, std::size_t bytes) {
  ARCUS_REQUIRE(std::fwrite(data, 1, bytes, spool_.get()) == bytes, ExitCode::data,
                "cannot write {}: {}", spool_path().string(), std::strerror(errno));
}

void TokenWriter::end_document(std::int64_t bytes) {
  append(std::span(&info_.eos_id, 1));
  document_offsets_.push_back(num_tokens_);
  document_bytes_.push_back(bytes);
}

FileRecord TokenWriter::finish() {
  ARCUS_REQUIRE(std::fclose(spool_.release()) == 0, ExitCode::data, "cannot write {}: {}",
                spool_path().string(), std::strerror(errno));
  FileRecord record{
      .file = name_,
      .dtype = dtype_,
      .num_tokens = num_tokens_,
      .num_documents = static_cast<std::int64_t>(document_bytes_.size()),
      .num_bytes = std::accumulate(document_bytes_.begin(), document_bytes_.end(), std::int64_t{0}),
      .tokens_hash = hash_.digest()};
  if (info_.masked) record.num_targets = num_targets_;
  write_file(record);
  std::filesystem::remove(spool_path());
  const auto path = dir_ / name_;
  record.file_bytes = static_cast<std::int64_t>(std::filesystem::file_size(path));
  // A data set without tokens has no place in the file.
  record.tokens_offset =
      std::max<std::int64_t>(0, h5::File::open(path, ExitCode::data).dataset("tokens").offset());
  record.metadata_hash = hash_file_without(path, record.tokens_offset, record.tokens_end());
  return record;
}

void TokenWriter::write_file(const FileRecord& record) {
  h5::File file = h5::File::create(dir_ / name_, ExitCode::data);
  file.write_attribute("format_version",
                       info_.masked ? Manifest::kVersionWithTargets : Manifest::kVersion);
  file.write_attribute("domain", info_.domain);
  file.write_attribute("split", name_of(info_.split));
  file.write_attribute("tokenizer_xxh3", hex(info_.tokenizer_hash));
  file.write_attribute("vocab_size", info_.vocab_size);
  file.write_attribute("eos_id", std::int64_t{info_.eos_id});
  file.write_attribute("num_bytes", record.num_bytes);
  file.write_attribute("tokens_xxh3", hex(record.tokens_hash));
  file.write("document_offsets", {record.num_documents + 1}, document_offsets_.data());
  file.write("document_bytes", {record.num_documents}, document_bytes_.data());
  if (info_.masked) {
    file.write("target_spans", {std::ssize(spans_) / kSpanColumns, kSpanColumns}, spans_.data());
  }
  h5::Dataset tokens = file.create_dataset("tokens", dtype_, {num_tokens_});
  const MappedFile spool(spool_path());
  spool.expect_sequential();
  constexpr std::int64_t kCopyTokens = std::int64_t{1} << 22;
  for (std::int64_t done = 0; done < num_tokens_; done += kCopyTokens) {
    const std::size_t begin = static_cast<std::size_t>(done) * size_of(dtype_);
    tokens.write_rows(done, std::min(kCopyTokens, num_tokens_ - done),
                      spool.bytes().data() + begin);
    spool.release_before(begin);
  }
  file.flush();
}

}  // namespace arcus
