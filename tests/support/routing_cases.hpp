#pragma once

#include <functional>
#include <ostream>
#include <string>
#include <vector>

#include "src/base/error.hpp"
#include "src/model/routing.hpp"

namespace arcus::testing {

/// One routing that is allowed: a name and what it sets in a configuration of E >= 4 experts.
struct RoutingCase {
  std::string name;
  std::function<void(ModelConfig&, RoutingConfig&)> apply;
};
inline std::ostream& operator<<(std::ostream& out, const RoutingCase& c) { return out << c.name; }

/// The plainest configuration of a select row.
inline void use_select(const SelectRow& select, ModelConfig& model, RoutingConfig& routing) {
  routing.select = select.name;
  if (select.topk != 0) model.topk = select.topk;
  if (select.all_experts) model.topk = model.num_experts;
  if (!select.steered) routing.aux_loss = 0;
  if (select.predicts) {
    routing.allow_future_leak = true;
    routing.renormalize = false;
    routing.capacity_factor = 1;
  }
}

inline void use_stream(const StreamRow& row, RoutingConfig& routing) {
  routing.stream = row.name;
  if (row.predicts) routing.allow_future_leak = true;
}

/// Turns one balance row on; a row that is not known here fails the tests that iterate them.
inline void activate(const BalanceRow& row, RoutingConfig& r) {
  r.aux_loss = 0;
  if (row.name == "aux_loss") {
    r.aux_loss = 0.1;
  } else if (row.name == "aux_loss_sequence") {
    r.aux_loss_sequence = 0.1;
  } else if (row.name == "aux_loss_global") {
    r.aux_loss_global = 0.1;
  } else if (row.name == "importance_loss") {
    r.importance_loss = 0.1;
  } else if (row.name == "load_loss") {
    r.load_loss = 0.1;
    r.noise = 1;
  } else if (row.name == "quantile_rate") {
    r.quantile_rate = 0.5;
    r.score = "sigmoid";
  }
  ARCUS_CHECK(row.active(r), "tests/support/routing_cases.hpp does not know how to turn on {}",
              row.name);
}

/// Every row of the tables at least once, with everything its properties allow: each score with
/// each selection, each balance row, and groups, bias, capacity and noise where they are taken.
inline std::vector<RoutingCase> routing_cases() {
  std::vector<RoutingCase> cases;
  const auto add = [&](const std::string& name, auto apply) { cases.push_back({name, apply}); };
  for (const SelectRow& select : select_table()) {
    const SelectRow* row = &select;
    const std::string name(select.name);
    for (const ScoreRow& score : score_table()) {
      const ScoreRow* own = &score;
      add(name + "_" + std::string(score.name), [=](ModelConfig& m, RoutingConfig& r) {
        use_select(*row, m, r);
        r.score = own->name;
      });
    }
    if (select.takes_capacity) {
      for (const char* policy : {"position", "probs"}) {
        add(name + "_capacity_" + policy, [=](ModelConfig& m, RoutingConfig& r) {
          use_select(*row, m, r);
          r.capacity_factor = 0.75;
          r.drop_policy = policy;
          r.renormalize_after_drop = r.renormalize && std::string_view(policy) == "probs";
        });
      }
    }
    if (select.takes_capacity) {
      add(name + "_padded", [=](ModelConfig& m, RoutingConfig& r) {
        use_select(*row, m, r);
        r.capacity_factor = 1.25;
        r.pad_to_capacity = true;
      });
    }
    if (select.takes_groups) {
      for (const char* score : {"top2_sum", "max"}) {
        add(name + "_groups_" + score, [=](ModelConfig& m, RoutingConfig& r) {
          use_select(*row, m, r);
          r.score = "sigmoid";
          r.n_group = m.num_experts / 2;
          r.topk_group = r.n_group - 1;
          r.group_score = score;
        });
      }
    }
    if (select.takes_bias) {
      for (const bool centered : {false, true}) {
        add(name + (centered ? "_centered_bias" : "_bias"), [=](ModelConfig& m, RoutingConfig& r) {
          use_select(*row, m, r);
          r.score = "sigmoid";
          r.expert_bias_rate = 0.01;
          r.center_bias = centered;
        });
      }
    }
    if (select.steered) {
      add(name + "_jitter", [=](ModelConfig& m, RoutingConfig& r) {
        use_select(*row, m, r);
        r.jitter = 0.1;
      });
      add(name + "_noise", [=](ModelConfig& m, RoutingConfig& r) {
        use_select(*row, m, r);
        r.noise = 1;
        r.gate_bias = true;
      });
    }
  }
  for (const BalanceRow& balance : balance_table()) {
    const BalanceRow* row = &balance;
    add("balance_" + std::string(balance.name),
        [=](ModelConfig&, RoutingConfig& r) { activate(*row, r); });
  }
  for (const StreamRow& stream : stream_table()) {
    if (!stream.decides) continue;
    const StreamRow* row = &stream;
    const std::string name = "stream_" + std::string(stream.name);
    add(name, [=](ModelConfig&, RoutingConfig& r) {
      use_stream(*row, r);
      r.stream_target_loss = 0.5;
      r.stream_target_share = 0.4;
    });
    if (stream.passes_all || stream.predicts) {
      add(name + "_padded", [=](ModelConfig&, RoutingConfig& r) {
        use_stream(*row, r);
        r.capacity_factor = 1.25;
        r.pad_to_capacity = true;
      });
    }
    // Every selection as its second level, with what balances it.
    for (const SelectRow& select : select_table()) {
      const SelectRow* second = &select;
      add(name + "_" + std::string(select.name), [=](ModelConfig& m, RoutingConfig& r) {
        use_select(*second, m, r);
        use_stream(*row, r);
        if (second->takes_capacity) r.capacity_factor = 0.75;
        if (second->steered) {
          r.noise = 1;
          r.aux_loss_sequence = r.importance_loss = r.load_loss = 0.1;
        }
        m.num_shared_experts = 1;
        m.shared_expert_gate = true;
      });
    }
  }
  add("everything", [](ModelConfig&, RoutingConfig& r) {
    for (const BalanceRow& row : balance_table()) activate(row, r);
    r.quantile_rate = 0;
    r.aux_loss = r.aux_loss_sequence = r.aux_loss_global = 0.05;
    r.importance_loss = 0.1;
    r.score = "cosine";
    r.z_loss = 0.01;
    r.gate_bias = true;
    r.jitter = 0.05;
    r.expert_bias_rate = 0.01;
    r.capacity_factor = 0.75;
    r.routed_scaling_factor = 2.5;
  });
  return cases;
}

}  // namespace arcus::testing
