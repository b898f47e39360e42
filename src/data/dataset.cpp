#include "src/data/dataset.hpp"

#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>

#include "src/base/error.hpp"
#include "src/base/hash.hpp"
#include "src/base/hdf5.hpp"
#include "src/data/mapped_file.hpp"

namespace arcus {
namespace {

/// Element i of a mapped array, whose place in the file need not be aligned.
template <class T>
T load(const char* array, std::int64_t i) {
  T value;
  std::memcpy(&value, array + static_cast<std::size_t>(i) * sizeof(T), sizeof(T));
  return value;
}

/// Copies ids and returns the largest.
template <class T>
std::uint32_t copy_ids(const char* tokens, std::int64_t begin, std::span<std::int32_t> out) {
  std::uint32_t largest = 0;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const std::uint32_t id = load<T>(tokens, begin + static_cast<std::int64_t>(i));
    largest = std::max(largest, id);
    out[i] = static_cast<std::int32_t>(id);
  }
  return largest;
}

}  // namespace

struct TokenFile::Impl {
  std::filesystem::path path;
  FileRecord record;
  std::int64_t vocab_size = 0;
  MappedFile file;
  const char* tokens = nullptr;
  const char* document_offsets = nullptr;  ///< i64 [num_documents + 1]
  const char* target_spans = nullptr;      ///< i64 [num_spans, kSpanColumns], where masked
  std::int64_t num_spans = 0;

  static std::unique_ptr<Impl> open(const std::filesystem::path& dir, const FileRecord& record,
                                    const Manifest& manifest);
  void check_size_and_metadata() const;
  void locate(const h5::File& h5);
  void check_documents() const;
  void locate_spans(const h5::File& h5);
  void check_spans() const;
  void check_tokens() const;
  std::int64_t offset_of(std::int64_t document) const {
    return load<std::int64_t>(document_offsets, document);
  }
  std::int64_t span(std::int64_t i, std::int64_t column) const {
    return load<std::int64_t>(target_spans, i * kSpanColumns + column);
  }
  /// The first span that ends behind token `index`.
  std::int64_t span_after(std::int64_t index) const;
  /// Learned tokens before token `index`.
  std::int64_t targets_before(std::int64_t index) const;
};

std::unique_ptr<TokenFile::Impl> TokenFile::Impl::open(const std::filesystem::path& dir,
                                                       const FileRecord& record,
                                                       const Manifest& manifest) {
  auto impl = std::make_unique<Impl>();
  impl->path = dir / record.file;
  impl->record = record;
  impl->vocab_size = manifest.vocab_size;
  impl->check_size_and_metadata();
  {
    const h5::File h5 = h5::File::open(impl->path, ExitCode::data);
    const std::string tokenizer_hash = h5.text_attribute("tokenizer_xxh3");
    ARCUS_REQUIRE(tokenizer_hash == hex(manifest.tokenizer_hash), ExitCode::data,
                  "{} was made with tokenizer {}, the data set has {}", impl->path.string(),
                  tokenizer_hash, hex(manifest.tokenizer_hash));
    impl->file = MappedFile(impl->path);
    impl->locate(h5);
  }
  impl->check_documents();
  impl->check_spans();
  return impl;
}

void TokenFile::Impl::check_size_and_metadata() const {
  ARCUS_REQUIRE(std::filesystem::exists(path), ExitCode::data,
                "{} is missing; prepare the data again", path.string());
  std::error_code error;
  const auto bytes = static_cast<std::int64_t>(std::filesystem::file_size(path, error));
  ARCUS_REQUIRE(!error, ExitCode::data, "cannot read {}: {}", path.string(), error.message());
  ARCUS_REQUIRE(bytes == record.file_bytes, ExitCode::data,
                "{} has {} bytes, dataset.json records {}: it is {}", path.string(), bytes,
                record.file_bytes, bytes < record.file_bytes ? "truncated" : "another file");
  // Before the HDF5 library parses it: damaged metadata can end the process there.
  ARCUS_REQUIRE(
      hash_file_without(path, record.tokens_offset, record.tokens_end()) == record.metadata_hash,
      ExitCode::data,
      "{} is damaged: its metadata (all but the tensor tokens) does not match the hash "
      "in dataset.json; prepare the data again",
      path.string());
}

void TokenFile::Impl::locate(const h5::File& h5) {
  const auto place = [&](const char* name, DType dtype, std::int64_t count) -> const char* {
    const h5::Dataset dataset = h5.dataset(name);
    const std::int64_t offset = count == 0 ? 0 : dataset.offset();
    const auto bytes = count * static_cast<std::int64_t>(size_of(dtype));
    ARCUS_REQUIRE(dataset.dtype() == dtype && dataset.shape() == h5::Shape{count} && offset >= 0 &&
                      offset + bytes <= record.file_bytes,
                  ExitCode::data,
                  "{}: tensor {} should be {} contiguous elements of {} inside the file",
                  path.string(), name, count, name_of(dtype));
    return file.bytes().data() + offset;
  };
  tokens = place("tokens", record.dtype, record.num_tokens);
  document_offsets = place("document_offsets", DType::i64, record.num_documents + 1);
  if (record.num_targets) locate_spans(h5);
}

