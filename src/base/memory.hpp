#pragma once

#include <cstdint>
#include <filesystem>

namespace arcus {

/// Bytes that this process may still take: what the kernel calls available, or what the limits of
/// its control group and of those around it leave, where that is less (Slurm and containers set
/// them); 0 = unknown. `root` is where /proc and /sys are, for tests.
std::int64_t available_memory(const std::filesystem::path& root = "/");

/// Bytes of this process in memory, now, and at most since reset_peak_memory (since its start
/// where the system does not allow that).
std::int64_t resident_memory();
std::int64_t peak_memory();
void reset_peak_memory();

}  // namespace arcus
