#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <functional>
#include <iterator>
#include <numeric>
#include <thread>

#include "src/base/hdf5.hpp"
#include "tests/support/temporary_folder.hpp"

namespace arcus::h5 {
namespace {

namespace fs = std::filesystem;

class Hdf5 : public ::testing::Test {
 protected:
  File create(const std::string& name) const { return File::create(dir_ / name, ExitCode::data); }
  File open(const std::string& name) const { return File::open(dir_ / name, ExitCode::data); }

  /// The code of the error that `action` throws, ok when it throws none; its text in message_.
  ExitCode code_of(const std::function<void()>& action) {
    try {
      action();
    } catch (const Error& error) {
      message_ = error.what();
      return error.code();
    }
    return ExitCode::ok;
  }

  testing::TemporaryFolder folder_;
  const fs::path dir_ = folder_.path();
  std::string message_;
};

template <class T>
std::vector<T> ramp(std::int64_t count, int begin = 0) {
  std::vector<T> values;
  for (std::int64_t i = 0; i < count; ++i) {
    values.push_back(static_cast<T>(static_cast<float>(begin + i)));
  }
  return values;
}

template <class T>
void expect_round_trip(const File& file, const Shape& shape, const std::vector<T>& values) {
  const std::string name(name_of(dtype_of<T>()));
  const Dataset dataset = file.dataset("group/" + name);
  EXPECT_EQ(dataset.dtype(), dtype_of<T>());
  EXPECT_EQ(dataset.shape(), shape);
  EXPECT_EQ(file.read<T>("group/" + name), values);
}

TEST_F(Hdf5, EveryElementTypeComesBack) {
  const Shape shape{5, 3};
  const auto all = [&](auto&& fn) {
    fn(ramp<float>(15));
    fn(ramp<double>(15));
    fn(ramp<bf16>(15));
    fn(ramp<std::int32_t>(15, -7));
    fn(ramp<std::int64_t>(15, -7));
    fn(ramp<std::uint8_t>(15));
    fn(ramp<std::uint16_t>(15));
    fn(ramp<std::uint32_t>(15));
    fn(ramp<std::uint64_t>(15));
  };
  {
    File file = create("a.h5");
    all([&]<class T>(const std::vector<T>& values) {
      file.write("group/" + std::string(name_of(dtype_of<T>())), shape, values.data());
    });
    file.flush();
  }
  const File file = open("a.h5");
  all([&]<class T>(const std::vector<T>& values) { expect_round_trip(file, shape, values); });
  EXPECT_EQ(file.dataset_names().size(), 9U);
  EXPECT_EQ(file.dataset_names().front(), "group/bf16");
  EXPECT_TRUE(file.exists("group/u8"));
  EXPECT_FALSE(file.exists("group/none"));
  EXPECT_FALSE(file.exists("none/u8"));
}

TEST_F(Hdf5, RowsAreWrittenAndReadInParts) {
  {
    File file = create("a.h5");
    Dataset dataset = file.create_dataset("x", DType::i32, {6, 2, 3});
    for (const std::int64_t begin : {4, 0, 2}) {
      dataset.write_rows(begin, 2, ramp<std::int32_t>(12, static_cast<int>(begin) * 6).data());
    }
    dataset.write_rows(0, 0, nullptr);
    EXPECT_THROW(dataset.write_rows(5, 2, nullptr), Error);
  }
  const File file = open("a.h5");
  EXPECT_EQ(file.read<std::int32_t>("x"), ramp<std::int32_t>(36));
  std::vector<std::int32_t> part(18);
  file.dataset("x").read_rows(2, 3, part.data());
  EXPECT_EQ(part, ramp<std::int32_t>(18, 12));
  EXPECT_THROW(file.dataset("x").read_rows(-1, 1, part.data()), Error);
}

TEST_F(Hdf5, ContiguousDataStandsAtItsOffset) {
  const auto values = ramp<std::uint16_t>(1000);
  {
    File file = create("a.h5");
    Dataset dataset = file.create_dataset("tokens", DType::u16, {1000});
    EXPECT_GT(dataset.offset(), 0);  // before anything is written
    dataset.write_rows(0, 1000, values.data());
  }
  std::int64_t offset = -1;
  {
    const File file = open("a.h5");
    offset = file.dataset("tokens").offset();
  }
  std::ifstream stream(dir_ / "a.h5", std::ios::binary);
  stream.seekg(offset);
  std::vector<std::uint16_t> found(1000);
  stream.read(reinterpret_cast<char*>(found.data()), 2000);
  EXPECT_EQ(found, values);
}

TEST_F(Hdf5, EqualContentGivesEqualBytesAtAnotherTime) {
  const auto make = [&](const std::string& name) {
    File file = create(name);
    file.write("group/x", {2}, ramp<float>(2).data());
    file.create_growing_dataset("y", DType::f32, {3}, 4);
    file.write_attribute("text", "abc");
  };
  const auto content = [&](const std::string& name) {
    std::ifstream stream(dir_ / name, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(stream), {});
  };
  make("a.h5");
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));  // HDF5 would note seconds
  make("b.h5");
  EXPECT_EQ(content("a.h5"), content("b.h5"));
}

