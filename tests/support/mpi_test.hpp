#pragma once

#include "comm/backends.hpp"

namespace arcus {

/// The MPI session of a test program with RANKS. Every rank runs every test; a test failed on some
/// rank fails on rank 0, whose printer reports it. Use EXPECT, not ASSERT, before a collective, and
/// decide skips from the number of ranks alone.
MpiSession& test_session();

}  // namespace arcus
