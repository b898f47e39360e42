#include "src/data/prepare_scan.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "src/base/error.hpp"
#include "src/base/hash.hpp"
#include "src/base/rng.hpp"
#include "src/data/mapped_file.hpp"
#include "src/data/tokenizer.hpp"
#include "src/data/utf8.hpp"

namespace arcus {
namespace {

constexpr std::size_t kBlockBytes = std::size_t{4} << 20;
constexpr std::size_t kSamplePiece = std::size_t{1} << 16;
constexpr std::size_t kNotesOfBadFiles = 10;

/// Throws (data) when a block of a file, which begins at `offset`, is no text.
void check_text(std::string_view block, std::size_t offset, const std::string& file) {
  const std::size_t nul = block.find('\0');
  const std::size_t invalid = find_invalid_utf8(block);
  ARCUS_REQUIRE(nul == std::string_view::npos || nul > invalid, ExitCode::data,
                "{} has a NUL byte at offset {}: it is binary or not UTF-8; convert it, leave it "
                "out, or skip such files with --skip-bad",
                file, offset + nul);
  ARCUS_REQUIRE(invalid == std::string_view::npos, ExitCode::data,
                "{} is not UTF-8: byte 0x{:02x} at offset {}; convert it (iconv), leave it out, or "
                "skip such files with --skip-bad",
                file, static_cast<unsigned char>(block[invalid]), offset + invalid);
}

/// Hash of text [begin, end) of a file, checked on the way.
std::uint64_t hash_checked(const MappedFile& file, std::size_t begin, std::size_t end,
                           const std::string& name, ProgressMeter& progress) {
  StreamHash hash;
  for (std::size_t at = begin; at < end;) {
    const std::string_view rest = file.bytes().substr(at, end - at);
    const std::size_t bytes = utf8_boundary(rest, std::min(kBlockBytes, rest.size()));
    check_text(rest.substr(0, bytes), at, name);
    hash.update(rest.data(), bytes);
    progress.add(static_cast<std::int64_t>(bytes));
    at += bytes;
    if (end - begin > kBlockBytes) file.release_before(at);
  }
  return hash.digest();
}

void scan_file(const DocumentRule& rule, std::uint32_t file_idx, ScannedDomain& domain,
               ProgressMeter& progress) {
  const std::string name = domain.files[file_idx].string();
  const MappedFile file(domain.files[file_idx]);
  file.expect_sequential();
  ARCUS_REQUIRE(file.size() > 0, ExitCode::data,
                "{} is empty; leave it out, or skip such files with --skip-bad", name);
  const std::size_t before = domain.documents.size();
  std::size_t released = 0;
  cut_documents(file.bytes(), rule, [&](std::size_t begin, std::size_t end) {
    const std::uint64_t hash = hash_checked(file, begin, end, name, progress);
    domain.documents.push_back({file_idx, Fate::train, begin, end, hash});
    if (end - released < kBlockBytes) return;
    file.release_before(end);
    released = end;
  });
  ARCUS_REQUIRE(domain.documents.size() > before, ExitCode::data,
                "{} holds no text but separators; leave it out, or skip such files with --skip-bad",
                name);
}

/// Every line that is not blank is a document.
void scan_pairs(const PairTemplate& how, std::uint32_t file_idx, ScannedDomain& domain,
                ProgressMeter& progress) {
  const std::string name = domain.files[file_idx].string();
  const MappedFile file(domain.files[file_idx]);
  file.expect_sequential();
  const std::string_view text = file.bytes();
  const std::size_t before = domain.documents.size();
  std::int64_t number = 0;
  for (std::size_t begin = 0, end = 0; begin < text.size(); begin = end + 1) {
    end = std::min(text.find('\n', begin), text.size());
    ++number;
    const std::string_view line = text.substr(begin, end - begin);
    progress.add(std::ssize(line) + 1);
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    try {
      read_pair(line, how);
    } catch (const Error& error) {
      ARCUS_FAIL(ExitCode::data, "{}:{} is no pair: {}", name, number, error.what());
    }
    domain.documents.push_back({file_idx, Fate::train, begin, end, hash_text(line)});
    if (number % 1024 == 0) file.release_before(begin);
  }
  ARCUS_REQUIRE(domain.documents.size() > before, ExitCode::data,
                "{} holds no pair; leave it out, or skip such files with --skip-bad", name);
}

/// Hash of text [begin, end) of a file that was checked before, letting go of its pages.
std::uint64_t hash_text_of(const MappedFile& file, std::size_t begin, std::size_t end) {
  StreamHash hash;
  for (std::size_t at = begin; at < end; at += kBlockBytes) {
    hash.update(file.bytes().data() + at, std::min(kBlockBytes, end - at));
    file.release_before(at);
  }
  return hash.digest();
}

std::uint64_t keyed(const Rng& rng, std::uint64_t high, std::uint64_t low) {
  const auto words = rng.words(high, low);
  return (std::uint64_t{words[1]} << 32) | words[0];
}

/// The documents of a domain that stay, in the keyed order in which they are held out.
std::vector<std::size_t> held_out_order(const PrepareOptions& options,
                                        const ScannedDomain& domain) {
  const Rng rng(options.seed, "data.valid", domain.source->name);
  std::vector<std::pair<std::uint64_t, std::size_t>> keys;
  for (std::size_t i = 0; i < domain.documents.size(); ++i) {
    const ScannedDocument& document = domain.documents[i];
    if (document.fate == Fate::duplicate) continue;
    keys.emplace_back(keyed(rng, document.hash, document.end - document.begin), i);
  }
  std::sort(keys.begin(), keys.end());
  std::vector<std::size_t> order;
  order.reserve(keys.size());
  for (const auto& key : keys) order.push_back(key.second);
  return order;
}

void cut_single_document(const PrepareOptions& options, ScannedDomain& domain, std::size_t idx,
                         DomainReport& report) {
  ScannedDocument& whole = domain.documents[idx];
  const MappedFile file(domain.files[whole.file_idx]);
  const std::string_view text =
      file.bytes().substr(whole.begin, static_cast<std::size_t>(whole.bytes()));
  const auto target =
      static_cast<std::size_t>(static_cast<double>(text.size()) * (1 - options.valid_fraction));
  std::size_t cut = find_cut(text, std::max<std::size_t>(target, 1), text.size());
  if (cut == text.size()) cut = utf8_boundary(text, target);
  if (cut == 0 || cut == text.size()) {
    report.notes.push_back("its one document is too short to be cut: nothing is held out");
    return;
  }
  ScannedDocument held_out = whole;
  whole.end = whole.begin + cut;
  whole.hash = hash_text_of(file, whole.begin, whole.end);
  held_out.begin = whole.end;
  held_out.hash = hash_text_of(file, held_out.begin, held_out.end);
  held_out.fate = Fate::valid;
  report.notes.push_back(fmt::format("it is one document: its last {} of {} bytes are held out",
                                     text.size() - cut, text.size()));
  domain.documents.insert(domain.documents.begin() + static_cast<std::ptrdiff_t>(idx) + 1,
                          held_out);
}

std::int64_t training_bytes(const ScannedDomain& domain) {
  return std::accumulate(domain.documents.begin(), domain.documents.end(), std::int64_t{0},
                         [](std::int64_t sum, const ScannedDocument& document) {
                           return sum + (document.fate == Fate::train ? document.bytes() : 0);
                         });
}

/// What each domain gives to the sample: equal parts; what a small one leaves goes to the others.
std::vector<std::int64_t> sample_budgets(std::int64_t total,
                                         const std::vector<ScannedDomain>& all) {
  std::vector<std::pair<std::int64_t, std::size_t>> by_size;
  for (std::size_t i = 0; i < all.size(); ++i) by_size.emplace_back(training_bytes(all[i]), i);
  std::sort(by_size.begin(), by_size.end());
  std::vector<std::int64_t> budgets(all.size());
  auto left = static_cast<std::int64_t>(all.size());
  for (const auto& [bytes, i] : by_size) {
    budgets[i] = std::min(bytes, total / left--);
    total -= budgets[i];
  }
  return budgets;
}

void add_lines(std::string_view text, std::vector<std::string>& lines) {
  while (!text.empty()) {
    const std::size_t line_end = text.substr(0, kMaxSpmLine).find('\n');
    const std::size_t bytes =
        line_end != std::string_view::npos ? line_end + 1 : utf8_boundary(text, kMaxSpmLine);
    lines.emplace_back(text.substr(0, bytes));
    text.remove_prefix(bytes);
  }
}

void sample_document(std::string_view text, std::uint64_t document_hash, const Rng& rng,
                     double share, std::vector<std::string>& lines) {
  for (std::size_t at = 0, piece = 0; at < text.size(); ++piece) {
    const std::size_t end = utf8_boundary(text, at + kSamplePiece);
    const double draw = static_cast<double>(keyed(rng, document_hash, piece)) * 0x1p-64;
    if (draw < share) add_lines(text.substr(at, end - at), lines);
    at = end;
  }
}

}  // namespace

void ProgressMeter::start_domain(const std::string& name) {
  now_.domain = name;
  report();
}

void ProgressMeter::add(std::int64_t bytes) {
  now_.bytes_done += bytes;
  if (now_.bytes_done - reported_ >= (std::int64_t{4} << 20)) report();
}

void ProgressMeter::finish() {
  now_.bytes_done = now_.bytes_total;
  report();
}

void ProgressMeter::report() {
  reported_ = now_.bytes_done;
  if (callback_) callback_(now_);
}

void scan_files(const PrepareOptions& options, ScannedDomain& domain, DomainReport& report,
                ProgressMeter& progress) {
  const PairTemplate how(options.pair_template);
  for (std::size_t i = 0; i < domain.files.size(); ++i) {
    const std::size_t before = domain.documents.size();
    const auto file_idx = static_cast<std::uint32_t>(i);
    try {
      if (domain.source->pairs) {
        scan_pairs(how, file_idx, domain, progress);
      } else {
        scan_file(domain.source->rule, file_idx, domain, progress);
      }
      ++report.files;
    } catch (const Error& error) {
      if (!options.skip_bad || error.code() != ExitCode::data) throw;
      domain.documents.resize(before);
      if (static_cast<std::size_t>(report.bad_files++) < kNotesOfBadFiles) {
        report.notes.push_back(fmt::format("skipped: {}", error.what()));
      }
    }
  }
}

void drop_duplicates(ScannedDomain& domain, std::unordered_set<std::uint64_t>& seen,
                     DomainReport& report) {
  for (ScannedDocument& document : domain.documents) {
    const std::array<std::uint64_t, 2> identity{document.hash, document.end - document.begin};
    if (seen.insert(hash_of_hashes(identity)).second) continue;
    document.fate = Fate::duplicate;
    ++report.duplicates;
    report.duplicate_bytes += document.bytes();
  }
}

void choose_held_out(const PrepareOptions& options, ScannedDomain& domain, DomainReport& report) {
  const std::vector<std::size_t> order = held_out_order(options, domain);
  ARCUS_REQUIRE(!order.empty(), ExitCode::data,
                "domain \"{}\" has no text left: {} files are bad, {} documents are equal to ones "
                "before",
                domain.source->name, report.bad_files, report.duplicates);
  if (options.valid_fraction == 0) return;
  if (order.size() == 1 && domain.source->pairs) {
    report.notes.push_back("it is one pair: nothing is held out");
    return;
  }
  if (order.size() == 1) {
    cut_single_document(options, domain, order.front(), report);
    return;
  }
  auto& documents = domain.documents;
  const double target = options.valid_fraction * static_cast<double>(training_bytes(domain));
  double held_out = 0;
  std::size_t count = 0;
  for (const std::size_t i : order) {
    const auto bytes = static_cast<double>(documents[i].bytes());
    if (count + 1 == order.size()) break;  // one stays for training
    if (held_out + bytes / 2 > target) continue;
    documents[i].fate = Fate::valid;
    held_out += bytes;
    ++count;
  }
  if (count > 0) return;
  // All are larger than twice the target: the smallest is nearest.
  const auto smaller = [&](std::size_t a, std::size_t b) {
    return documents[a].bytes() < documents[b].bytes();
  };
  documents[*std::min_element(order.begin(), order.end(), smaller)].fate = Fate::valid;
}

std::vector<std::string> sample_lines(const PrepareOptions& options,
                                      const std::vector<ScannedDomain>& domains) {
  const std::vector<std::int64_t> budgets = sample_budgets(options.spm_sample_bytes, domains);
  const PairTemplate how(options.pair_template);
  std::vector<std::string> lines;
  for (std::size_t d = 0; d < domains.size(); ++d) {
    const ScannedDomain& domain = domains[d];
    const Rng rng(options.seed, "data.vocabulary", domain.source->name);
    const double share = static_cast<double>(budgets[d]) /
                         static_cast<double>(std::max<std::int64_t>(1, training_bytes(domain)));
    MappedFile file;
    std::int64_t mapped_idx = -1;
    for (const ScannedDocument& document : domain.documents) {
      if (document.fate != Fate::train) continue;
      if (mapped_idx != document.file_idx) {
        file = MappedFile(domain.files[document.file_idx]);
        mapped_idx = document.file_idx;
      }
      ARCUS_REQUIRE(document.end <= file.size(), ExitCode::data,
                    "{} has shrunk while it was being read",
                    domain.files[document.file_idx].string());
      const std::string_view raw =
          file.bytes().substr(document.begin, document.end - document.begin);
      std::string rendered;
      if (domain.source->pairs) {
        for (const TextPart& part : read_pair(raw, how)) rendered += part.text;
      }
      sample_document(domain.source->pairs ? rendered : raw, document.hash, rng, share, lines);
    }
  }
  return lines;
}

}  // namespace arcus
