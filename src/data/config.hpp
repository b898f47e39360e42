#pragma once

#include <string>
#include <vector>

namespace arcus {

/// One [[data.domain]].
struct DomainConfig {
  std::string name;
  double weight = 1;
};

/// Keys of [data].
struct DataConfig {
  bool cross_document_attention = true;  ///< false: a token sees its own document only
  std::vector<DomainConfig> domains;     ///< empty: every domain, weighted by its tokens
};

}  // namespace arcus
