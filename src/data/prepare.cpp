#include "src/data/prepare.hpp"

#include <algorithm>
#include <charconv>
#include <deque>
#include <exception>
#include <fstream>
#include <memory>
#include <optional>

#include "src/base/error.hpp"
#include "src/base/hash.hpp"
#include "src/data/manifest.hpp"
#include "src/data/mapped_file.hpp"
#include "src/data/output_folder.hpp"
#include "src/data/prepare_scan.hpp"
#include "src/data/token_writer.hpp"
#include "src/data/tokenizer.hpp"

namespace arcus {
namespace {

constexpr const char* kSpmFile = "tokenizer.model";
constexpr const char* kPackedFile = "tokenizer.files";
constexpr std::int64_t kMinSplitBytes = 1024;

bool is_domain_name(const std::string& name) {
  return !name.empty() && name.size() <= 64 && name.front() != '.' &&
         std::all_of(name.begin(), name.end(), [](unsigned char c) {
           return c < 0x80 && (std::isalnum(c) != 0 || c == '_' || c == '-' || c == '.');
         });
}

/// VOCAB of "spm:VOCAB"; nothing for "bytes".
std::optional<std::int64_t> spm_vocab_size(const std::string& tokenizer) {
  if (tokenizer == "bytes") return std::nullopt;
  std::int64_t size = 0;
  const char* end = tokenizer.data() + tokenizer.size();
  const bool spm = tokenizer.starts_with("spm:") &&
                   std::from_chars(tokenizer.data() + 4, end, size).ptr == end && size > 0;
  ARCUS_REQUIRE(
      spm, ExitCode::usage,
      "unknown tokenizer \"{}\"; use \"bytes\", \"spm:VOCAB\", e.g. spm:8192, or one that is "
      "there already: hf:DIR, model:FILE, gguf:FILE, checkpoint:PATH or data:DIR",
      tokenizer);
  return size;
}

void validate(const PrepareOptions& options) {
  ARCUS_REQUIRE(!options.out.empty(), ExitCode::usage, "name the folder to make with --out");
  if (options.given == nullptr) spm_vocab_size(options.tokenizer);
  ARCUS_REQUIRE(options.valid_fraction >= 0 && options.valid_fraction < 1, ExitCode::usage,
                "valid-fraction {} must be at least 0 and below 1, e.g. 0.05",
                options.valid_fraction);
  ARCUS_REQUIRE(options.character_coverage > 0 && options.character_coverage <= 1, ExitCode::usage,
                "character-coverage {} must be above 0 and at most 1", options.character_coverage);
  ARCUS_REQUIRE(options.spm_sample_bytes > 0, ExitCode::usage,
                "the vocabulary cannot be trained on {} bytes", options.spm_sample_bytes);
  ARCUS_REQUIRE(!options.domains.empty(), ExitCode::usage,
                "give at least one domain: --domain NAME=PATH or --pairs NAME=FILE.jsonl");
  PairTemplate{options.pair_template};
  for (std::size_t i = 0; i < options.domains.size(); ++i) {
    const DomainSource& domain = options.domains[i];
    ARCUS_REQUIRE(is_domain_name(domain.name), ExitCode::usage,
                  "\"{}\" is no domain name: use letters, digits, '_', '-' and '.'", domain.name);
    ARCUS_REQUIRE(!domain.paths.empty(), ExitCode::usage, "domain \"{}\" has no files",
                  domain.name);
    ARCUS_REQUIRE(domain.rule.split_bytes == 0 || domain.rule.split_bytes >= kMinSplitBytes,
                  ExitCode::usage, "domain \"{}\": split-bytes {} must be 0 or at least {}",
                  domain.name, domain.rule.split_bytes, kMinSplitBytes);
    ARCUS_REQUIRE(domain.rule.separator.find('\n') == std::string::npos, ExitCode::usage,
                  "domain \"{}\": a separator is one line, without a line end", domain.name);
    ARCUS_REQUIRE(!domain.pairs || (domain.rule.separator.empty() && domain.rule.split_bytes == 0),
                  ExitCode::usage,
                  "domain \"{}\": every line of a file of pairs is a document; neither a "
                  "separator nor split-bytes applies",
                  domain.name);
    for (std::size_t j = 0; j < i; ++j) {
      ARCUS_REQUIRE(options.domains[j].name != domain.name, ExitCode::usage,
                    "domain \"{}\" is given twice", domain.name);
    }
  }
}

std::vector<ScannedDomain> scan(const PrepareOptions& options, const PrepareCallback& callback,
                                PrepareReport& report) {
  std::vector<ScannedDomain> domains;
  std::int64_t bytes_total = 0;
  for (const DomainSource& source : options.domains) {
    domains.push_back({&source, expand_paths(source.paths), {}});
    report.domains.push_back({.name = source.name});
    for (const auto& file : domains.back().files) {
      std::error_code unreadable;  // named when it is read
      const auto bytes = std::filesystem::file_size(file, unreadable);
      if (!unreadable) bytes_total += static_cast<std::int64_t>(bytes);
    }
  }
  ProgressMeter progress(callback, "reading", bytes_total);
  std::unordered_set<std::uint64_t> seen;
  for (std::size_t i = 0; i < domains.size(); ++i) {
    progress.start_domain(domains[i].source->name);
    scan_files(options, domains[i], report.domains[i], progress);
    drop_duplicates(domains[i], seen, report.domains[i]);
    choose_held_out(options, domains[i], report.domains[i]);
  }
  progress.finish();
  return domains;
}

std::shared_ptr<const Tokenizer> make_tokenizer(const PrepareOptions& options,
                                                const std::vector<ScannedDomain>& domains,
                                                const PrepareCallback& callback) {
  if (options.given != nullptr) return options.given;
  const auto vocab_size = spm_vocab_size(options.tokenizer);
  if (!vocab_size) return load_tokenizer("bytes", "");
  const std::vector<std::string> lines = sample_lines(options, domains);
  std::int64_t bytes = 0;
  for (const std::string& line : lines) bytes += static_cast<std::int64_t>(line.size());
  ProgressMeter progress(callback, "training the tokenizer", bytes);
  progress.start_domain("");
  const std::string model = train_spm(lines, {*vocab_size, options.character_coverage});
  progress.finish();
  return load_tokenizer("spm", model);
}

/// Encodes documents into the two token files of a domain. Text is gathered until a batch of parts
/// is worth the threads; parts are encoded in any order and written in theirs.
class DomainWriter {
 public:
  DomainWriter(const std::filesystem::path& dir, const DomainSource& domain,
               const Tokenizer& tokenizer)
      : tokenizer_(tokenizer),
        train_(dir, info(domain, Split::train, tokenizer)),
        valid_(dir, info(domain, Split::valid, tokenizer)) {}

