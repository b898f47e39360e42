#pragma once

#include <string>

namespace arcus {

/// What this machine calls itself.
std::string machine_name();
/// What the cluster calls this node: Slurm's name (several of its nodes may share one machine),
/// else the machine's.
std::string node_name();

}  // namespace arcus
