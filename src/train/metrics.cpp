#include "src/train/metrics.hpp"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

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

KeptMetrics cut_metrics(const std::string& file, std::int64_t step) {
  KeptMetrics kept;
  if (!std::filesystem::exists(file)) return kept;
  std::ifstream in(file);
  std::string text;
  std::string line;
  bool changed = false;
  while (std::getline(in, line)) {
    const Json json = Json::parse(line, nullptr, false);
    if (!json.is_object() || !json.contains("step") || !json["step"].is_number_integer()) {
      // The last line of a run that was killed, or one that met a full disk.
      ++kept.damaged_lines;
      changed = true;
      continue;
    }
    const auto at = json["step"].get<std::int64_t>();
    if (at > step) {
      changed = true;
      continue;
    }
    if (json.contains("eval")) kept.last_eval_step = at;
    text += line + '\n';
  }
  in.close();
  if (!changed) return kept;
  const std::string fresh = file + ".new";
  std::ofstream out(fresh, std::ios::binary | std::ios::trunc);
  out << text;
  out.close();
  std::error_code error;
  if (out) std::filesystem::rename(fresh, file, error);
  ARCUS_REQUIRE(out && !error, ExitCode::usage, "cannot cut {} to step {} (is the disk full?)",
                file, step);
  return kept;
}

}  // namespace arcus
