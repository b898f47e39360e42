#pragma once

#include <string>

#include "comm/communicator.hpp"
#include "src/train/trainer.hpp"

namespace arcus {

/// What this machine's arithmetic is: instruction set, matrix library and a hash of what a fixed
/// small problem gives (one micro-batch through a one-layer model with the run's switches, widths
/// and types, forward and backward, so every family of operations in use takes part).
std::string numeric_fingerprint(const TrainerOptions& options, Stream& stream);

/// Compares all ranks' fingerprints: those that differ are named, and the run is refused, with
/// `reproducible` off warned about. Collective.
void check_fingerprints(Communicator& world, Stream& stream, const std::string& fingerprint,
                        bool reproducible);

}  // namespace arcus
