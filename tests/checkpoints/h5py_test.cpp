#include <cstdlib>
#include <nlohmann/json.hpp>

#include "tests/checkpoints/fixture.hpp"

namespace arcus::test {
namespace {

/// h5py must see every tensor whole, type, shape and bits, whatever the ranks were.
TEST(CheckpointH5py, ReadsTheIndexWhole) {
  for (const int ranks : {1, 3, 4}) {
    const TemporaryFolder run;
    const auto path = save_at(run.path(), 6, ranks, 12).path;
    nlohmann::json expected = nlohmann::json::array();
    for (const TensorCase& tensor : tensor_cases()) {
      const auto file = run.path() / (std::to_string(expected.size()) + ".bin");
      const auto bytes = content_of(tensor.spec, 6);
      std::ofstream(file, std::ios::binary)
          .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
      expected.push_back({{"name", tensor.spec.name},
                          {"dtype", name_of(tensor.spec.dtype)},
                          {"shape", tensor.spec.shape},
                          {"file", file.string()}});
    }
    std::ofstream(run.path() / "expected.json") << expected.dump();
    const std::string command = std::string(ARCUS_PYTHON " " ARCUS_SCRIPT " ") +
                                (path / "index.h5").string() + " " +
                                (run.path() / "expected.json").string();
    EXPECT_EQ(std::system(command.c_str()), 0) << ranks << " ranks";
  }
}

}  // namespace
}  // namespace arcus::test
