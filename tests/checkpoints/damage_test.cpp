#include <atomic>
#include <cstdlib>

#include "tests/checkpoints/fixture.hpp"

namespace arcus::test {
namespace {

namespace fs = std::filesystem;

/// Two checkpoints of three ranks, and copies of the first to be spoilt.
class Damage : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    run_ = new TemporaryFolder;
    first_ = new fs::path(save_at(run_->path(), 1, 3, 2).path);
    second_ = new fs::path(save_at(run_->path(), 2, 3, 2).path);
  }
  static void TearDownTestSuite() {
    delete first_;
    delete second_;
    delete run_;
  }
  void SetUp() override {
    copy_ = work_.path() / "step-00000001";
    fs::copy(*first_, copy_);
  }
  void restore(const std::string& name) const {
    fs::copy_file(*first_ / name, copy_ / name, fs::copy_options::overwrite_existing);
  }

  static inline TemporaryFolder* run_ = nullptr;
  static inline fs::path* first_ = nullptr;
  static inline fs::path* second_ = nullptr;
  TemporaryFolder work_;
  fs::path copy_;
};

TEST_F(Damage, AnUntouchedCopyLoads) { expect_content(copy_, 1, 2, 7); }

TEST_F(Damage, AFlippedBitInAnyTensorAndShardIsNamed) {
  const Checkpoint checkpoint = open_checkpoint(*first_);
  int flips = 0;
  for (const StoredTensor& tensor : checkpoint.tensors) {
    for (const StoredRange& range : tensor.ranges) {
      const std::int64_t bytes =
          tensor.bytes() / tensor.spec.num_rows() * (range.rows.end - range.rows.begin);
      const std::string shard = checkpoint.files.at(static_cast<std::size_t>(range.shard) + 1).name;
      const std::int64_t byte = range.offset + (flips % 3 == 0   ? 0
                                                : flips % 3 == 1 ? bytes - 1
                                                                 : bytes / 2);
      flip_bit(copy_ / shard, byte, flips % 8);
      const std::string message = load_error(copy_, 2);
      EXPECT_CONTAINS(message, tensor.spec.name + " is damaged");
      EXPECT_CONTAINS(message, shard);
      EXPECT_CONTAINS(error_of([&] { verify_checkpoint(open_checkpoint(copy_)); }),
                      tensor.spec.name);
      flip_bit(copy_ / shard, byte, flips % 8);
      ++flips;
    }
  }
  EXPECT_GT(flips, 20);
  expect_content(copy_, 1, 2, 7);
}

TEST_F(Damage, AllRanksRefuseTogether) {
  const Checkpoint checkpoint = open_checkpoint(*first_);
  const StoredTensor& tensor = *checkpoint.find("m/long.vector");
  flip_bit(copy_ / checkpoint.files.at(static_cast<std::size_t>(tensor.ranges[0].shard) + 1).name,
           tensor.ranges[0].offset, 0);
  std::atomic<int> refusals = 0;
  run_on_threads(4, {}, [&](Communicator& world) {
    Stream stream(1);
    RankState state(tensor_cases(), world.rank(), world.size(), 0);
    const std::string message =
        error_of([&] { load_checkpoint(world, stream, copy_, state.views()); });
    if (message.find("m/long.vector is damaged") != std::string::npos) ++refusals;
  });
  EXPECT_EQ(refusals, 4);
}

TEST_F(Damage, AnyFlippedBitInChecksumsIsSeen) {
  const auto size = static_cast<std::int64_t>(fs::file_size(copy_ / "CHECKSUMS"));
  for (std::int64_t byte = 0; byte < size; ++byte) {
    flip_bit(copy_ / "CHECKSUMS", byte, static_cast<int>(byte % 7));
    EXPECT_CONTAINS(error_of([&] { open_checkpoint(copy_); }), "CHECKSUMS");
    restore("CHECKSUMS");
  }
}

TEST_F(Damage, AnyTruncationOfChecksumsIsSeen) {
  for (auto size = fs::file_size(copy_ / "CHECKSUMS"); size-- > 0;) {
    fs::resize_file(copy_ / "CHECKSUMS", size);
    EXPECT_CONTAINS(error_of([&] { open_checkpoint(copy_); }), "CHECKSUMS");
  }
}

TEST_F(Damage, AFlippedBitInTheIndexIsSeen) {
  const auto size = static_cast<std::int64_t>(fs::file_size(copy_ / "index.h5"));
  for (std::int64_t byte = 0; byte < size; byte += 211) {
    flip_bit(copy_ / "index.h5", byte, static_cast<int>(byte % 8));
    EXPECT_CONTAINS(error_of([&] { open_checkpoint(copy_); }), "index.h5 is damaged");
    flip_bit(copy_ / "index.h5", byte, static_cast<int>(byte % 8));
  }
  EXPECT_NO_THROW(open_checkpoint(copy_));
}

