#pragma once

#include <string>

#include "comm/communicator.hpp"
#include "src/base/dtype.hpp"
#include "src/model/config.hpp"

namespace arcus {

/// What this rank's arithmetic gives: a hash over one training step of two small models (every op
/// family and the dtype in use, with norms, activation, biases and positions as in `model`; one
/// segment alone and among others), and the instruction set and libraries behind it. Equal texts:
/// equal bits.
std::string arithmetic_fingerprint(const ModelConfig& model, DType compute, int num_threads);

/// Compares all ranks' fingerprints. Where they differ the ranks are named; `reproducible` refuses
/// the run (exit code 64), otherwise it is a warning. Collective; returns this rank's.
std::string check_fingerprints(Communicator& world, Stream& stream, const ModelConfig& model,
                               DType compute, bool reproducible);

}  // namespace arcus
