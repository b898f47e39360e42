#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "src/data/documents.hpp"
#include "src/data/pairs.hpp"
#include "src/data/tokenizer.hpp"

namespace arcus {

/// The text of one domain.
struct DomainSource {
  std::string name;                ///< letters, digits, '_', '-', '.': files are named after it
  std::vector<std::string> paths;  ///< as expand_paths takes them
  DocumentRule rule;
  bool pairs = false;  ///< files of a JSON object a line (read_pair), each a document
};

struct PrepareOptions {
  std::filesystem::path out;
  std::string tokenizer = "bytes";         ///< "bytes" or "spm:VOCAB"; what `given` is, for people
  std::shared_ptr<const Tokenizer> given;  ///< one that is there already
  std::vector<DomainSource> domains;
  std::string pair_template = PairTemplate::kPlain;
  double valid_fraction = 0.05;        ///< share of each domain's bytes that is held out
  std::uint64_t seed = 1;              ///< of the choice of held-out documents
  bool force = false;                  ///< replace an existing data set
  bool skip_bad = false;               ///< leave out empty, binary and non-UTF-8 files, counted
  double character_coverage = 0.9995;  ///< spm: rarer ones are spelled in bytes
  std::int64_t spm_sample_bytes = std::int64_t{32} << 20;  ///< text the vocabulary is trained on
};

/// Adds "NAME=PATH" to the sources, or "PATH" to the one added last.
void add_domain_argument(const std::string& argument, std::vector<DomainSource>& domains);
/// The same of files of pairs; "PATH" alone, where none was added last, to the domain "pairs".
void add_pairs_argument(const std::string& argument, std::vector<DomainSource>& domains);

struct PrepareProgress {
  std::string stage;   ///< "reading", "training the tokenizer", "writing"
  std::string domain;  ///< "" where a stage concerns all
  std::int64_t bytes_done = 0;
  std::int64_t bytes_total = 0;
};
using PrepareCallback = std::function<void(const PrepareProgress&)>;

struct SplitReport {
  std::int64_t documents = 0;
  std::int64_t bytes = 0;
  std::int64_t tokens = 0;   ///< EOS included
  std::int64_t targets = 0;  ///< of them, those that may be learned
};

struct DomainReport {
  std::string name;
  std::int64_t files = 0;       ///< read, bad ones not counted
  std::int64_t bad_files = 0;   ///< skipped
  std::int64_t duplicates = 0;  ///< documents dropped because an equal one came before
  std::int64_t duplicate_bytes = 0;
  SplitReport train, valid;
  std::vector<std::string> notes;  ///< what a user should know, one sentence each
};

struct PrepareReport {
  std::int64_t vocab_size = 0;
  std::vector<DomainReport> domains;
};

/// Makes a data set (FORMAT.md). Every domain is read twice, document by document; memory holds
/// about 64 bytes a document, the vocabulary's sample and a few blocks of text, whatever the size.
/// Documents that occur more than once, in whichever domain, are kept once. Which are held out
/// depends on the seed, the domain's name and their content, not on paths. The folder appears when
/// all of it is on disk, or not at all. Throws (data) for bad text, (usage) for bad options.
PrepareReport prepare(const PrepareOptions& options, const PrepareCallback& progress = {});

}  // namespace arcus
