#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <string>
#include <vector>

#include "checkpoints/checkpoint.hpp"
#include "comm/backends.hpp"
#include "src/base/rng.hpp"
#include "tests/support/temporary_folder.hpp"

namespace arcus::test {

using testing::TemporaryFolder;

struct TensorCase {
  TensorSpec spec;
  bool replicated = false;
};

/// One of each kind: several blocks, experts whose last block is short, bf16, vectors, scalars,
/// three dimensions, groups in the name, nothing at all.
inline std::vector<TensorCase> tensor_cases() {
  return {
      {{"model.embed_tokens.weight", DType::f32, {300, 256}, 1}, true},
      {{"model.layers.0.mlp.experts.gate_up_proj", DType::f32, {5, 96, 1024}, 5}, false},
      {{"m/model.layers.0.mlp.experts.gate_up_proj", DType::f32, {5, 96, 1024}, 5}, false},
      {{"model.layers.0.mlp.experts.down_proj", DType::bf16, {5, 7, 33}, 5}, false},
      {{"model.layers.0.self_attn.q_proj.weight", DType::bf16, {137, 1000}, 1}, false},
      {{"m/long.vector", DType::f64, {150'000}, 1}, false},
      {{"model.norm.weight", DType::f32, {64}, 1}, true},
      {{"model.layers.0.mlp.expert_bias", DType::f32, {5}, 1}, true},
      {{"balance.previous_counts", DType::i64, {3, 5}, 1}, true},
      {{"plain.three_dimensions", DType::u8, {4, 3, 5}, 1}, true},
      {{"sharded.three_dimensions", DType::f32, {3, 50, 2048}, 1}, false},
      {{"counters.tokens", DType::i64, {}, 1}, true},
      {{"counters.sharded_scalar", DType::f64, {}, 1}, false},
      {{"nothing", DType::f32, {0, 4}, 1}, true},
  };
}

inline std::size_t bytes_of(const TensorSpec& spec) {
  return static_cast<std::size_t>(spec.num_elements()) * size_of(spec.dtype);
}

/// The bytes of a whole tensor at some step.
inline std::vector<char> content_of(const TensorSpec& spec, std::int64_t step) {
  std::vector<char> bytes(bytes_of(spec));
  const Rng rng(static_cast<std::uint64_t>(step), "checkpoint test", spec.name);
  for (std::size_t i = 0; i < bytes.size(); i += 16) {
    const auto words = rng.words(0, i);
    std::memcpy(bytes.data() + i, words.data(), std::min<std::size_t>(16, bytes.size() - i));
  }
  return bytes;
}

/// One rank's part of the state: blocks of sharded tensors spread by `seed` (0 = evenly in order).
class RankState {
 public:
  RankState(const std::vector<TensorCase>& cases, int rank, int num_ranks, std::uint64_t seed) {
    storage_.reserve(1000 * cases.size());
    for (const TensorCase& tensor : cases) {
      StateView view{tensor.spec, tensor.replicated, {}};
      if (tensor.replicated) {
        add_slice(view, {0, tensor.spec.num_rows()});
      } else {
        for (std::int64_t block = 0; block < num_blocks(tensor.spec); ++block) {
          if (owner(tensor.spec, block, num_ranks, seed) != rank) continue;
          add_block(view, block_range(tensor.spec, block));
        }
        allocate(view);
      }
      views_.push_back(std::move(view));
    }
  }
  RankState(const RankState&) = delete;

  std::span<const StateView> views() const { return views_; }

  void fill(std::int64_t step) {
    for (const StateView& view : views_) {
      if (bytes_of(view.spec) == 0) continue;
      const std::vector<char> whole = content_of(view.spec, step);
      for (const StateSlice& slice : view.slices) {
        std::memcpy(slice.data, whole.data() + offset(view, slice), size(view, slice));
      }
    }
  }
  void clear() {
    for (auto& bytes : storage_) std::fill(bytes.begin(), bytes.end(), char{0x55});
  }
  /// Names of tensors whose rows here are not those of `step`.
  std::vector<std::string> differences(std::int64_t step) const {
    std::vector<std::string> names;
    for (const StateView& view : views_) {
      if (bytes_of(view.spec) == 0) continue;
      const std::vector<char> whole = content_of(view.spec, step);
      for (const StateSlice& slice : view.slices) {
        if (std::memcmp(slice.data, whole.data() + offset(view, slice), size(view, slice)) != 0) {
          names.push_back(view.spec.name);
        }
      }
    }
    return names;
  }

 private:
  static std::int64_t owner(const TensorSpec& spec, std::int64_t block, int num_ranks,
                            std::uint64_t seed) {
    if (seed == 0) return block * num_ranks / num_blocks(spec);
    return Rng(seed, "owner", spec.name).words(0, static_cast<std::uint64_t>(block))[0] %
           static_cast<std::uint32_t>(num_ranks);
  }
  static std::size_t row_bytes(const StateView& view) {
    return static_cast<std::size_t>(view.spec.cols()) * size_of(view.spec.dtype);
  }
  static std::size_t offset(const StateView& view, const StateSlice& slice) {
    return static_cast<std::size_t>(slice.rows.begin) * row_bytes(view);
  }
  static std::size_t size(const StateView& view, const StateSlice& slice) {
    return static_cast<std::size_t>(slice.rows.end - slice.rows.begin) * row_bytes(view);
  }
  void add_slice(StateView& view, RowRange rows) {
    view.slices.push_back({rows, nullptr});
    allocate(view);
  }
  /// Joins the block to the slice before where they touch.
  static void add_block(StateView& view, RowRange rows) {
    if (!view.slices.empty() && view.slices.back().rows.end == rows.begin) {
      view.slices.back().rows.end = rows.end;
    } else {
      view.slices.push_back({rows, nullptr});
    }
  }
  void allocate(StateView& view) {
    for (StateSlice& slice : view.slices) {
      storage_.emplace_back(std::max<std::size_t>(size(view, slice), 1));
      slice.data = storage_.back().data();
    }
  }

  std::vector<std::vector<char>> storage_;
  std::vector<StateView> views_;
};

inline CheckpointInfo info_at(std::int64_t step) {
  CheckpointInfo info;
  info.step = step;
  info.config_text = "[run]\nseed = 7 # \"§\"\n";
  info.fingerprint = "0123456789abcdef";
  info.run_id = "run-1";
  info.created_by = "arcus test";
  info.extra[extra_key::kTokenizerKind] = "spm";
  info.extra[extra_key::kTokenizer] = std::string("\0binary\xff\n", 9);
  info.extra["empty"] = "";
  return info;
}

/// Saves the content of `step` from `num_ranks` ranks.
inline SaveReport save_at(const std::filesystem::path& run_dir, std::int64_t step,
                          int num_ranks = 1, std::uint64_t seed = 0,
                          const SaveOptions& options = {.keep = 0}) {
  SaveReport report;
  run_on_threads(num_ranks, {}, [&](Communicator& world) {
    Stream stream(1);
    RankState state(tensor_cases(), world.rank(), world.size(), seed);
    state.fill(step);
    const SaveReport mine =
        save_checkpoint(world, stream, run_dir, info_at(step), state.views(), options);
    if (world.rank() == 0) report = mine;
  });
  return report;
}

/// Loads at `num_ranks` ranks and expects the content of `step`.
inline void expect_content(const std::filesystem::path& path, std::int64_t step, int num_ranks = 1,
                           std::uint64_t seed = 0) {
  run_on_threads(num_ranks, {}, [&](Communicator& world) {
    Stream stream(1);
    RankState state(tensor_cases(), world.rank(), world.size(), seed);
    state.clear();
    const CheckpointInfo info = load_checkpoint(world, stream, path, state.views());
    EXPECT_EQ(info.step, step);
    EXPECT_EQ(state.differences(step), std::vector<std::string>{})
        << path << " rank " << world.rank();
  });
}

/// The message of the Error that `fn` throws; fails where it throws none or another exit code.
template <class Fn>
std::string error_of(Fn&& fn, ExitCode code = ExitCode::checkpoint) {
  try {
    fn();
  } catch (const Error& error) {
    EXPECT_EQ(static_cast<int>(error.code()), static_cast<int>(code)) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

inline std::string load_error(const std::filesystem::path& path, int num_ranks = 1) {
  return error_of([&] {
    run_on_threads(num_ranks, {}, [&](Communicator& world) {
      Stream stream(1);
      RankState state(tensor_cases(), world.rank(), world.size(), 3);
      load_checkpoint(world, stream, path, state.views());
    });
  });
}

#define EXPECT_CONTAINS(text, part)                          \
  EXPECT_NE(std::string(text).find(part), std::string::npos) \
      << "\"" << (text) << "\" does not mention \"" << (part) << "\""

inline void flip_bit(const std::filesystem::path& path, std::int64_t byte, int bit) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(byte);
  const int value = file.get();
  ASSERT_NE(value, EOF) << path;
  file.seekp(byte);
  file.put(static_cast<char>(value ^ (1 << bit)));
}

/// Names in the folder of a run's checkpoints, sorted.
inline std::vector<std::string> names_in(const std::filesystem::path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace arcus::test
