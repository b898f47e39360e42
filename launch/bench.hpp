#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "launch/run_config.hpp"
#include "launch/session.hpp"

namespace arcus {

/// What all benchmarks are told: the model (by default the one of configs/bench.toml) and how long
/// to measure.
struct BenchOptions {
  Config config;
  std::int64_t repeats = 20;
  bool account = false;     ///< bench step: where the time of a step goes
  std::string trace;        ///< bench step: file that takes the spans of one step; empty = none
  std::string json;         ///< bench step: file that takes every figure; empty = none
  bool overlap = false;     ///< bench dispatch: how much of an exchange hides behind computing
  double repeated = 0;      ///< bench step: share of the made-up tokens that are one and the same
  std::string dir = ".";    ///< bench checkpoint: folder to write in
  std::int64_t mib = 1024;  ///< bench checkpoint: size of the state
};

/// Times of several runs of one thing, in milliseconds.
struct Samples {
  std::vector<double> ms;
  double median() const;
  double least() const;
  double most() const;
};
/// Calls `fn` `warmup` + `repeats` times; all ranks start each call together, and a sample is the
/// slowest rank's time. Collective.
Samples measure(Session& session, Stream& stream, std::int64_t repeats,
                const std::function<void()>& fn, std::int64_t warmup = 2);
/// The same for several things in turn, sample by sample, so that a busy moment of the machine hits
/// all of them.
std::vector<Samples> measure_in_turn(Session& session, Stream& stream, std::int64_t repeats,
                                     const std::vector<std::function<void()>>& things,
                                     std::int64_t warmup = 2);
/// Every rank's number, in rank order. Collective.
std::vector<double> gather(Session& session, double value);
/// The sum over all ranks, in rank order. Collective.
double sum_over_ranks(Session& session, double value);

/// Saving and loading beside plain files of the same bytes.
ExitCode bench_checkpoint(Session& session, const BenchOptions& options);
/// Share of the machine's own matrix-product peak that the grouped feed-forward reaches.
ExitCode bench_gemm(Session& session, const BenchOptions& options);
/// Bandwidth of dispatch and combine beside the library's Alltoallv of the same bytes.
ExitCode bench_dispatch(Session& session, const BenchOptions& options);
/// Time of a new token with a KV cache beside what reading the weights must take.
ExitCode bench_generate(Session& session, const BenchOptions& options);
/// Tokens per second of whole training steps beside a roofline, and the cost of order-independent
/// sums.
ExitCode bench_step(Session& session, const BenchOptions& options);

}  // namespace arcus
