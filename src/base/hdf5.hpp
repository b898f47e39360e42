#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "src/base/dtype.hpp"

/// The HDF5 calls that Arcus needs, each wrapped once. Failures throw arcus::Error carrying HDF5's
/// own error stack; the exit code is the one given when the file was opened. Not a general binding.
namespace arcus::h5 {

struct WriteStatus;  // of src/base/hdf5_driver.hpp

using Id = std::int64_t;  ///< hid_t, kept out of this header
using Shape = std::vector<std::int64_t>;

/// Whether several threads may call the library, as it was built.
bool is_thread_safe();

/// Owning handle of any HDF5 object.
class Handle {
 public:
  Handle() = default;
  explicit Handle(Id id) : id_(id) {}
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, -1)) {}
  Handle& operator=(Handle&& other) noexcept;
  ~Handle();
  Id id() const { return id_; }

 private:
  Id id_ = -1;
};

/// One source of a virtual dataset: rows [begin, begin + rows) of the virtual tensor (first
/// dimension of `shape` seen as [rows, cols]) come from rows [source_begin, ...) of a dataset.
struct VirtualSource {
  std::string file;     ///< relative to the folder of the index file
  std::string dataset;  ///< a [source_rows, cols] dataset there
  std::int64_t source_rows = 0;
  std::int64_t source_begin = 0;
  std::int64_t begin = 0;
  std::int64_t rows = 0;
};

class Dataset {
 public:
  Dataset(Handle handle, std::string name, ExitCode code,
          std::shared_ptr<const WriteStatus> status = nullptr);
  const Shape& shape() const { return shape_; }
  DType dtype() const { return dtype_; }
  std::int64_t size() const;
  /// File offset of the contiguous data, for memory mapping; -1 when nothing is stored yet.
  std::int64_t offset() const;
  /// Elements [begin, begin + count) of the flattened first dimension.
  void read_rows(std::int64_t begin, std::int64_t count, void* out) const;
  void write_rows(std::int64_t begin, std::int64_t count, const void* data);
  void read_all(void* out) const;
  bool is_virtual() const;

 private:
  void transfer(std::int64_t begin, std::int64_t count, void* data, bool write) const;
  Handle handle_;
  std::string name_;
  ExitCode code_;
  std::shared_ptr<const WriteStatus> status_;  ///< null where the file is open for reading
  Shape shape_;
  DType dtype_;
};

class File {
 public:
  /// Creates or truncates.
  static File create(const std::filesystem::path& path, ExitCode code);
  static File open(const std::filesystem::path& path, ExitCode code);
  static File open_for_writing(const std::filesystem::path& path, ExitCode code);

  /// Contiguous layout; missing groups in `name` are created.
  Dataset create_dataset(const std::string& name, DType dtype, const Shape& shape);
  /// Grows along the first dimension (chunked): for writers that do not know the length.
  Dataset create_growing_dataset(const std::string& name, DType dtype, const Shape& row_shape,
                                 std::int64_t chunk_rows);
  void extend(const std::string& name, std::int64_t rows);
  /// A dataset of `shape` put together from other files: its rows (all but the last dimension
  /// flattened) come from `sources`.
  void create_virtual_dataset(const std::string& name, DType dtype, const Shape& shape,
                              std::span<const VirtualSource> sources);
  Dataset dataset(const std::string& name) const;
  bool exists(const std::string& name) const;
  /// Names of the datasets in the file, full paths without the leading slash, in name order.
  std::vector<std::string> dataset_names() const;

  void write_attribute(const std::string& name, std::string_view text);
  void write_attribute(const std::string& name, std::int64_t value);
  std::string text_attribute(const std::string& name) const;
  std::int64_t int_attribute(const std::string& name) const;
  bool has_attribute(const std::string& name) const;

  template <class T>
  void write(const std::string& name, const Shape& shape, const T* data) {
    create_dataset(name, dtype_of<T>(), shape).write_rows(0, shape.empty() ? 1 : shape[0], data);
  }
  template <class T>
  std::vector<T> read(const std::string& name) const {
    const Dataset d = dataset(name);
    ARCUS_REQUIRE(d.dtype() == dtype_of<T>(), code_, "{}: dataset {} holds {}, expected {}",
                  path_.string(), name, name_of(d.dtype()), name_of(dtype_of<T>()));
    std::vector<T> result(static_cast<std::size_t>(d.size()));
    d.read_all(result.data());
    return result;
  }
  /// Writes buffered data to the operating system.
  void flush();
  /// Writes everything and closes the file; throws when anything could not be written since it was
  /// opened (a full disk). A file that was written and only destroyed hides such a failure.
  void close();
  const std::filesystem::path& path() const { return path_; }

 private:
  File(Handle handle, std::filesystem::path path, ExitCode code,
       std::shared_ptr<WriteStatus> status = nullptr);
  void require_written() const;
  Handle handle_;
  std::filesystem::path path_;
  ExitCode code_;
  std::shared_ptr<WriteStatus> status_;  ///< null where the file is open for reading
};

}  // namespace arcus::h5
