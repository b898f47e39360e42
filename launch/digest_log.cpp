#include "launch/digest_log.hpp"

#include <nlohmann/json.hpp>

#include "src/base/hash.hpp"
#include "src/base/log.hpp"
#include "src/train/metrics.hpp"

namespace arcus {

using Json = nlohmann::ordered_json;

DigestLog::DigestLog(const std::filesystem::path& run_dir, std::int64_t steps_done)
    : file_(run_dir / kDigestLogName) {
  broken_ = cut_metrics(file_.string(), steps_done).unterminated;
  out_.open(file_, std::ios::app);
  ARCUS_REQUIRE(out_.is_open(), ExitCode::usage, "cannot write {}", file_.string());
}

void DigestLog::write(std::int64_t step, const Checkpoint& state) {
  Json tensors = Json::object();
  for (const StoredTensor& tensor : state.tensors) {
    if (tensor.block_hashes.empty()) continue;
    Json& units = tensors[tensor.spec.name] = Json::array();
    for (std::int64_t unit = 0; unit < tensor.spec.num_units; ++unit) {
      units.push_back(hex(tensor.unit_hash(unit)));
    }
  }
  out_ << (broken_ ? "\n" : "")
       << Json{{"step", step}, {"digest", hex(state.digest())}, {"tensors", std::move(tensors)}}
       << '\n'
       << std::flush;
  broken_ = !out_;
  if (!out_ && !warned_) {
    spdlog::warn("cannot write {} (is the disk full?); training goes on", file_.string());
    warned_ = true;
  }
  out_.clear();
}

std::optional<DigestLine> parse_digest_line(const std::string& text) {
  try {
    const Json json = Json::parse(text);
    DigestLine line{.digest = json.at("digest").get<std::string>(), .tensors = {}};
    for (const auto& [name, units] : json.at("tensors").items()) {
      line.tensors[name] = units.get<std::vector<std::string>>();
    }
    return line;
  } catch (const Json::exception&) {
    return std::nullopt;
  }
}

}  // namespace arcus
