#include "launch/bench.hpp"

#include <algorithm>
#include <chrono>

#include "src/base/error.hpp"

namespace arcus {
std::vector<double> gather(Session& session, double value) {
  const auto ranks = static_cast<std::size_t>(session.comm().size());
  std::vector<double> values(ranks);
  std::vector<std::int64_t> counts(ranks, 1);
  std::vector<std::int64_t> offsets(ranks);
  for (std::size_t r = 0; r < ranks; ++r) offsets[r] = static_cast<std::int64_t>(r);
  values[static_cast<std::size_t>(session.rank())] = value;
  const TensorView buffer(values.data(), DType::f64, 1, session.comm().size());
  session.stream().wait(session.comm().all_gather_v(session.stream(), {buffer, counts, offsets}));
  return values;
}

double Samples::median() const {
  ARCUS_CHECK(!ms.empty(), "no samples");
  std::vector<double> sorted = ms;
  std::sort(sorted.begin(), sorted.end());
  const std::size_t middle = sorted.size() / 2;
  return sorted.size() % 2 == 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

double Samples::least() const { return *std::min_element(ms.begin(), ms.end()); }

double Samples::most() const { return *std::max_element(ms.begin(), ms.end()); }

std::vector<Samples> measure_in_turn(Session& session, Stream& stream, std::int64_t repeats,
                                     const std::vector<std::function<void()>>& things,
                                     std::int64_t warmup) {
  std::vector<Samples> samples(things.size());
  for (std::int64_t i = -warmup; i < repeats; ++i) {
    for (std::size_t thing = 0; thing < things.size(); ++thing) {
      session.comm().barrier(stream);
      const auto begin = std::chrono::steady_clock::now();
      things[thing]();
      const std::chrono::duration<double, std::milli> spent =
          std::chrono::steady_clock::now() - begin;
      const std::vector<double> all = gather(session, spent.count());
      if (i >= 0) samples[thing].ms.push_back(*std::max_element(all.begin(), all.end()));
    }
  }
  return samples;
}

Samples measure(Session& session, Stream& stream, std::int64_t repeats,
                const std::function<void()>& fn, std::int64_t warmup) {
  return measure_in_turn(session, stream, repeats, {fn}, warmup).front();
}

double sum_over_ranks(Session& session, double value) {
  double sum = 0;
  for (const double part : gather(session, value)) sum += part;
  return sum;
}

}  // namespace arcus
