#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "checkpoints/interop/hf_config.hpp"
#include "checkpoints/interop/tensor_plan.hpp"
#include "checkpoints/interop/tokenizer_files.hpp"

namespace arcus {

/// A model in another program's files: a Hugging Face directory or a GGUF file. When it is made,
/// every tensor of the files has its place in the model, once, and every tensor of the model is
/// there, once; else it throws (data) naming them.
class ModelFiles {
 public:
  /// `ignored_keys`: keys of the description that may be passed over though they are unknown.
  explicit ModelFiles(const std::filesystem::path& path,
                      const std::set<std::string>& ignored_keys = {});
  ~ModelFiles();
  ModelFiles(ModelFiles&&) noexcept;

  const PortableModel& model() const { return described_.model; }
  const Family& family() const { return *described_.family; }
  /// What was left out or taken to be something else, for the user.
  const std::vector<std::string>& notes() const { return described_.notes; }
  /// The tensors that they fill: portable_tensors(model()).
  const std::vector<TensorSpec>& tensors() const { return specs_; }
  /// The numbers of one unit, exactly as they stand there.
  void read(const ModelUnit& unit, std::span<float> out) const;

  /// The tokenizer; null where they have none.
  std::unique_ptr<Tokenizer> tokenizer() const;

 private:
  struct Place {
    const TensorFile* file = nullptr;
    const FileTensor* tensor = nullptr;  ///< null: zeros
    std::int64_t begin = 0;              ///< first element in it
    std::int64_t paired_head_dim = 0;
    bool transposed = false;
  };
  void read_transposed(const Place& at, std::int64_t cols, std::span<float> out) const;
  void open_directory(const std::filesystem::path& path, const std::set<std::string>& ignored);
  void open_gguf(const std::filesystem::path& path, const std::set<std::string>& ignored);
  void collect_tensors();
  void check_plausible() const;
  HfSpelling find_spelling() const;
  void leave_out(const std::vector<PlannedTensor>& plan);
  void check_tied_head();
  void place(const std::vector<PlannedTensor>& plan);

  std::string source_;
  DescribedModel described_;
  std::vector<std::unique_ptr<TensorFile>> files_;
  const GgufFile* gguf_ = nullptr;
  std::map<std::string, std::pair<const TensorFile*, const FileTensor*>> found_;
  std::vector<TensorSpec> specs_;
  std::map<std::string, TensorSpec> spec_of_;
  std::map<ModelUnit, Place> places_;
  TokenizerFiles tokenizer_files_;
};

}  // namespace arcus
