#include "launch/account.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <string_view>

#include "src/base/error.hpp"

namespace arcus {
namespace {

enum Row {
  kExpertsAtPeak,
  kExpertsBelow,
  kDenseAtPeak,
  kDenseBelow,
  kTilePadding,
  kSums,
  kAttention,
  kElementwise,
  kGate,
  kIdle,
  kCounts,
  kPayload,
  kWaiting,
  kReduction,
  kOptimizer,
  kData,
  kOther,
};

enum class Family {
  experts,
  dense,
  attention,
  gate,
  optimizer,
  data,
  reduction,
  other,
  elementwise
};

struct Named {
  std::string_view name;
  Family family;
};

/// Spans by name; ops that are not named here are element-wise.
constexpr Named kNamed[] = {
    {"ffn_", Family::experts},
    {"linear_", Family::dense},
    {"low_rank_", Family::dense},
    {"attention_", Family::attention},
    {"gate_", Family::gate},
    {"select_", Family::gate},
    {"sample_second", Family::gate},
    {"list_chosen", Family::gate},
    {"apply_capacity", Family::gate},
    {"combine_weights", Family::gate},
    {"aux_loss", Family::gate},
    {"importance_loss", Family::gate},
    {"load_loss", Family::gate},
    {"quantile_scores", Family::gate},
    {"column_quantiles", Family::gate},
    {"predictor_loss", Family::gate},
    {"column_mean", Family::gate},
    {"decision_backward", Family::gate},
    {"jitter", Family::gate},
    {"cosine_logits", Family::gate},
    {"gather_rows", Family::gate},
    {"weighted_sum", Family::gate},
    {"plan", Family::gate},
    {"dispatch", Family::gate},
    {"combine", Family::gate},
    {"adamw", Family::optimizer},
    {"gradient_squares", Family::optimizer},
    {"gradient norm", Family::optimizer},
    {"data", Family::data},
    {"reduction", Family::reduction},
    {"metrics", Family::reduction},
    {"step", Family::other},
};

constexpr std::string_view kExchanges[] = {"wait",         "all_to_all_v",     "all_reduce",
                                           "all_gather_v", "reduce_scatter_v", "broadcast"};

Family family_of(std::string_view name) {
  for (const Named& named : kNamed) {
    if (name.starts_with(named.name)) return named.family;
  }
  return Family::elementwise;
}

/// Which row an exchange, or the wait for one, belongs to: that of the span around it.
Row row_of_exchange(const char* outer) {
  const std::string_view name = outer == nullptr ? "" : outer;
  if (name == "counts exchange") return kCounts;
  if (name == "reduction" || name == "metrics" || name == "gradient norm") return kReduction;
  return kPayload;
}

Row row_of(Family family) {
  switch (family) {
    case Family::attention:
      return kAttention;
    case Family::gate:
      return kGate;
    case Family::optimizer:
      return kOptimizer;
    case Family::data:
      return kData;
    case Family::reduction:
      return kReduction;
    case Family::other:
      return kOther;
    default:
      return kElementwise;
  }
}

class Accountant {
 public:
  Accountant(double peak_gflops, int num_threads)
      : peak_gflops_(peak_gflops), threads_(static_cast<double>(num_threads)) {}

  void add(const Profile::Total& total) {
    const std::string_view name = total.name;
    if (name == "barrier") {
      seconds_[kWaiting] += total.seconds;
    } else if (name == "counts exchange") {
      seconds_[kCounts] += total.seconds;
    } else if (std::ranges::find(kExchanges, name) != std::end(kExchanges)) {
      seconds_[row_of_exchange(total.outer)] += total.seconds;
    } else if (const Family family = family_of(name); family == Family::experts) {
      add_products(total, kExpertsAtPeak, kExpertsBelow);
    } else if (family == Family::dense) {
      add_products(total, kDenseAtPeak, kDenseBelow);
    } else {
      seconds_[row_of(family)] += total.seconds;
    }
  }
  const std::array<double, StepAccount::kNumRows>& seconds() const { return seconds_; }

 private:
  /// An op made of matrix products: what its threads did, and what they did not.
  void add_products(const Profile::Total& total, Row at_peak, Row below) {
    const Profile::Work& work = total.work;
    const double products = work.gemm / threads_;
    const double ideal = (work.gemm_flops - work.padding_flops) / peak_gflops_ / 1e9;
    seconds_[at_peak] += ideal;
    const double padding =
        work.gemm_flops > 0 ? products * work.padding_flops / work.gemm_flops : 0;
    seconds_[kTilePadding] += padding;
    seconds_[below] += products - ideal - padding;
    seconds_[kSums] += work.sums / threads_;
    seconds_[kElementwise] += (work.busy - work.gemm - work.sums) / threads_;
    seconds_[kIdle] += total.seconds - work.busy / threads_;
  }

