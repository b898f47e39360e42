#include "src/train/metrics.hpp"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>

#include "src/base/error.hpp"

namespace arcus {
namespace {

using Json = nlohmann::ordered_json;

Json number(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  return value;
}

}  // namespace

double EvalMetrics::bits_per_byte() const {
  double bits = 0;
  double bytes = 0;
  for (const DomainEval& domain : domains) {
    bits += domain.bits_per_byte * static_cast<double>(domain.bytes);
    bytes += static_cast<double>(domain.bytes);
  }
  return bytes > 0 ? bits / bytes : 0;
}

std::string to_json_line(const StepMetrics& m) {
  Json layers = Json::array();
  for (const LayerMetrics& layer : m.layers) {
    layers.push_back({{"tokens_per_expert", layer.tokens_per_expert},
                      {"dropped", layer.dropped},
                      {"entropy", number(layer.entropy)},
                      {"max_mean_load", number(layer.max_mean_load)}});
    if (layer.predictor_loss != 0) layers.back()["predictor_loss"] = number(layer.predictor_loss);
    if (layer.stream_gate == 0) continue;
    layers.back()["stream_share"] = number(layer.stream_share);
    layers.back()["stream_gate"] = number(layer.stream_gate);
  }
  Json line = {{"step", m.step},
               {"loss", number(m.loss)},
               {"ce", number(m.ce)},
               {"aux_loss", number(m.aux_loss)},
               {"z_loss", number(m.z_loss)},
               {"grad_norm", number(m.grad_norm)},
               {"lr", number(m.lr)},
               {"tokens", m.tokens},
               {"layers", std::move(layers)}};
  if (m.targets != m.tokens) line["targets"] = m.targets;
  if (!m.applied) {
    line["skipped"] = true;
    line["bad_tensor"] = m.bad_tensor;
  }
  line["timing"] = {{"step_ms", number(m.timing.step_ms)},
                    {"tokens_per_s", number(m.timing.tokens_per_s)},
                    {"comm_ms", number(m.timing.comm_ms)},
                    {"comm_bytes", m.timing.comm_bytes},
                    {"rank_load", number(m.timing.rank_load)},
                    {"straggler", m.timing.straggler},
                    {"straggler_ms", number(m.timing.straggler_ms)}};
  return line.dump();
}

double max_mean_load(std::span<const std::int64_t> tokens_per_expert) {
  std::int64_t total = 0;
  std::int64_t most = 0;
  for (const std::int64_t tokens : tokens_per_expert) {
    total += tokens;
    most = std::max(most, tokens);
  }
  if (total == 0) return 0;
  return static_cast<double>(most) * static_cast<double>(tokens_per_expert.size()) /
         static_cast<double>(total);
}

std::string to_json_line(const EvalMetrics& m, bool routing) {
  Json domains = Json::object();
  for (const DomainEval& domain : m.domains) {
    domains[domain.domain] = {{"loss", number(domain.loss)},
                              {"ppl", number(domain.ppl)},
                              {"bits_per_byte", number(domain.bits_per_byte)}};
    if (!routing) continue;
    domains[domain.domain]["tokens_per_expert"] = domain.tokens_per_expert;
    domains[domain.domain]["stream_share"] = domain.stream_share;
  }
  return Json{{"step", m.step}, {"eval", std::move(domains)}}.dump();
}

namespace {

/// Step of a line that is kept; none where it is damaged or of a later step.
std::optional<std::int64_t> kept_step(const Json& json, std::int64_t step) {
  if (!json.is_object() || !json.contains("step") || !json["step"].is_number_integer()) return {};
  const auto at = json["step"].get<std::int64_t>();
  return at <= step ? std::optional(at) : std::nullopt;
}

/// The kept lines alone; false, the file as it was, where there is no room for both.
bool rewrite(const std::string& file, std::int64_t step) {
  const std::string fresh = file + ".new";
  std::ifstream in(file);
  std::ofstream out(fresh, std::ios::binary | std::ios::trunc);
  for (std::string line; std::getline(in, line) && out;) {
    if (kept_step(Json::parse(line, nullptr, false), step)) out << line << '\n';
  }
  out.close();
  std::error_code error;
  if (out) std::filesystem::rename(fresh, file, error);
  const bool done = out && !error;
  if (!done) std::filesystem::remove(fresh, error);
  return done;
}

}  // namespace

KeptMetrics cut_metrics(const std::string& file, std::int64_t step) {
  KeptMetrics kept;
  if (!std::filesystem::exists(file)) return kept;
  std::ifstream in(file);
  std::uintmax_t end = 0;       // of the line
  std::uintmax_t kept_end = 0;  // of the last kept line
  bool dropped = false;
  bool mixed = false;  // dropped lines before kept ones
  for (std::string line; std::getline(in, line);) {
    const bool terminated = !in.eof();
    end += line.size() + (terminated ? 1 : 0);
    const Json json = Json::parse(line, nullptr, false);
    if (!json.is_object()) ++kept.damaged_lines;
    const auto at = kept_step(json, step);
    if (!at) {
      dropped = true;
      continue;
    }
    mixed = mixed || dropped;
    kept_end = end;
    kept.unterminated = !terminated;
    if (json.contains("eval")) kept.last_eval_step = *at;
  }
  in.close();
  if (!dropped || (mixed && rewrite(file, step))) return kept;
  std::error_code error;
  std::filesystem::resize_file(file, kept_end, error);
  ARCUS_REQUIRE(!error, ExitCode::usage, "cannot cut {} to step {}: {}", file, step,
                error.message());
  return kept;
}

}  // namespace arcus
