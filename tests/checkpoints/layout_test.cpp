#include <chrono>
#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>

#include "checkpoints/inspect.hpp"
#include "checkpoints/layout.hpp"
#include "checkpoints/run_lock.hpp"
#include "src/base/hash.hpp"
#include "tests/checkpoints/fixture.hpp"

namespace arcus::test {
namespace {

/// The digest as FORMAT.md defines it, from the whole tensors.
std::uint64_t digest_by_hand(std::int64_t step) {
  std::vector<std::string> lines;
  for (const TensorCase& tensor : tensor_cases()) {
    const TensorSpec& spec = tensor.spec;
    const auto bytes = content_of(spec, step);
    const auto unit_bytes = bytes.size() / static_cast<std::size_t>(spec.num_units);
    const std::size_t row = static_cast<std::size_t>(spec.cols()) * size_of(spec.dtype);
    const std::size_t fewest_rows =
        (65536 + static_cast<std::size_t>(spec.cols()) - 1) / static_cast<std::size_t>(spec.cols());
    std::vector<std::uint64_t> hashes;
    for (std::size_t unit = 0; unit < bytes.size(); unit += unit_bytes) {
      for (std::size_t at = 0; at < unit_bytes; at += fewest_rows * row) {
        hashes.push_back(
            hash_bytes(bytes.data() + unit + at, std::min(fewest_rows * row, unit_bytes - at)));
      }
    }
    const std::string dims =
        spec.shape.empty() ? "-" : fmt::format("{}", fmt::join(spec.shape, "x"));
    lines.push_back(fmt::format("{} {} {} {}\n", spec.name, name_of(spec.dtype), dims,
                                hex(hash_bytes(hashes.data(), hashes.size() * 8))));
  }
  std::sort(lines.begin(), lines.end());
  return hash_text(std::accumulate(lines.begin(), lines.end(), std::string()));
}

TEST(Checkpoint, AnyRanksSaveAndAnyRanksLoadTheSameBits) {
  const std::uint64_t digest = digest_by_hand(5);
  for (int savers = 1; savers <= 4; ++savers) {
    for (const std::uint64_t seed : {0, 11}) {
      const TemporaryFolder run;
      const SaveReport report = save_at(run.path(), 5, savers, seed);
      EXPECT_EQ(report.digest, digest) << savers << " ranks, seed " << seed;
      EXPECT_EQ(open_checkpoint(report.path).digest(), digest);
      EXPECT_EQ(open_checkpoint(report.path).info.num_ranks, savers);
      EXPECT_NO_THROW(verify_checkpoint(open_checkpoint(report.path)));
      for (int loaders = 1; loaders <= 4; ++loaders) {
        expect_content(report.path, 5, loaders, seed + 1);
      }
    }
  }
}

TEST(Checkpoint, DigestOfTheStateInMemoryIsThatOfTheCheckpoint) {
  run_on_threads(3, {}, [&](Communicator& world) {
    Stream stream(1);
    RankState state(tensor_cases(), world.rank(), world.size(), 4);
    state.fill(9);
    EXPECT_EQ(state_digest(world, stream, state.views()), digest_by_hand(9));
  });
  EXPECT_NE(digest_by_hand(9), digest_by_hand(8));
}

TEST(Checkpoint, EveryRankReadsWhatItNeedsAndNoMore) {
  const TemporaryFolder run;
  save_at(run.path(), 6, 4, 7);
  for (const int loaders : {1, 2, 3, 6}) {
    run_on_threads(loaders, {}, [&](Communicator& world) {
      Stream stream(1);
      RankState state(tensor_cases(), world.rank(), world.size(), 8);
      std::int64_t needed = 0;
      for (const StateView& view : state.views()) {
        for (const StateSlice& slice : view.slices) {
          if (view.spec.num_elements() == 0) continue;
          needed += (slice.rows.end - slice.rows.begin) * view.spec.cols() *
                    static_cast<std::int64_t>(size_of(view.spec.dtype));
        }
      }
      const auto resumed = resume_checkpoint(world, stream, run.path(), "auto", state.views());
      ASSERT_TRUE(resumed);
      EXPECT_EQ(resumed->bytes_read, needed) << "rank " << world.rank() << " of " << loaders;
    });
  }
}

TEST(Checkpoint, LoadersMayShareRows) {
  const TemporaryFolder run;
  const auto path = save_at(run.path(), 2, 3, 5).path;
  run_on_threads(2, {}, [&](Communicator& world) {
    Stream stream(1);
    RankState everything(tensor_cases(), 0, 1, 0);
    everything.clear();
    load_checkpoint(world, stream, path, everything.views());
    EXPECT_EQ(everything.differences(2), std::vector<std::string>{});
  });
}

TEST(Checkpoint, InformationComesBack) {
  const TemporaryFolder run;
  const Checkpoint checkpoint = open_checkpoint(save_at(run.path(), 3, 2).path);
  const CheckpointInfo expected = info_at(3);
  EXPECT_EQ(checkpoint.info.step, 3);
  EXPECT_EQ(checkpoint.info.config_text, expected.config_text);
  EXPECT_EQ(checkpoint.info.fingerprint, expected.fingerprint);
  EXPECT_EQ(checkpoint.info.run_id, expected.run_id);
  EXPECT_EQ(checkpoint.info.created_by, expected.created_by);
  EXPECT_EQ(checkpoint.info.extra, expected.extra);
}

TEST(Checkpoint, ReaderReadsUnits) {
  const TemporaryFolder run;
  const Checkpoint checkpoint = open_checkpoint(save_at(run.path(), 3, 3, 8).path);
  const StoredTensor& tensor = *checkpoint.find("model.layers.0.mlp.experts.gate_up_proj");
  const auto whole = content_of(tensor.spec, 3);
  const std::size_t unit_bytes = whole.size() / 5;
  TensorReader reader(checkpoint);
  std::vector<char> unit(unit_bytes);
  for (std::int64_t expert = 4; expert >= 0; --expert) {
    reader.read(tensor, {expert * 96, (expert + 1) * 96}, unit.data());
    EXPECT_EQ(std::memcmp(unit.data(), whole.data() + static_cast<std::size_t>(expert) * unit_bytes,
                          unit_bytes),
              0);
  }
  error_of([&] { reader.read(tensor, {1, 96}, unit.data()); }, ExitCode::internal);
}

TEST(Checkpoint, EvaluationLoadsASubset) {
  const TemporaryFolder run;
  const auto path = save_at(run.path(), 3, 2).path;
  std::vector<TensorCase> weights = tensor_cases();
  weights.erase(weights.begin() + 2);
  const auto world = make_self_communicator();
  Stream stream(1);
  RankState state(weights, 0, 1, 0);
  load_checkpoint(*world, stream, path, state.views(), Match::subset);
  EXPECT_EQ(state.differences(3), std::vector<std::string>{});
  const std::string message =
      error_of([&] { load_checkpoint(*world, stream, path, state.views(), Match::exact); });
  EXPECT_CONTAINS(message, "unknown to this run: m/model.layers.0.mlp.experts.gate_up_proj");
}

TEST(Checkpoint, WhatDoesNotFitIsNamed) {
  const TemporaryFolder run;
  const auto path = save_at(run.path(), 3).path;
  const auto world = make_self_communicator();
  Stream stream(1);
  const auto message_with = [&](auto&& change) {
    std::vector<TensorCase> cases = tensor_cases();
    change(cases);
    RankState state(cases, 0, 1, 0);
    return error_of([&] { load_checkpoint(*world, stream, path, state.views()); });
  };
  EXPECT_CONTAINS(message_with([](auto& cases) { cases[6].spec.shape = {65}; }),
                  "model.norm.weight (checkpoint: f32 64 in 1 units; run: f32 65 in 1 units)");
  EXPECT_CONTAINS(message_with([](auto& cases) { cases[3].spec.dtype = DType::u16; }),
                  "down_proj (checkpoint: bf16");
  EXPECT_CONTAINS(message_with([](auto& cases) { cases[3].spec.num_units = 1; }), "in 1 units");
  EXPECT_CONTAINS(message_with([](auto& cases) { cases[0].spec.name = "other"; }),
                  "missing in it: other; unknown to this run: model.embed_tokens.weight");
}

TEST(Checkpoint, RowsSavedTwiceOrNotAtAllAreRefused) {
  const TemporaryFolder run;
  const auto message_with = [&](auto&& change) {
    return error_of(
        [&] {
          run_on_threads(3, {}, [&](Communicator& world) {
            Stream stream(1);
            RankState state(tensor_cases(), world.rank(), world.size(), 0);
            std::vector<StateView> views(state.views().begin(), state.views().end());
            change(world.rank(), views);
            save_checkpoint(world, stream, run.path(), info_at(1), views);
          });
        },
        ExitCode::internal);
  };
  EXPECT_CONTAINS(message_with([](int rank, auto& views) {
                    if (rank == 1) views[1].slices.clear();
                  }),
                  "no rank saves rows");
  RankState all(tensor_cases(), 0, 1, 0);
  EXPECT_CONTAINS(message_with([&](int rank, auto& views) {
                    if (rank == 2) views[1] = all.views()[1];
                  }),
                  "experts.gate_up_proj are saved twice");
  EXPECT_CONTAINS(message_with([](int rank, auto& views) {
                    if (rank == 2) views.pop_back();
                  }),
                  "ranks 0 and 2 save different tensors");
  EXPECT_CONTAINS(message_with([](int rank, auto& views) {
                    if (rank == 2) views[1].slices[0].rows.begin += 1;
                  }),
                  "rank 2: row 353 of tensor");
  EXPECT_EQ(names_in(run.path() / "checkpoints"), std::vector<std::string>{});
}

TEST(Checkpoint, ManySmallTensors) {
  std::vector<TensorCase> cases;
  for (int i = 0; i < 3000; ++i) {
    cases.push_back({{"layer." + std::to_string(i), DType::f32, {3, 2}, 1}, i % 2 == 0});
  }
  const TemporaryFolder run;
  run_on_threads(3, {}, [&](Communicator& world) {
    Stream stream(1);
    RankState state(cases, world.rank(), world.size(), 6);
    state.fill(1);
    const auto report = save_checkpoint(world, stream, run.path(), info_at(1), state.views());
    state.clear();
    load_checkpoint(world, stream, report.path, state.views());
    EXPECT_EQ(state.differences(1), std::vector<std::string>{});
  });
}

TEST(Checkpoint, KeepsTheNewestAndMilestones) {
  const TemporaryFolder run;
  for (std::int64_t step = 1; step <= 9; ++step) {
    save_at(run.path(), step, 1, 0, {.keep = 2, .keep_every = 4});
  }
  EXPECT_EQ(
      names_in(run.path() / "checkpoints"),
      (std::vector<std::string>{"latest", "step-00000004", "step-00000008", "step-00000009"}));
  // A run that went back leaves later checkpoints alone, and they count for nothing.
  save_at(run.path(), 6, 1, 0, {.keep = 1});
  EXPECT_EQ(
      names_in(run.path() / "checkpoints"),
      (std::vector<std::string>{"latest", "step-00000006", "step-00000008", "step-00000009"}));
  EXPECT_EQ(find_latest(run.path())->filename(), "step-00000006");
}

TEST(Checkpoint, TheSameStepIsReplaced) {
  const TemporaryFolder run;
  const auto path = save_at(run.path(), 4, 3).path;
  flip_bit(path / "index.h5", 100, 0);
  save_at(run.path(), 4, 2);
  expect_content(path, 4, 1);
  EXPECT_EQ(open_checkpoint(path).info.num_ranks, 2);
  EXPECT_EQ(names_in(run.path() / "checkpoints"),
            (std::vector<std::string>{"latest", "step-00000004"}));
}

TEST(Inspect, DescribesACheckpoint) {
  const TemporaryFolder run;
  const auto path = save_at(run.path(), 5, 3).path;
  const Checkpoint checkpoint = open_checkpoint(path);
  const std::string text = describe_text(checkpoint);
  EXPECT_CONTAINS(text, hex(digest_by_hand(5)));
  EXPECT_CONTAINS(text, "tokenizer    9 bytes");
  for (const TensorCase& tensor : tensor_cases()) EXPECT_CONTAINS(text, tensor.spec.name);
  const nlohmann::json json = describe_json(checkpoint);
  EXPECT_EQ(json.at("digest"), hex(digest_by_hand(5)));
  EXPECT_EQ(json.at("tensors").size(), tensor_cases().size());
  EXPECT_EQ(json.at("tensors")[1].at("unit_hashes").size(), 5U);
  EXPECT_EQ(json.at("extra").at("tokenizer_kind"), "spm");
  EXPECT_NO_THROW(static_cast<void>(json.dump()));
  EXPECT_EQ(checkpoint_digest(path, true), digest_by_hand(5));
}

TEST(RunLock, NamesTheHolder) {
  const TemporaryFolder run;
  {
    const RunLock lock(run.path() / "new");
    const std::string message = error_of([&] { RunLock(run.path() / "new"); }, ExitCode::usage);
    EXPECT_CONTAINS(message, "is in use by process " + std::to_string(::getpid()) + " on ");
  }
  EXPECT_NO_THROW(RunLock(run.path() / "new"));
}

TEST(RunLock, WaitsForAHolderOnAnotherNode) {
  const TemporaryFolder run;
  ::setenv("SLURMD_NODENAME", "n1", 1);
  auto first = std::make_unique<RunLock>(run.path());
  ::setenv("SLURMD_NODENAME", "n2", 1);
  const auto milliseconds = [](int count) { return std::chrono::milliseconds(count); };
  const std::string message =
      error_of([&] { RunLock(run.path(), milliseconds(300)); }, ExitCode::usage);
  EXPECT_CONTAINS(message, " on n1; wait for that run to end");
  std::thread end([&] {
    std::this_thread::sleep_for(milliseconds(500));
    first.reset();
  });
  EXPECT_NO_THROW(RunLock(run.path(), std::chrono::seconds(30)));
  end.join();
  ::unsetenv("SLURMD_NODENAME");
}

}  // namespace
}  // namespace arcus::test
