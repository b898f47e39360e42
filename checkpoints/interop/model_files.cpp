#include "checkpoints/interop/model_files.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <regex>

#include "checkpoints/interop/gguf_config.hpp"
#include "checkpoints/interop/safetensors.hpp"
#include "src/base/error.hpp"
#include "src/data/checked_json.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;

std::string read_file(const fs::path& path) {
  const MappedFile file(path);
  return std::string(file.bytes());
}

/// Names of the files that hold a directory's tensors.
std::vector<std::string> shard_names(const fs::path& directory) {
  const fs::path index = directory / "model.safetensors.index.json";
  if (fs::exists(directory / "model.safetensors") && !fs::exists(index)) {
    return {"model.safetensors"};
  }
  ARCUS_REQUIRE(fs::exists(index), ExitCode::data,
                "{}: neither model.safetensors nor model.safetensors.index.json is there; is it "
                "a Hugging Face directory, and is it complete?",
                directory.string());
  const nlohmann::json json = parse_checked_json(index.string(), read_file(index));
  ARCUS_REQUIRE(json.is_object() && json.contains("weight_map") && json["weight_map"].is_object(),
                ExitCode::data, "{}: weight_map is missing", index.string());
  std::set<std::string> names;
  for (const auto& [tensor, file] : json["weight_map"].items()) {
    ARCUS_REQUIRE(file.is_string(), ExitCode::data, "{}: the file of {} is no text", index.string(),
                  tensor);
    const auto name = file.get<std::string>();
    ARCUS_REQUIRE(fs::path(name).filename() == name && name != ".." && name != ".", ExitCode::data,
                  "{}: \"{}\" is no name of a file in this directory", index.string(), name);
    names.insert(name);
  }
  for (const std::string& name : names) {
    ARCUS_REQUIRE(fs::exists(directory / name), ExitCode::data,
                  "{}: {} is missing, though the index names it; fetch it (half a download?)",
                  directory.string(), name);
  }
  return {names.begin(), names.end()};
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

/// Without dimensions of one, which programs add and leave out.
std::vector<std::int64_t> essential(std::vector<std::int64_t> shape) {
  std::erase(shape, 1);
  return shape;
}

/// Tables of rotations, and GPT-2's masks.
bool follows_from_config(std::string_view tensor, bool gpt2) {
  return tensor.ends_with("rotary_emb.inv_freq") ||
         (gpt2 && (tensor.ends_with(".attn.bias") || tensor.ends_with(".attn.masked_bias")));
}

/// The layer number in a name, or -1.
std::int64_t layer_in(const std::string& name) {
  static const std::regex pattern(R"((?:layers|blk)\.(\d{1,6})\.)");
  std::smatch match;
  return std::regex_search(name, match, pattern) ? std::stoll(match[1]) : -1;
}

}  // namespace

ModelFiles::~ModelFiles() = default;
ModelFiles::ModelFiles(ModelFiles&&) noexcept = default;

ModelFiles::ModelFiles(const fs::path& path, const std::set<std::string>& ignored_keys)
    : source_(path.string()) {
  ARCUS_REQUIRE(fs::exists(path), ExitCode::data, "{} does not exist", source_);
  if (fs::is_directory(path)) {
    open_directory(path, ignored_keys);
  } else {
    open_gguf(path, ignored_keys);
  }
}

void ModelFiles::open_directory(const fs::path& path, const std::set<std::string>& ignored) {
  ARCUS_REQUIRE(fs::exists(path / "config.json"), ExitCode::data,
                "{}: config.json is missing; is it a Hugging Face directory?", source_);
  described_ =
      read_hf_config(read_file(path / "config.json"), (path / "config.json").string(), ignored);
  const bool gpt2 = described_.family->spelling == Spelling::gpt2;
  for (const std::string& name : shard_names(path)) {
    files_.push_back(std::make_unique<SafetensorsFile>(
        path / name, [=](std::string_view tensor) { return follows_from_config(tensor, gpt2); }));
  }
  for (const std::string& name : hf_tokenizer_file_names()) {
    if (fs::exists(path / name)) tokenizer_files_[name] = read_file(path / name);
  }
  collect_tensors();
  check_plausible();
  check_tied_head();
  const std::vector<PlannedTensor> plan =
      hf_tensors(described_.model, *described_.family, find_spelling());
  leave_out(plan);
  place(plan);
}

