#include "src/train/metrics.hpp"

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
                    {"rank_load", number(m.timing.rank_load)}};
  return line.dump();
}

std::string to_json_line(const EvalMetrics& m) {
  Json domains = Json::object();
  for (const DomainEval& domain : m.domains) {
    domains[domain.domain] = {{"loss", number(domain.loss)},
                              {"ppl", number(domain.ppl)},
                              {"bits_per_byte", number(domain.bits_per_byte)}};
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