TEST_F(Hdf5, EmptyAndScalarDatasets) {
  {
    File file = create("a.h5");
    file.write<float>("empty", {0}, nullptr);
    const double value = 2.5;
    file.write("scalar", {}, &value);
  }
  const File file = open("a.h5");
  EXPECT_TRUE(file.read<float>("empty").empty());
  EXPECT_EQ(file.read<double>("scalar"), std::vector<double>{2.5});
}

TEST_F(Hdf5, DatasetsGrow) {
  {
    File file = create("a.h5");
    file.create_growing_dataset("trace", DType::f32, {3}, 4);
    for (std::int64_t rows = 0; rows < 10; rows += 5) {
      file.extend("trace", rows + 5);
      file.dataset("trace").write_rows(rows, 5, ramp<float>(15, static_cast<int>(rows) * 3).data());
    }
  }
  EXPECT_EQ(open("a.h5").read<float>("trace"), ramp<float>(30));
}

TEST_F(Hdf5, AttributesComeBack) {
  const std::string text = "two lines\nand caf\xC3\xA9";
  {
    File file = create("a.h5");
    file.write_attribute("text", text);
    file.write_attribute("none", "");
    file.write_attribute("number", std::int64_t{-5} << 40);
  }
  const File file = open("a.h5");
  EXPECT_EQ(file.text_attribute("text"), text);
  EXPECT_EQ(file.text_attribute("none"), "");
  EXPECT_EQ(file.int_attribute("number"), std::int64_t{-5} << 40);
  EXPECT_FALSE(file.has_attribute("other"));
  EXPECT_EQ(code_of([&] { file.text_attribute("other"); }), ExitCode::data);
  EXPECT_EQ(code_of([&] { file.text_attribute("number"); }), ExitCode::data);
}

TEST_F(Hdf5, ErrorsCarryTheGivenCodeAndNameTheFile) {
  const auto with = [&](const std::string& name) {
    return [this, name] { File::open(dir_ / name, ExitCode::checkpoint); };
  };
  EXPECT_EQ(code_of(with("absent.h5")), ExitCode::checkpoint);
  EXPECT_NE(message_.find("absent.h5"), std::string::npos);
  std::ofstream(dir_ / "text.h5") << "this is no HDF5 file";
  EXPECT_EQ(code_of(with("text.h5")), ExitCode::checkpoint);
  EXPECT_NE(message_.find("text.h5"), std::string::npos);
  { create("a.h5").write("x", {2}, ramp<float>(2).data()); }
  const File file = open("a.h5");
  EXPECT_EQ(code_of([&] { file.dataset("y"); }), ExitCode::data);
  EXPECT_EQ(code_of([&] { file.read<double>("x"); }), ExitCode::data);
  EXPECT_NE(message_.find("f32"), std::string::npos);
  EXPECT_EQ(code_of([&] { File::create(dir_ / "no" / "folder.h5", ExitCode::data); }),
            ExitCode::data);
}

std::string part_name(std::size_t i) { return fmt::format("part{}.h5", i); }

/// A tensor of `shape` cut into row ranges that lie in two files shows up whole.
class VirtualShapes : public Hdf5, public ::testing::WithParamInterface<Shape> {};

TEST_P(VirtualShapes, AreTheTensorPutTogether) {
  const Shape& shape = GetParam();
  const std::int64_t total =
      std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
  const std::int64_t cols = shape.size() < 2 ? 1 : shape.back();
  const std::int64_t rows = total / cols;
  const auto values = ramp<float>(total);
  // Cuts that fall inside, at and across the outer dimension's boundaries.
  std::vector<std::int64_t> cuts{0, 1, rows / 3, rows / 2, rows / 2 + 1, rows - 1, rows};
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  std::vector<VirtualSource> sources;
  std::vector<std::vector<float>> stored(2);
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
    auto& data = stored[i % 2];
    sources.push_back({.file = part_name(i % 2),
                       .dataset = "sub/x",
                       .source_begin = static_cast<std::int64_t>(data.size()) / cols,
                       .begin = cuts[i],
                       .rows = cuts[i + 1] - cuts[i]});
    data.insert(data.end(), values.begin() + cuts[i] * cols, values.begin() + cuts[i + 1] * cols);
  }
  for (std::size_t i = 0; i < 2; ++i) {
    const auto source_rows = static_cast<std::int64_t>(stored[i].size()) / cols;
    for (VirtualSource& source : sources) {
      if (source.file == part_name(i)) source.source_rows = source_rows;
    }
    const Shape source_shape = shape.size() < 2 ? Shape{source_rows} : Shape{source_rows, cols};
    create(part_name(i)).write("sub/x", source_shape, stored[i].data());
  }
  create("index.h5").create_virtual_dataset("whole/x", DType::f32, shape, sources);
  const File index = open("index.h5");
  const Dataset dataset = index.dataset("whole/x");
  EXPECT_TRUE(dataset.is_virtual());
  EXPECT_EQ(dataset.shape(), shape);
  EXPECT_EQ(index.read<float>("whole/x"), values);
  EXPECT_FALSE(open("part0.h5").dataset("sub/x").is_virtual());
}

INSTANTIATE_TEST_SUITE_P(Shapes, VirtualShapes,
                         ::testing::Values(Shape{17}, Shape{9, 4}, Shape{3, 7, 5}, Shape{4, 6, 2},
                                           Shape{1, 11, 3}, Shape{8, 1, 4}));

}  // namespace
}  // namespace arcus::h5
