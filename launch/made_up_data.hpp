#pragma once

#include <filesystem>

#include "launch/session.hpp"

namespace arcus {

/// A data set of made-up text in a temporary folder on every node's first rank, for benchmarks
/// without run.data: what the text says does not matter for speed.
class MadeUpData {
 public:
  /// `repeated` of the tokens, a share from 0 to 1, are one and the same, so that a routing by
  /// token (routing.select = "hash") loads one expert with them. Collective.
  MadeUpData(Session& session, double repeated);
  ~MadeUpData();
  MadeUpData(const MadeUpData&) = delete;
  MadeUpData& operator=(const MadeUpData&) = delete;

  /// The folder for run.data.
  std::filesystem::path tokens() const { return dir_ / "tokens"; }

 private:
  void write(double repeated) const;

  bool owner_;
  std::filesystem::path dir_;
};

}  // namespace arcus