  double peak_gflops_;
  double threads_;
  std::array<double, StepAccount::kNumRows> seconds_{};
};

}  // namespace

const std::array<const char*, StepAccount::kNumRows>& StepAccount::names() {
  static constexpr std::array<const char*, kNumRows> kNames = {
      "experts' products at the measured peak",
      "experts' products below it",
      "projections and head at the measured peak",
      "projections and head below it",
      "zero rows that fill tiles of fixed height",
      "order-independent sums",
      "attention",
      "element-wise",
      "gate and permutation",
      "threads idle inside products",
      "counts exchange",
      "payload exchange not hidden",
      "waiting for others",
      "reduction and gathering",
      "optimizer",
      "data",
      "other"};
  return kNames;
}

double StepAccount::sum() const {
  double total = 0;
  for (const double part : ms) total += part;
  return total;
}

StepAccount account_of(const Profile& profile, double seconds, std::int64_t steps,
                       double peak_gflops, int num_threads) {
  Accountant accountant(peak_gflops, num_threads);
  for (const Profile::Total& total : profile.totals()) accountant.add(total);
  StepAccount account;
  const double to_ms = 1e3 / static_cast<double>(steps);
  account.step_ms = seconds * to_ms;
  for (std::size_t row = 0; row < StepAccount::kNumRows; ++row) {
    account.ms[row] = accountant.seconds()[row] * to_ms;
  }
  return account;
}

std::vector<StepAccount> gather_accounts(Session& session, const StepAccount& account) {
  std::string mine;
  for (const double part : account.ms) mine += fmt::format("{} ", part);
  mine += fmt::format("{}", account.step_ms);
  std::vector<StepAccount> accounts;
  for (const std::string& text : gather_texts(session.comm(), session.stream(), mine)) {
    StepAccount& of_rank = accounts.emplace_back();
    const char* at = text.c_str();
    char* end = nullptr;
    for (double& part : of_rank.ms) {
      part = std::strtod(at, &end);
      at = end;
    }
    of_rank.step_ms = std::strtod(at, &end);
  }
  return accounts;
}

StepAccount mean_account(const std::vector<StepAccount>& ranks) {
  const double count = static_cast<double>(ranks.size());
  StepAccount mean;
  for (const StepAccount& rank : ranks) {
    for (std::size_t row = 0; row < StepAccount::kNumRows; ++row) {
      mean.ms[row] += rank.ms[row] / count;
    }
    mean.step_ms += rank.step_ms / count;
  }
  return mean;
}

void print_accounts(const std::vector<StepAccount>& ranks) {
  const StepAccount mean = mean_account(ranks);
  const auto line = [&](const char* name, auto value_of) {
    fmt::print("{:<44}", name);
    for (const StepAccount& rank : ranks) fmt::print(" {:>9.2f}", value_of(rank));
    fmt::print(" {:>9.2f} {:>7.1f} %\n", value_of(mean), 100 * value_of(mean) / mean.step_ms);
  };
  fmt::print("\n{:<44}", "ms a step, measured (waits apart)");
  for (std::size_t r = 0; r < ranks.size(); ++r) fmt::print(" {:>9}", fmt::format("rank {}", r));
  fmt::print(" {:>9} {:>9}\n", "mean", "of step");
  for (std::size_t row = 0; row < StepAccount::kNumRows; ++row) {
    line(StepAccount::names()[row], [=](const StepAccount& rank) { return rank.ms[row]; });
  }
  line("sum of the rows", [](const StepAccount& rank) { return rank.sum(); });
  line("step", [](const StepAccount& rank) { return rank.step_ms; });
}

void write_trace(Session& session, const Profile& profile, const std::string& file) {
  std::string mine = fmt::format(
      R"({{"name":"thread_name","ph":"M","pid":0,"tid":{0},"args":{{"name":"rank {0}"}}}})",
      session.rank());
  for (const Profile::Event& event : profile.events()) {
    mine += fmt::format(
        ",\n"
        R"({{"name":"{}","ph":"X","pid":0,"tid":{},"ts":{:.3f},"dur":{:.3f}}})",
        event.name, session.rank(), event.begin * 1e6, (event.end - event.begin) * 1e6);
  }
  const std::vector<std::string> texts = gather_texts(session.comm(), session.stream(), mine);
  session.together([&] {
    if (!session.is_root()) return;
    std::ofstream out(file, std::ios::trunc);
    out << "{\"traceEvents\":[\n";
    for (std::size_t r = 0; r < texts.size(); ++r) out << (r > 0 ? ",\n" : "") << texts[r];
    out << "\n]}\n";
    out.close();
    ARCUS_REQUIRE(out.good(), ExitCode::usage, "cannot write the trace {}: is the folder there?",
                  file);
  });
}

}  // namespace arcus