void ModelFiles::open_gguf(const fs::path& path, const std::set<std::string>& ignored) {
  auto file = std::make_unique<GgufFile>(path);
  described_ = read_gguf_config(*file, ignored);
  gguf_ = file.get();
  files_.push_back(std::move(file));
  collect_tensors();
  check_plausible();
  const std::vector<PlannedTensor> plan = gguf_tensors(described_.model, *described_.family);
  leave_out(plan);
  place(plan);
}

void ModelFiles::collect_tensors() {
  for (const auto& file : files_) {
    for (const FileTensor& tensor : file->tensors()) {
      const bool first = found_.emplace(tensor.name, std::pair{file.get(), &tensor}).second;
      ARCUS_REQUIRE(first, ExitCode::data, "{}: the tensor {} stands in two files", source_,
                    tensor.name);
    }
  }
}

/// A description that asks for more gates than there are numbers would need memory that no file
/// justifies, before the missing tensors are found.
void ModelFiles::check_plausible() const {
  const ModelConfig& m = described_.model.model;
  double numbers = 0;
  for (const auto& [name, tensor] : found_) {
    numbers += static_cast<double>(tensor.second->num_elements());
  }
  const auto d = [](std::int64_t n) { return static_cast<double>(n); };
  const double gates = d(m.num_layers - m.first_k_dense) * d(m.num_experts) * d(m.hidden_size);
  ARCUS_REQUIRE(m.num_layers <= std::ssize(found_) && gates <= numbers, ExitCode::data,
                "{}: the description has {} layers of {} experts, the files {} tensors of {:.3g} "
                "numbers in all; they do not belong together",
                source_, m.num_layers, m.num_experts, found_.size(), numbers);
}

HfSpelling ModelFiles::find_spelling() const {
  HfSpelling spelling = written_spelling(*described_.family);
  const auto any = [&](const std::string& part) {
    return std::ranges::any_of(
        found_, [&](const auto& entry) { return entry.first.find(part) != std::string::npos; });
  };
  if (described_.family->spelling == Spelling::gpt2) spelling.prefix = "transformer.";
  if (!any(spelling.prefix)) spelling.prefix.clear();
  spelling.fused_experts = any(".experts.gate_up_proj");
  if (described_.family->spelling == Spelling::mixtral) {
    if (!any("block_sparse_moe.")) spelling.moe_folder = "mlp.";
    spelling.mixtral_experts = any(".w1.weight");
  }
  return spelling;
}

/// Layers behind the last one have no part in what the model computes: they predict further tokens
/// in training.
void ModelFiles::leave_out(const std::vector<PlannedTensor>& plan) {
  std::set<std::string> planned;
  for (const PlannedTensor& tensor : plan) planned.insert(tensor.name);
  const bool may_predict = described_.family->expert_bias;
  std::int64_t left = 0;
  std::erase_if(found_, [&](const auto& entry) {
    const std::string& name = entry.first;
    if (planned.contains(name)) return false;
    const bool behind = may_predict && layer_in(name) >= described_.model.model.num_layers;
    left += behind ? 1 : 0;
    return behind;
  });
  if (left > 0) {
    described_.notes.push_back(fmt::format(
        "{} tensors of layers behind the last one (prediction of further tokens) were left out",
        left));
  }
}

/// A tied model's file may hold the embedding twice; a head that is missing is the embedding.
void ModelFiles::check_tied_head() {
  ModelConfig& m = described_.model.model;
  const auto head = found_.find("lm_head.weight");
  if (!m.tie_embeddings && head == found_.end()) {
    m.tie_embeddings = true;
    described_.notes.push_back("lm_head.weight is not there: the embedding serves as head");
  }
  if (!m.tie_embeddings || head == found_.end()) return;
  const auto embedding = std::ranges::find_if(found_, [](const auto& entry) {
    return entry.first.ends_with("embed_tokens.weight") ||
           entry.first.ends_with("word_embeddings.weight") || entry.first.ends_with("wte.weight");
  });
  const auto bytes = [](const auto& entry) {
    return entry->second.first->bytes(*entry->second.second);
  };
  ARCUS_REQUIRE(embedding != found_.end() && bytes(embedding) == bytes(head), ExitCode::data,
                "{}: tie_word_embeddings is true, but lm_head.weight differs from the embedding; "
                "one of the two is wrong",
                source_);
  described_.notes.push_back("lm_head.weight repeats the embedding and was left out");
  found_.erase(head);
}