void TokenFile::Impl::locate_spans(const h5::File& h5) {
  const h5::Dataset spans = h5.dataset("target_spans");
  const h5::Shape shape = spans.shape();
  const bool table = spans.dtype() == DType::i64 && shape.size() == 2 && shape[1] == kSpanColumns;
  const std::int64_t bytes = table ? shape[0] * kSpanColumns * 8 : 0;
  const std::int64_t offset = bytes == 0 ? 0 : spans.offset();
  ARCUS_REQUIRE(table && offset >= 0 && bytes <= record.file_bytes - offset, ExitCode::data,
                "{}: tensor target_spans should be contiguous rows of {} i64 inside the file",
                path.string(), kSpanColumns);
  num_spans = shape[0];
  target_spans = file.bytes().data() + offset;
}

void TokenFile::Impl::check_spans() const {
  std::int64_t end = 0, targets = 0;
  bool good = true;
  for (std::int64_t i = 0; i < num_spans && good; ++i) {
    good = span(i, 0) >= end && span(i, 1) > span(i, 0) && span(i, 2) == targets;
    targets += span(i, 1) - span(i, 0);
    end = span(i, 1);
  }
  ARCUS_REQUIRE(
      good && end <= record.num_tokens && (!record.num_targets || targets == *record.num_targets),
      ExitCode::data,
      "{}: tensor target_spans does not ascend inside the {} tokens, or does not hold "
      "the {} that dataset.json records",
      path.string(), record.num_tokens, record.num_targets.value_or(0));
}

