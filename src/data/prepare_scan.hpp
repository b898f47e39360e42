#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <unordered_set>
#include <vector>

#include "src/data/prepare.hpp"

namespace arcus {

/// The first pass of `prepare`: which documents there are and what becomes of each.
enum class Fate : std::uint8_t { train, valid, duplicate };

struct ScannedDocument {
  std::uint32_t file_idx = 0;
  Fate fate = Fate::train;
  std::uint64_t begin = 0, end = 0;  ///< bytes of the file
  std::uint64_t hash = 0;            ///< of the text
  std::int64_t bytes() const { return static_cast<std::int64_t>(end - begin); }
};

struct ScannedDomain {
  const DomainSource* source = nullptr;
  std::vector<std::filesystem::path> files;
  std::vector<ScannedDocument> documents;  ///< by file, then by place
};

/// Counts bytes and calls back every few megabytes.
class ProgressMeter {
 public:
  ProgressMeter(const PrepareCallback& callback, std::string stage, std::int64_t bytes_total)
      : callback_(callback), now_{std::move(stage), "", 0, bytes_total} {}
  void start_domain(const std::string& name);
  void add(std::int64_t bytes);
  void finish();

 private:
  void report();
  const PrepareCallback& callback_;
  PrepareProgress now_;
  std::int64_t reported_ = -1;
};

/// Reads all files of a domain: checks the text, cuts it into documents and hashes them. A pair's
/// document is its line, as it stands in the file.
void scan_files(const PrepareOptions& options, ScannedDomain& domain, DomainReport& report,
                ProgressMeter& progress);

/// Marks the documents that are in `seen` (hash and size) and adds the others to it.
void drop_duplicates(ScannedDomain& domain, std::unordered_set<std::uint64_t>& seen,
                     DomainReport& report);

/// Chooses held-out documents in keyed order until their bytes are as near as possible to
/// valid_fraction of the domain's, at least one on each side. A domain with a single document has
/// its end held out, cut at a paragraph.
void choose_held_out(const PrepareOptions& options, ScannedDomain& domain, DomainReport& report);

/// Lines of training documents to train a vocabulary on: all, or about options.spm_sample_bytes in
/// equal parts by domain, in pieces chosen by key.
std::vector<std::string> sample_lines(const PrepareOptions& options,
                                      const std::vector<ScannedDomain>& domains);

}  // namespace arcus
