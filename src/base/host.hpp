#pragma once

#include <string>

namespace arcus {

/// What this machine calls itself.
std::string machine_name();
/// What the cluster calls this node: Slurm's name (several of its nodes may share one machine),
/// else the machine's.
std::string node_name();

/// Lets the calling thread run on every processor that the process had at its start: threads begin
/// where the one that makes them is bound. Does nothing where the system does not allow it.
void use_all_processors();

}  // namespace arcus
