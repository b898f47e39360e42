#include "launch/eval_ids.hpp"

#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <optional>

#include "checkpoints/files.hpp"
#include "launch/run_setup.hpp"
#include "src/base/error.hpp"
#include "src/base/hdf5.hpp"
#include "src/train/logits.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;

using Texts = std::vector<std::vector<std::int32_t>>;

std::vector<std::int32_t> parse_ids(const std::string& line, const std::string& where) {
  std::vector<std::int32_t> ids;
  const char* at = line.data();
  const char* const end = at + line.size();
  const auto skip = [&] {
    while (at < end && (*at == ' ' || *at == '\t' || *at == ',' || *at == '\r')) ++at;
  };
  for (skip(); at < end; skip()) {
    std::int32_t id = -1;
    const auto [next, error] = std::from_chars(at, end, id);
    ARCUS_REQUIRE(error == std::errc() && id >= 0, ExitCode::data,
                  "{}: \"{}\" is no token id; a line holds decimal ids with blanks between them",
                  where,
                  std::string(at, std::min<std::size_t>(12, static_cast<std::size_t>(end - at))));
    ids.push_back(id);
    at = next;
  }
  return ids;
}

Texts read_ids(const std::string& path) {
  std::ifstream file(path);
  ARCUS_REQUIRE(file.good(), ExitCode::data, "cannot read the ids in {}", path);
  Texts texts;
  std::int64_t number = 0;
  for (std::string line; std::getline(file, line);) {
    auto ids = parse_ids(line, fmt::format("{}:{}", path, ++number));
    if (!ids.empty()) texts.push_back(std::move(ids));
  }
  ARCUS_REQUIRE(!texts.empty(), ExitCode::data, "{} holds no ids", path);
  return texts;
}

void check_ids(const Texts& texts, std::int64_t vocab_size, const std::string& path) {
  for (std::size_t i = 0; i < texts.size(); ++i) {
    for (const std::int32_t id : texts[i]) {
      ARCUS_REQUIRE(id < vocab_size, ExitCode::data,
                    "{}: text {} holds the id {}; the model's vocabulary ends at {}", path, i + 1,
                    id, vocab_size - 1);
    }
  }
}

/// Writes logits as they come; a file that is not finished is removed.
class LogitsFile {
 public:
  LogitsFile(const std::string& path, const Texts& texts, std::int64_t vocab_size)
      : path_(path), partial_(path + ".partial") {
    require_replaceable();
    std::vector<std::int64_t> offsets{0};
    for (const auto& text : texts) offsets.push_back(offsets.back() + std::ssize(text));
    file_.emplace(h5::File::create(partial_, ExitCode::data));
    file_->write("text_offsets", {std::ssize(offsets)}, offsets.data());
    logits_.emplace(file_->create_dataset("logits", DType::f32, {offsets.back(), vocab_size}));
  }
  LogitsFile(const LogitsFile&) = delete;
  LogitsFile& operator=(const LogitsFile&) = delete;
  ~LogitsFile() {
    logits_.reset();
    file_.reset();
    std::error_code ignored;
    fs::remove(partial_, ignored);
  }
  void append(ConstTensorView logits) {
    for (std::int64_t row = 0; row < logits.rows; ++row) {
      logits_->write_rows(next_row_++, 1, logits.row<float>(row));
    }
  }
  void finish() {
    logits_.reset();
    file_->close();
    files::sync(partial_);
    files::rename_synced(partial_, fs::absolute(path_));
  }

 private:
  /// Another file than one of this kind is somebody's, the ids' own above all.
  void require_replaceable() const {
    if (!fs::exists(path_)) return;
    std::ifstream file(path_, std::ios::binary);
    std::string begin(4, ' ');
    file.read(begin.data(), 4);
    ARCUS_REQUIRE(
        begin == "\x89HDF", ExitCode::data,
        "--logits {}: it exists and is no HDF5 file, so it is not replaced; choose another", path_);
  }

  std::string path_, partial_;
  std::optional<h5::File> file_;
  std::optional<h5::Dataset> logits_;
  std::int64_t next_row_ = 0;
};

}  // namespace

ExitCode evaluate_ids(Session& session, const std::string& path,
                      const std::vector<std::string>& sets, const std::string& ids_file,
                      const std::string& out) {
  Texts texts;
  session.together([&] { texts = read_ids(ids_file); });
  std::int64_t longest = 1;
  for (const auto& text : texts) longest = std::max(longest, std::ssize(text));
  LoadedModel model = load_for_logits(session, path, sets, longest, /*exact=*/false);
  const std::int64_t vocab = model.instance->options().model.vocab_size;
  std::optional<LogitsFile> file;
  session.together([&] {
    check_ids(texts, vocab, ids_file);
    if (session.is_root() && !out.empty()) file.emplace(out, texts, vocab);
  });
  double loss = 0;
  std::int64_t targets = 0;
  evaluate_logits(
      *model.instance, texts, [&](std::size_t text, std::int64_t first, ConstTensorView logits) {
        if (file) file->append(logits);
        const auto& ids = texts[text];
        for (std::int64_t row = 0; row < logits.rows; ++row) {
          const auto next = static_cast<std::size_t>(first + row + 1);
          if (next >= ids.size()) continue;
          loss +=
              next_token_loss({logits.row<float>(row), static_cast<std::size_t>(vocab)}, ids[next]);
          ++targets;
        }
      });
  session.together([&] {
    if (file) file->finish();
  });
  if (!session.is_root()) return ExitCode::ok;
  const double mean = loss / static_cast<double>(std::max<std::int64_t>(1, targets));
  fmt::print("{} texts, {} next tokens, loss {:.6f}, perplexity {:.4f}\n", texts.size(), targets,
             mean, std::exp(mean));
  return ExitCode::ok;
}

}  // namespace arcus
