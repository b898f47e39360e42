#pragma once

#include <filesystem>
#include <functional>
#include <span>
#include <string>

#include "checkpoints/interop/family.hpp"
#include "checkpoints/interop/tensor_plan.hpp"
#include "checkpoints/interop/tokenizer_files.hpp"

namespace arcus {

/// A model that is to be written for other programs.
struct ExportSource {
  PortableModel model;
  const Family* family = nullptr;
  FileType type = FileType::f32;  ///< of the matrices; the gate, norms and biases stay f32
  std::string name;               ///< for people
  UnitReader read;
  const Tokenizer* tokenizer = nullptr;  ///< null: none is written
};

/// Told of bytes written, of bytes in all.
using ExportProgress = std::function<void(std::int64_t done, std::int64_t all)>;

/// Writes a Hugging Face directory's files into `directory`, which is there and empty: config.json,
/// generation_config.json, safetensors of at most `shard_bytes` with their index, the tokenizer.
/// No more than one unit of the model is held in memory. Throws (data) on a full disk.
void write_hf(const ExportSource& source, const std::filesystem::path& directory,
              const ExportProgress& progress, std::int64_t shard_bytes = 5'000'000'000);
/// Writes a GGUF file.
void write_gguf(const ExportSource& source, const std::filesystem::path& file,
                const ExportProgress& progress);

/// Bytes of all tensors.
std::int64_t export_bytes(const ExportSource& source, Target target);

}  // namespace arcus