std::int64_t TokenFile::Impl::span_after(std::int64_t index) const {
  std::int64_t low = 0, high = num_spans;  // spans below low end at or before index
  while (low < high) {
    const std::int64_t middle = low + (high - low) / 2;
    if (span(middle, 1) <= index) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

std::int64_t TokenFile::Impl::targets_before(std::int64_t index) const {
  const std::int64_t i = span_after(index);
  if (i == num_spans) return *record.num_targets;
  return span(i, 2) + std::max<std::int64_t>(0, index - span(i, 0));
}

void TokenFile::Impl::check_documents() const {
  bool ascending = offset_of(0) == 0 && offset_of(record.num_documents) == record.num_tokens;
  for (std::int64_t d = 0; d < record.num_documents; ++d) {
    ascending = ascending && offset_of(d) < offset_of(d + 1);
  }
  ARCUS_REQUIRE(ascending, ExitCode::data,
                "{}: tensor document_offsets does not ascend from 0 to the {} tokens",
                path.string(), record.num_tokens);
}

void TokenFile::Impl::check_tokens() const {
  file.expect_sequential();
  constexpr std::size_t kStep = std::size_t{64} << 20;
  const auto end = static_cast<std::size_t>(record.tokens_end());
  StreamHash hash;
  for (auto at = static_cast<std::size_t>(record.tokens_offset); at < end; at += kStep) {
    hash.update(file.bytes().data() + at, std::min(kStep, end - at));
    file.release_before(at);
  }
  ARCUS_REQUIRE(hash.digest() == record.tokens_hash, ExitCode::data,
                "{} is damaged: tensor tokens has hash {}, dataset.json records {}; prepare the "
                "data again",
                path.string(), hex(hash.digest()), hex(record.tokens_hash));
}

TokenFile::TokenFile() = default;
TokenFile::TokenFile(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
TokenFile::~TokenFile() = default;
TokenFile::TokenFile(TokenFile&&) noexcept = default;

std::int64_t TokenFile::num_tokens() const { return impl_->record.num_tokens; }
std::int64_t TokenFile::num_documents() const { return impl_->record.num_documents; }
std::int64_t TokenFile::num_bytes() const { return impl_->record.num_bytes; }

void TokenFile::read(std::int64_t begin, std::span<std::int32_t> out) const {
  const auto count = static_cast<std::int64_t>(out.size());
  ARCUS_CHECK(begin >= 0 && count <= num_tokens() - begin, "tokens {}..{} outside {} of {} tokens",
              begin, begin + count, impl_->path.string(), num_tokens());
  const std::uint32_t largest = impl_->record.dtype == DType::u16
                                    ? copy_ids<std::uint16_t>(impl_->tokens, begin, out)
                                    : copy_ids<std::uint32_t>(impl_->tokens, begin, out);
  ARCUS_REQUIRE(largest < impl_->vocab_size || out.empty(), ExitCode::data,
                "{} is damaged: tensor tokens holds id {} between {} and {}, the vocabulary has "
                "{}; prepare the data again",
                impl_->path.string(), largest, begin, begin + count, impl_->vocab_size);
}

bool TokenFile::is_masked() const { return impl_->record.num_targets.has_value(); }

std::int64_t TokenFile::num_targets(std::int64_t begin, std::int64_t end) const {
  if (!is_masked()) return end - begin;
  return impl_->targets_before(end) - impl_->targets_before(begin);
}

void TokenFile::mask(std::int64_t begin, std::span<std::int32_t> tokens) const {
  if (!is_masked()) return;
  const std::int64_t end = begin + std::ssize(tokens);
  std::int64_t at = begin;
  const auto clear_to = [&](std::int64_t limit) {
    for (; at < std::min(limit, end); ++at) tokens[static_cast<std::size_t>(at - begin)] = -1;
  };
  for (std::int64_t i = impl_->span_after(begin); i < impl_->num_spans && at < end; ++i) {
    clear_to(impl_->span(i, 0));
    at = std::max(at, impl_->span(i, 1));
  }
  clear_to(end);
}

std::int64_t TokenFile::document_begin(std::int64_t index) const {
  ARCUS_CHECK(index >= 0 && index < num_tokens(), "token {} outside {} of {} tokens", index,
              impl_->path.string(), num_tokens());
  std::int64_t low = 0;  // offset_of(low) <= index < offset_of(high)
  std::int64_t high = num_documents();
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (impl_->offset_of(middle) <= index ? low : high) = middle;
  }
  return impl_->offset_of(low);
}

std::pair<std::int64_t, std::int64_t> TokenFile::document_range(std::int64_t document) const {
  ARCUS_CHECK(document >= 0 && document < num_documents(), "document {} outside {} of {}", document,
              impl_->path.string(), num_documents());
  return {impl_->offset_of(document), impl_->offset_of(document + 1)};
}

namespace {

std::shared_ptr<const Tokenizer> open_tokenizer(const std::filesystem::path& dir,
                                                const Manifest& manifest) {
  std::string model;
  if (!manifest.tokenizer_file.empty()) {
    const auto path = dir / std::filesystem::path(manifest.tokenizer_file).filename();
    model = MappedFile(path).bytes();
  }
  const std::uint64_t hash = hash_text(manifest.tokenizer_kind + ':' + hex(hash_text(model)));
  ARCUS_REQUIRE(hash == manifest.tokenizer_hash, ExitCode::data,
                "{} is damaged: it does not match the hash in dataset.json; prepare the data again",
                (dir / manifest.tokenizer_file).string());
  std::shared_ptr<const Tokenizer> tokenizer = load_tokenizer(manifest.tokenizer_kind, model);
  ARCUS_REQUIRE(
      tokenizer->vocab_size() == manifest.vocab_size && tokenizer->eos_id() == manifest.eos_id,
      ExitCode::data, "{}: the tokenizer has {} ids and EOS {}, dataset.json records {} and {}",
      dir.string(), tokenizer->vocab_size(), tokenizer->eos_id(), manifest.vocab_size,
      manifest.eos_id);
  return tokenizer;
}

std::uint64_t fingerprint_of(const Manifest& manifest) {
  std::string text = hex(manifest.tokenizer_hash);
  for (const DomainRecord& domain : manifest.domains) {
    text += fmt::format("\n{} {} {}", domain.name, hex(domain.train.tokens_hash),
                        hex(domain.valid.tokens_hash));
    // Which tokens are learned stands among the metadata.
    for (const FileRecord* file : {&domain.train, &domain.valid}) {
      if (file->num_targets) text += fmt::format(" {}", hex(file->metadata_hash));
    }
  }
  return hash_text(text);
}

}  // namespace

TokenDataset TokenDataset::open(const std::filesystem::path& dir, bool verify) {
  TokenDataset dataset;
  dataset.manifest_ = Manifest::load(dir);
  const Manifest& manifest = dataset.manifest_;
  dataset.tokenizer_ = open_tokenizer(dir, manifest);
  dataset.vocab_size_ = manifest.vocab_size;
  dataset.fingerprint_ = fingerprint_of(manifest);
  for (std::int64_t id = 0; id < manifest.vocab_size; ++id) {
    dataset.token_bytes_.push_back(dataset.tokenizer_->token_bytes(static_cast<std::int32_t>(id)));
  }
  for (const DomainRecord& domain : manifest.domains) {
    dataset.domains_.push_back(domain.name);
    for (const Split split : kSplits) {
      auto impl = TokenFile::Impl::open(dir, domain.file(split), manifest);
      if (verify) impl->check_tokens();
      auto& files = split == Split::train ? dataset.train_ : dataset.valid_;
      files.push_back(TokenFile(std::move(impl)));
    }
  }
  return dataset;
}

std::size_t TokenDataset::domain_idx(const std::string& name) const {
  const auto found = std::find(domains_.begin(), domains_.end(), name);
  ARCUS_REQUIRE(found != domains_.end(), ExitCode::usage,
                "the data has no domain \"{}\"; it has: {}", name, fmt::join(domains_, ", "));
  return static_cast<std::size_t>(found - domains_.begin());
}

const TokenFile& TokenDataset::file(std::size_t domain_idx, Split split) const {
  ARCUS_CHECK(domain_idx < domains_.size(), "domain {} of {}", domain_idx, domains_.size());
  return split == Split::train ? train_[domain_idx] : valid_[domain_idx];
}

}  // namespace arcus