  /// A line of a file of pairs.
  void add_pair(const MappedFile& file, const std::string& name, const ScannedDocument& document,
                const PairTemplate& how, ProgressMeter& progress) {
    ARCUS_REQUIRE(document.end <= file.size(), ExitCode::data, kChanged, name);
    const std::string_view line =
        file.bytes().substr(document.begin, static_cast<std::size_t>(document.bytes()));
    ARCUS_REQUIRE(hash_text(line) == document.hash, ExitCode::data, kChanged, name);
    std::vector<TextPart> parts = read_pair(line, how);
    std::int64_t bytes = 0;
    for (const TextPart& part : parts) bytes += static_cast<std::int64_t>(part.text.size());
    for (std::size_t i = 0; i < parts.size(); ++i) {
      const std::string& text = rendered_.emplace_back(std::move(parts[i].text));
      parts_.push_back({nullptr, text, i == 0, document.fate == Fate::valid ? &valid_ : &train_,
                        i + 1 == parts.size() ? bytes : -1, parts[i].learned});
      batch_bytes_ += text.size();
    }
    progress.add(document.bytes());
    if (batch_bytes_ >= kBatchBytes || parts_.size() >= kBatchParts) write_batch();
    file.release_before(document.begin);
  }

  void add(const std::shared_ptr<const MappedFile>& file, const std::string& name,
           const ScannedDocument& document, ProgressMeter& progress) {
    ARCUS_REQUIRE(document.end <= file->size(), ExitCode::data, kChanged, name);
    std::string_view rest =
        file->bytes().substr(document.begin, static_cast<std::size_t>(document.bytes()));
    StreamHash hash;
    while (!rest.empty()) {
      const std::string_view text = rest.substr(0, tokenizer_.cut(rest, kPartBytes));
      const bool first = text.data() == file->bytes().data() + document.begin;
      rest.remove_prefix(text.size());
      hash.update(text.data(), text.size());
      parts_.push_back({file, text, first, document.fate == Fate::valid ? &valid_ : &train_,
                        rest.empty() ? document.bytes() : -1});
      batch_bytes_ += text.size();
      progress.add(static_cast<std::int64_t>(text.size()));
      if (batch_bytes_ >= kBatchBytes || parts_.size() >= kBatchParts) write_batch();
      if (parts_.empty()) file->release_before(document.end - rest.size());
    }
    ARCUS_REQUIRE(hash.digest() == document.hash, ExitCode::data, kChanged, name);
  }

