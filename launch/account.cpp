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
    {"finish_gradient", Family::optimizer},
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
    seconds_[below] += products - ideal;
    seconds_[kSums] += work.sums / threads_;
    seconds_[kElementwise] += (work.busy - work.gemm - work.sums) / threads_;
    seconds_[kIdle] += total.seconds - work.busy / threads_;
  }

  double peak_gflops_;
  double threads_;
  std::array<double, StepAccount::kNumRows> seconds_{};
};

/// The bytes of every rank's text, in rank order, on all ranks.
std::vector<std::string> gather_texts(Session& session, const std::string& text) {
  const auto ranks = static_cast<std::size_t>(session.comm().size());
  const auto own = static_cast<std::size_t>(session.rank());
  std::vector<std::int64_t> ones(ranks, 1);
  std::vector<std::int64_t> offsets(ranks);
  for (std::size_t r = 0; r < ranks; ++r) offsets[r] = static_cast<std::int64_t>(r);
  std::vector<std::int64_t> sizes(ranks);
  sizes[own] = std::ssize(text);
  session.stream().wait(session.comm().all_gather_v(
      session.stream(), {{sizes.data(), DType::i64, 1, std::ssize(sizes)}, ones, offsets}));
  std::int64_t total = 0;
  for (std::size_t r = 0; r < ranks; ++r) {
    offsets[r] = total;
    total += sizes[r];
  }
  std::string all(static_cast<std::size_t>(total), '\0');
  std::copy(text.begin(), text.end(), all.begin() + offsets[own]);
  session.stream().wait(session.comm().all_gather_v(
      session.stream(), {{all.data(), DType::u8, 1, total}, sizes, offsets}));
  std::vector<std::string> texts;
  for (std::size_t r = 0; r < ranks; ++r) {
    texts.push_back(
        all.substr(static_cast<std::size_t>(offsets[r]), static_cast<std::size_t>(sizes[r])));
  }
  return texts;
}

}  // namespace

const std::array<const char*, StepAccount::kNumRows>& StepAccount::names() {
  static constexpr std::array<const char*, kNumRows> kNames = {
      "experts' products at the measured peak",
      "experts' products below it",
      "projections and head at the measured peak",
      "projections and head below it",
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

void print_account(Session& session, const StepAccount& account) {
  std::string mine;
  for (const double part : account.ms) mine += fmt::format("{} ", part);
  mine += fmt::format("{}", account.step_ms);
  std::vector<std::array<double, StepAccount::kNumRows + 1>> ranks;
  for (const std::string& text : gather_texts(session, mine)) {
    auto& values = ranks.emplace_back();
    const char* at = text.c_str();
    char* end = nullptr;
    for (double& value : values) {
      value = std::strtod(at, &end);
      at = end;
    }
  }
  if (!session.is_root()) return;
  const double count = static_cast<double>(ranks.size());
  const auto line = [&](const char* name, auto value_of) {
    double mean = 0;
    double step = 0;
    fmt::print("{:<44}", name);
    for (const auto& rank : ranks) {
      fmt::print(" {:>9.2f}", value_of(rank));
      mean += value_of(rank) / count;
      step += rank.back() / count;
    }
    fmt::print(" {:>9.2f} {:>7.1f} %\n", mean, 100 * mean / step);
  };
  fmt::print("\n{:<44}", "ms a step, measured (waits apart)");
  for (std::size_t r = 0; r < ranks.size(); ++r) fmt::print(" {:>9}", fmt::format("rank {}", r));
  fmt::print(" {:>9} {:>9}\n", "mean", "of step");
  for (std::size_t row = 0; row < StepAccount::kNumRows; ++row) {
    line(StepAccount::names()[row], [=](const auto& rank) { return rank[row]; });
  }
  line("sum of the rows", [](const auto& rank) {
    double sum = 0;
    for (std::size_t row = 0; row < StepAccount::kNumRows; ++row) sum += rank[row];
    return sum;
  });
  line("step", [](const auto& rank) { return rank.back(); });
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
  const std::vector<std::string> texts = gather_texts(session, mine);
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
