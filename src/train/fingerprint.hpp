#pragma once

#include <string>

#include "comm/communicator.hpp"
#include "src/base/dtype.hpp"

namespace arcus {

/// What this rank's arithmetic gives: a hash over one training step of two small models (every op
/// family, the dtype in use, one segment alone and among others), and the instruction set and
/// libraries behind it. Equal texts: equal bits.
std::string arithmetic_fingerprint(DType compute, int num_threads);

/// Compares all ranks' fingerprints. Where they differ the ranks are named; `reproducible` refuses
/// the run (exit code 64), otherwise it is a warning. Collective; returns this rank's.
std::string check_fingerprints(Communicator& world, Stream& stream, DType compute,
                               bool reproducible);

}  // namespace arcus
