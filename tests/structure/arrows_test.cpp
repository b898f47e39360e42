#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>

#include "tests/structure/source_tree.hpp"

namespace arcus::structure {
namespace {

namespace fs = std::filesystem;

TEST(Structure, TheTreeFollowsTheArrows) {
  for (const std::string& violation : find_violations(ARCUS_SOURCE_DIR)) {
    ADD_FAILURE() << violation;
  }
}

TEST(Structure, TheTreeIsThere) {
  for (const Folder& folder : folders()) {
    if (folder.path == "checkpoints/interop") continue;  // optional
    EXPECT_TRUE(fs::is_directory(fs::path(ARCUS_SOURCE_DIR) / folder.path)) << folder.path;
  }
}

/// A tree with one header per folder, in which violations are planted.
class PlantedTree : public testing::Test {
 protected:
  void SetUp() override {
    root_ = fs::temp_directory_path() / ("arcus_structure_" + std::to_string(getpid()));
    fs::remove_all(root_);
    for (const Folder& folder : folders()) {
      write(folder.path + "/here.hpp", "#pragma once\n");
      if (folder.target.empty()) continue;
      write(folder.path + "/CMakeLists.txt",
            "arcus_library(" + folder.target.substr(6) + " PUBLIC fmt::fmt)\n");
    }
  }
  void TearDown() override { fs::remove_all(root_); }

  void write(const std::string& file, const std::string& text) {
    fs::create_directories((root_ / file).parent_path());
    std::ofstream(root_ / file) << text;
  }

  /// The violations after `text` was put into `file`, which is emptied again.
  std::vector<std::string> planted(const std::string& file, const std::string& text) {
    write(file, text);
    auto violations = find_violations(root_);
    fs::remove(root_ / file);
    return violations;
  }