TEST_F(Damage, MissingFilesAreNamed) {
  for (const std::string name : {"CHECKSUMS", "index.h5", "rank-00000.h5", "rank-00002.h5"}) {
    fs::remove(copy_ / name);
    EXPECT_CONTAINS(load_error(copy_, 2), name + " is missing");
    restore(name);
  }
  fs::remove_all(copy_);
  EXPECT_CONTAINS(load_error(copy_, 2), "no such folder");
}

TEST_F(Damage, TruncatedAndExtendedFilesAreNamed) {
  for (const std::string name : {"index.h5", "rank-00001.h5"}) {
    const auto size = fs::file_size(copy_ / name);
    for (const auto other : {size - 1, size / 2, std::uintmax_t{0}}) {
      fs::resize_file(copy_ / name, other);
      const std::string message = load_error(copy_, 3);
      EXPECT_CONTAINS(message, name);
      EXPECT_CONTAINS(message, "(truncated)");
    }
    fs::resize_file(copy_ / name, size + 1);
    EXPECT_CONTAINS(load_error(copy_), name);
    restore(name);
  }
}

TEST_F(Damage, ZerosInPlaceOfDataAreSeen) {
  const auto size = fs::file_size(copy_ / "rank-00001.h5");
  fs::resize_file(copy_ / "rank-00001.h5", size / 2);
  fs::resize_file(copy_ / "rank-00001.h5", size);
  EXPECT_CONTAINS(load_error(copy_, 2), "rank-00001.h5");
}

TEST_F(Damage, FilesOfAnotherStepAreSeen) {
  const auto take = [&](const std::string& name) {
    fs::copy_file(*second_ / name, copy_ / name, fs::copy_options::overwrite_existing);
  };
  ASSERT_EQ(fs::file_size(*second_ / "rank-00001.h5"), fs::file_size(*first_ / "rank-00001.h5"));
  take("index.h5");
  EXPECT_CONTAINS(load_error(copy_), "index.h5 is damaged or of another checkpoint");
  take("CHECKSUMS");
  EXPECT_CONTAINS(load_error(copy_), "index.h5 is of step 2");
  restore("index.h5");
  restore("CHECKSUMS");
  take("rank-00001.h5");
  EXPECT_CONTAINS(load_error(copy_), "is damaged");
}

/// Same step, same sizes, another run.
TEST_F(Damage, AShardOfAnotherRunIsSeen) {
  const TemporaryFolder other;
  run_on_threads(3, {}, [&](Communicator& world) {
    Stream stream(1);
    RankState state(tensor_cases(), world.rank(), world.size(), 2);
    state.fill(77);
    save_checkpoint(world, stream, other.path(), info_at(1), state.views(), {});
  });
  const fs::path foreign = *find_latest(other.path());
  fs::copy_file(foreign / "rank-00002.h5", copy_ / "rank-00002.h5",
                fs::copy_options::overwrite_existing);
  const std::string message = load_error(copy_, 2);
  EXPECT_CONTAINS(message, "is damaged");
  EXPECT_CONTAINS(message, "rank-00002.h5");
  EXPECT_THROW(verify_checkpoint(open_checkpoint(copy_)), Error);
}

/// ARCUS_FLIPS=all: every bit of every file; else one here and there.
TEST_F(Damage, VerifyFindsEveryFlippedBit) {
  const char* wanted = std::getenv("ARCUS_FLIPS");
  const bool all = wanted != nullptr && std::string(wanted) == "all";
  const TemporaryFolder run;
  run_on_threads(2, {}, [&](Communicator& world) {
    Stream stream(1);
    const std::vector<TensorCase> small = {
        {{"model.layers.0.mlp.experts.down_proj", DType::bf16, {4, 3, 5}, 4}, false},
        {{"model.norm.weight", DType::f32, {7}, 1}, true}};
    RankState state(small, world.rank(), world.size(), 0);
    state.fill(1);
    save_checkpoint(world, stream, run.path(), info_at(1), state.views(), {});
  });
  const fs::path path = *find_latest(run.path());
  EXPECT_NO_THROW(verify_checkpoint(open_checkpoint(path)));
  std::int64_t flips = 0;
  for (const std::string& name : names_in(path)) {
    const auto bits = static_cast<std::int64_t>(fs::file_size(path / name)) * 8;
    for (std::int64_t bit = 0; bit < bits; bit += all ? 1 : 331) {
      flip_bit(path / name, bit / 8, static_cast<int>(bit % 8));
      EXPECT_THROW(verify_checkpoint(open_checkpoint(path)), Error)
          << "bit " << bit << " of " << name;
      flip_bit(path / name, bit / 8, static_cast<int>(bit % 8));
      ++flips;
    }
  }
  EXPECT_NO_THROW(verify_checkpoint(open_checkpoint(path)));
  std::cout << flips << " flipped bits, all found\n";
}

TEST_F(Damage, DamageToTheStructureOfAShardIsFoundByVerify) {
  flip_bit(copy_ / "rank-00001.h5", 40, 3);
  expect_content(copy_, 1, 2);
  EXPECT_CONTAINS(error_of([&] { verify_checkpoint(open_checkpoint(copy_)); }),
                  "rank-00001.h5 is damaged outside the tensors' data");
}

}  // namespace
}  // namespace arcus::test