void ModelFiles::place(const std::vector<PlannedTensor>& plan) {
  specs_ = portable_tensors(described_.model);
  for (const TensorSpec& spec : specs_) spec_of_.emplace(spec.name, spec);
  std::vector<std::string> missing;
  for (const PlannedTensor& planned : plan) {
    const auto found = found_.find(planned.name);
    Place at{.paired_head_dim = planned.paired_head_dim, .transposed = planned.transposed};
    if (found != found_.end()) {
      at.file = found->second.first;
      at.tensor = found->second.second;
      ARCUS_REQUIRE(essential(at.tensor->shape) == essential(planned.shape), ExitCode::data,
                    "{}: the tensor {} has the shape {}, the description asks for {}", source_,
                    planned.name, shape_text(at.tensor->shape), shape_text(planned.shape));
      found_.erase(found);
    } else if (!planned.may_be_absent) {
      missing.push_back(planned.name);
      continue;
    }
    for (const ModelUnit& piece : planned.pieces) {
      const TensorSpec& spec = spec_of_.at(piece.tensor);
      const bool once = places_.emplace(piece, at).second;
      ARCUS_CHECK(once, "{}[{}] is planned twice", piece.tensor, piece.unit);
      at.begin += spec.num_elements() / spec.num_units;
    }
  }
  std::vector<std::string> unused;
  for (const auto& [name, tensor] : found_) unused.push_back(name);
  ARCUS_REQUIRE(
      missing.empty(), ExitCode::data, "{}: tensors are missing: {}{}", source_,
      list_names(missing),
      unused.empty() ? "" : fmt::format("; these are there instead: {}", list_names(unused)));
  ARCUS_REQUIRE(unused.empty(), ExitCode::data,
                "{}: tensors that a {} of this description does not have: {}; they would be lost",
                source_, described_.family->name, list_names(unused));
  for (const TensorSpec& spec : specs_) {
    for (std::int64_t unit = 0; unit < spec.num_units; ++unit) {
      ARCUS_CHECK(places_.contains({spec.name, unit}), "{}[{}] has no place in {}", spec.name, unit,
                  source_);
    }
  }
}

void ModelFiles::read(const ModelUnit& unit, std::span<float> out) const {
  const Place& at = places_.at(unit);
  if (at.tensor == nullptr) {
    std::ranges::fill(out, 0.0F);
    return;
  }
  const TensorSpec& spec = spec_of_.at(unit.tensor);
  if (at.transposed) return read_transposed(at, spec.cols(), out);
  at.file->read(*at.tensor, at.begin, out);
  if (at.paired_head_dim == 0) return;
  std::vector<float> values(out.begin(), out.end());
  unpair_rows(at.paired_head_dim, spec.cols(), values);
  std::ranges::copy(values, out.begin());
}

/// out [rows, cols] from the columns of [cols, all rows] that begin at `at`.
void ModelFiles::read_transposed(const Place& at, std::int64_t cols, std::span<float> out) const {
  const std::int64_t all_rows = at.tensor->num_elements() / cols;
  const std::int64_t rows = std::ssize(out) / cols;
  const std::int64_t first_row = at.begin / cols;
  std::vector<float> line(static_cast<std::size_t>(rows));
  for (std::int64_t col = 0; col < cols; ++col) {
    at.file->read(*at.tensor, col * all_rows + first_row, line);
    for (std::int64_t row = 0; row < rows; ++row) {
      out[static_cast<std::size_t>(row * cols + col)] = line[static_cast<std::size_t>(row)];
    }
  }
}

std::unique_ptr<Tokenizer> ModelFiles::tokenizer() const {
  return gguf_ != nullptr ? tokenizer_from_gguf(*gguf_) : tokenizer_from_hf(tokenizer_files_);
}

}  // namespace arcus