  fs::path root_;
};

TEST_F(PlantedTree, IsCleanBefore) { EXPECT_TRUE(find_violations(root_).empty()); }

TEST_F(PlantedTree, EveryPairOfFoldersIsJudgedByTheTable) {
  for (const Folder& from : folders()) {
    for (const Folder& to : folders()) {
      const auto& allowed = from.may_include;
      const bool fine = from.path == to.path || from.path == "tests" ||
                        std::find(allowed.begin(), allowed.end(), to.path) != allowed.end();
      const auto found =
          planted(from.path + "/planted.cpp", "#include \"" + to.path + "/here.hpp\"\n");
      EXPECT_EQ(found.empty(), fine) << from.path << " -> " << to.path;
    }
  }
}

TEST_F(PlantedTree, ArrowsHaveNoCycle) {
  for (const Folder& from : folders()) {
    for (const std::string& to : from.may_include) {
      for (const Folder& back : folders()) {
        if (back.path != to) continue;
        EXPECT_EQ(std::count(back.may_include.begin(), back.may_include.end(), from.path), 0)
            << from.path << " <-> " << to;
      }
    }
  }
}

TEST_F(PlantedTree, MessagesNameFileLineAndRule) {
  const auto found =
      planted("src/model/planted.cpp", "#include <vector>\n\n#include \"src/train/here.hpp\"\n");
  ASSERT_EQ(found.size(), 1U);
  EXPECT_EQ(found[0],
            "src/model/planted.cpp:3: src/model must not include src/train "
            "(\"src/train/here.hpp\")");
}

TEST_F(PlantedTree, WrappedLibrariesStayAtHome) {
  const std::string mpi = "#include <mpi.h>\n";
  EXPECT_TRUE(planted("comm/planted.cpp", mpi).empty());
  EXPECT_TRUE(planted("tests/support/planted.cpp", mpi).empty());
  EXPECT_EQ(planted("launch/planted.cpp", mpi).size(), 1U);
  EXPECT_EQ(planted("tests/comm/planted.cpp", mpi).size(), 1U);
  for (const std::string header : {"dnnl.h", "oneapi/dnnl/dnnl.hpp"}) {
    const std::string text = "#include <" + header + ">\n";
    EXPECT_TRUE(planted("kernels/cpu/planted.cpp", text).empty()) << header;
    EXPECT_EQ(planted("kernels/planted.cpp", text).size(), 1U) << header;
    EXPECT_EQ(planted("launch/planted.cpp", text).size(), 1U) << header;
  }
  const std::string hdf5 = "#include <hdf5.h>\n";
  EXPECT_TRUE(planted("src/base/hdf5.cpp", hdf5).empty());
  EXPECT_EQ(planted("checkpoints/planted.cpp", hdf5).size(), 1U);
  for (const std::string header : {"nccl.h", "cuda_runtime.h", "cublas_v2.h", "cublasLt.h"}) {
    const std::string text = "#include <" + header + ">\n";
    EXPECT_TRUE(planted("kernels/cuda/planted.cu", text).empty()) << header;
    EXPECT_TRUE(planted("comm/nccl_planted.cpp", text).empty()) << header;
    EXPECT_EQ(planted("comm/planted.cpp", text).size(), 1U) << header;
    EXPECT_EQ(planted("src/train/planted.cpp", text).size(), 1U) << header;
  }
}

TEST_F(PlantedTree, BackendsAreReachedThroughOpsAlone) {
  for (const std::string backend : {"cpu", "cuda"}) {
    write("kernels/" + backend + "/here.hpp", "#pragma once\n");
    const std::string include = "#include \"kernels/" + backend + "/here.hpp\"\n";
    const std::string call = "  " + backend + "::add(stream, args);\n";
    for (const std::string& text : {include, call}) {
      for (const std::string home : {"kernels/cpu", "kernels", "tests/kernels", "tests/train"}) {
        EXPECT_TRUE(planted(home + "/planted.cpp", text).empty()) << home << ": " << text;
      }
      for (const std::string folder :
           {"src/base", "src/model", "src/train", "comm", "checkpoints", "launch"}) {
        EXPECT_EQ(planted(folder + "/planted.cpp", text).size(), 1U) << folder << ": " << text;
      }
    }
    EXPECT_TRUE(planted("comm/planted.cpp", "// " + backend + "::add in a comment\n").empty());
    EXPECT_TRUE(planted("comm/planted.cpp", "other_" + backend + "::add();\n").empty());
  }
  EXPECT_EQ(planted("comm/planted.cpp", "#include \"kernels/cpu/here.hpp\"\n"),
            (std::vector<std::string>{"comm/planted.cpp:1: \"kernels/cpu/here.hpp\" belongs to a "
                                      "backend; call the ops of kernels/*.hpp"}));
}

// A clock that jumps, by hand or by a time server, does nothing to a run.
TEST_F(PlantedTree, NobodyAsksTheWallClock) {
  for (const std::string clock : {"std::chrono::system_clock::now();\n", "std::time(nullptr);\n",
                                  "clock_gettime(CLOCK_REALTIME, &now);\n"}) {
    EXPECT_EQ(planted("comm/planted.cpp", clock).size(), 1U) << clock;
    EXPECT_TRUE(planted("tests/comm/planted.cpp", clock).empty()) << clock;
  }
  EXPECT_TRUE(planted("comm/planted.cpp", "std::chrono::steady_clock::now();\n").empty());
}

TEST_F(PlantedTree, IncludesAreSpelledFromTheRoot) {
  EXPECT_EQ(planted("src/base/planted.cpp", "#include \"here.hpp\"\n").size(), 1U);
  EXPECT_EQ(planted("src/base/planted.cpp", "  #  include \"../base/here.hpp\"\n").size(), 1U);
  EXPECT_TRUE(planted("src/base/planted.cpp", "// #include \"here.hpp\"\n").empty());
}

TEST_F(PlantedTree, LibrariesHaveTheirNamesAndLinkAlongTheArrows) {
  write("comm/CMakeLists.txt", "arcus_library(communication)\n");
  EXPECT_EQ(find_violations(root_).size(), 1U);
  write("comm/CMakeLists.txt", "# arcus_library(comm)\n");
  EXPECT_EQ(find_violations(root_).size(), 1U);
  write("comm/CMakeLists.txt", "arcus_library(comm PUBLIC arcus_kernels PRIVATE arcus_train)\n");
  EXPECT_EQ(
      find_violations(root_),
      (std::vector<std::string>{"comm/CMakeLists.txt: arcus_comm must not link arcus_train"}));
  write("comm/CMakeLists.txt", "arcus_library(comm PUBLIC arcus_kernels)\n");
  EXPECT_TRUE(find_violations(root_).empty());
}

}  // namespace
}  // namespace arcus::structure