  DomainRecord finish(const std::string& name) {
    write_batch();
    return {name, train_.finish(), valid_.finish()};
  }

 private:
  struct Part {
    std::shared_ptr<const MappedFile> file;  ///< keeps the text mapped
    std::string_view text;
    bool first;  ///< of its document
    TokenWriter* writer;
    std::int64_t document_bytes;  ///< of the document that ends with this part; else -1
    bool learned = true;
  };
  static constexpr std::size_t kPartBytes = std::size_t{1} << 18;
  static constexpr std::size_t kBatchBytes = std::size_t{1} << 22;
  static constexpr std::size_t kBatchParts = 4096;
  static constexpr const char* kChanged = "{} changed while it was being read; prepare again";

  static TokenFileInfo info(const DomainSource& domain, Split split, const Tokenizer& tokenizer) {
    return {domain.name,        split,       tokenizer.hash(), tokenizer.vocab_size(),
            tokenizer.eos_id(), domain.pairs};
  }

  void write_batch() {
    std::vector<std::vector<std::int32_t>> ids(parts_.size());
    std::exception_ptr failure;
#pragma omp parallel for schedule(dynamic)
    for (std::size_t i = 0; i < parts_.size(); ++i) {
      try {
        const std::string_view text = parts_[i].text;
        parts_[i].first ? tokenizer_.encode(text, ids[i]) : tokenizer_.encode_rest(text, ids[i]);
      } catch (...) {
#pragma omp critical(arcus_prepare_failure)
        failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
    for (std::size_t i = 0; i < parts_.size(); ++i) {
      parts_[i].writer->append(ids[i], parts_[i].learned);
      if (parts_[i].document_bytes >= 0) parts_[i].writer->end_document(parts_[i].document_bytes);
    }
    parts_.clear();
    rendered_.clear();
    batch_bytes_ = 0;
  }

  const Tokenizer& tokenizer_;
  TokenWriter train_, valid_;
  std::vector<Part> parts_;
  std::deque<std::string> rendered_;  ///< what parts of pairs refer to
  std::size_t batch_bytes_ = 0;
};

DomainRecord write_domain(const std::filesystem::path& dir, const ScannedDomain& domain,
                          const Tokenizer& tokenizer, const PairTemplate& how,
                          ProgressMeter& progress) {
  DomainWriter writer(dir, *domain.source, tokenizer);
  std::shared_ptr<const MappedFile> file;
  std::int64_t mapped_idx = -1;
  for (const ScannedDocument& document : domain.documents) {
    if (document.fate == Fate::duplicate) continue;
    const auto& path = domain.files[document.file_idx];
    if (mapped_idx != document.file_idx) {
      file = std::make_shared<const MappedFile>(path);
      file->expect_sequential();
      mapped_idx = document.file_idx;
    }
    if (domain.source->pairs) {
      writer.add_pair(*file, path.string(), document, how, progress);
    } else {
      writer.add(file, path.string(), document, progress);
    }
  }
  return writer.finish(domain.source->name);
}

SplitReport split_report(const FileRecord& record) {
  return {record.num_documents, record.num_bytes, record.num_tokens,
          record.num_targets.value_or(record.num_tokens)};
}

std::string describe(const PrepareOptions& options, const PrepareReport& report) {
  std::string text = fmt::format("arcus prepare: tokenizer {}, valid_fraction {}, seed {}",
                                 options.tokenizer, options.valid_fraction, options.seed);
  for (std::size_t i = 0; i < options.domains.size(); ++i) {
    const DocumentRule& rule = options.domains[i].rule;
    text += fmt::format("; {}: {} files", options.domains[i].name, report.domains[i].files);
    if (!rule.separator.empty()) text += fmt::format(", separator \"{}\"", rule.separator);
    if (rule.split_bytes > 0) text += fmt::format(", split_bytes {}", rule.split_bytes);
    if (options.domains[i].pairs) text += ", pairs";
  }
  return text;
}

Manifest describe_tokenizer(const std::filesystem::path& dir, const Tokenizer& tokenizer) {
  Manifest manifest{.tokenizer_kind = tokenizer.kind(),
                    .tokenizer_hash = tokenizer.hash(),
                    .vocab_size = tokenizer.vocab_size(),
                    .eos_id = tokenizer.eos_id()};
  const std::string model = tokenizer.serialized();
  if (model.empty()) return manifest;
  manifest.tokenizer_file = tokenizer.kind() == "spm" ? kSpmFile : kPackedFile;
  std::ofstream file(dir / manifest.tokenizer_file, std::ios::binary);
  file << model;
  file.close();
  ARCUS_REQUIRE(file.good(), ExitCode::data, "cannot write {} (is the disk full?)",
                (dir / manifest.tokenizer_file).string());
  return manifest;
}

std::int64_t bytes_to_write(const std::vector<ScannedDomain>& domains) {
  std::int64_t bytes = 0;
  for (const ScannedDomain& domain : domains) {
    for (const ScannedDocument& document : domain.documents) {
      if (document.fate != Fate::duplicate) bytes += document.bytes();
    }
  }
  return bytes;
}

}  // namespace

void add_domain_argument(const std::string& argument, std::vector<DomainSource>& domains) {
  const std::size_t equals = argument.find('=');
  const std::string name = argument.substr(0, equals == std::string::npos ? 0 : equals);
  if (!is_domain_name(name)) {
    ARCUS_REQUIRE(!domains.empty(), ExitCode::usage,
                  "--domain {}: write NAME=PATH, with a name of letters, digits, '_', '-' and '.'",
                  argument);
    domains.back().paths.push_back(argument);
    return;
  }
  auto found = std::find_if(domains.begin(), domains.end(),
                            [&](const DomainSource& domain) { return domain.name == name; });
  if (found == domains.end()) found = domains.insert(domains.end(), DomainSource{.name = name});
  found->paths.push_back(argument.substr(equals + 1));
}

void add_pairs_argument(const std::string& argument, std::vector<DomainSource>& domains) {
  const std::size_t equals = argument.find('=');
  const bool named = equals != std::string::npos && is_domain_name(argument.substr(0, equals));
  const std::string path = named ? argument.substr(equals + 1) : argument;
  const bool goes_on = !named && !domains.empty() && domains.back().pairs;
  const std::string name = named     ? argument.substr(0, equals)
                           : goes_on ? domains.back().name
                                     : "pairs";
  auto found = std::find_if(domains.begin(), domains.end(),
                            [&](const DomainSource& domain) { return domain.name == name; });
  ARCUS_REQUIRE(found == domains.end() || found->pairs, ExitCode::usage,
                "--pairs {}: domain \"{}\" has text already; give the pairs another name", argument,
                name);
  if (found == domains.end()) {
    found = domains.insert(domains.end(), DomainSource{.name = name, .pairs = true});
  }
  found->paths.push_back(path);
}

namespace {

PrepareReport prepare_checked(const PrepareOptions& options, const PrepareCallback& callback) {
  OutputFolder output(options.out, options.force);
  PrepareReport report;
  const std::vector<ScannedDomain> domains = scan(options, callback, report);
  const auto tokenizer = make_tokenizer(options, domains, callback);
  report.vocab_size = tokenizer->vocab_size();
  Manifest manifest = describe_tokenizer(output.partial(), *tokenizer);
  const PairTemplate how(options.pair_template);
  ProgressMeter progress(callback, "writing", bytes_to_write(domains));
  for (std::size_t i = 0; i < domains.size(); ++i) {
    progress.start_domain(domains[i].source->name);
    manifest.domains.push_back(
        write_domain(output.partial(), domains[i], *tokenizer, how, progress));
    if (domains[i].source->pairs) manifest.pair_template = options.pair_template;
    report.domains[i].train = split_report(manifest.domains.back().train);
    report.domains[i].valid = split_report(manifest.domains.back().valid);
  }
  manifest.made_by = describe(options, report);
  manifest.save(output.partial());
  output.commit();
  progress.finish();
  return report;
}

}  // namespace

PrepareReport prepare(const PrepareOptions& options, const PrepareCallback& callback) {
  validate(options);
  try {
    return prepare_checked(options, callback);
  } catch (const std::filesystem::filesystem_error& error) {
    ARCUS_FAIL(ExitCode::data, "{}", error.what());
  }
}

}  // namespace arcus
