#include "src/base/hdf5.hpp"

#include <hdf5.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>

#include "src/base/hdf5_driver.hpp"

namespace arcus::h5 {
namespace {

static_assert(sizeof(Id) == sizeof(hid_t));

std::string error_stack() {
  std::string text;
  H5Ewalk2(
      H5E_DEFAULT, H5E_WALK_DOWNWARD,
      [](unsigned, const H5E_error2_t* error, void* out) -> herr_t {
        auto& result = *static_cast<std::string*>(out);
        if (!result.empty()) result += "; ";
        result += error->desc != nullptr ? error->desc : "?";
        return 0;
      },
      &text);
  return text.empty() ? "no further detail" : text;
}

/// HDF5 prints its error stack by default; ours travels in the exception instead. The setting is
/// per thread in the thread-safe library.
void quiet() { H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr); }

// `expression` is an HDF5 call whose negative result means failure.
#define ARCUS_H5(code, expression, ...)                                                            \
  [&] {                                                                                            \
    const auto arcus_h5_result = (expression);                                                     \
    if (arcus_h5_result < 0) {                                                                     \
      ARCUS_FAIL((code), "{}: {} failed ({})", ::fmt::format(__VA_ARGS__),                         \
                 std::string_view(#expression).substr(0, std::string_view(#expression).find('(')), \
                 error_stack());                                                                   \
    }                                                                                              \
    return arcus_h5_result;                                                                        \
  }()

/// bf16 has no HDF5 type: stored as u16 with the attribute "dtype" = "bf16" on the dataset.
hid_t native_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return H5T_IEEE_F32LE;
    case DType::f64:
      return H5T_IEEE_F64LE;
    case DType::bf16:
      return H5T_STD_U16LE;
    case DType::i32:
      return H5T_STD_I32LE;
    case DType::i64:
      return H5T_STD_I64LE;
    case DType::u8:
      return H5T_STD_U8LE;
    case DType::u16:
      return H5T_STD_U16LE;
    case DType::u32:
      return H5T_STD_U32LE;
    case DType::u64:
      return H5T_STD_U64LE;
  }
  return -1;
}

std::vector<hsize_t> dims_of(const Shape& shape) { return {shape.begin(), shape.end()}; }

Handle make_space(const Shape& shape, ExitCode code) {
  if (shape.empty()) return Handle(ARCUS_H5(code, H5Screate(H5S_SCALAR), "scalar"));
  const auto dims = dims_of(shape);
  return Handle(ARCUS_H5(code,
                         H5Screate_simple(static_cast<int>(dims.size()), dims.data(), nullptr),
                         "dataspace of {} dimensions", dims.size()));
}

Handle link_properties(ExitCode code) {
  Handle properties(ARCUS_H5(code, H5Pcreate(H5P_LINK_CREATE), "link properties"));
  ARCUS_H5(code, H5Pset_create_intermediate_group(properties.id(), 1), "link properties");
  return properties;
}

void mark_bf16(hid_t dataset, DType dtype, ExitCode code) {
  if (dtype != DType::bf16) return;
  const Handle space(ARCUS_H5(code, H5Screate(H5S_SCALAR), "attribute"));
  const Handle type(ARCUS_H5(code, H5Tcopy(H5T_C_S1), "attribute"));
  ARCUS_H5(code, H5Tset_size(type.id(), 4), "attribute");
  const Handle attribute(
      ARCUS_H5(code, H5Acreate2(dataset, "dtype", type.id(), space.id(), H5P_DEFAULT, H5P_DEFAULT),
               "dtype"));
  ARCUS_H5(code, H5Awrite(attribute.id(), type.id(), "bf16"), "dtype");
}

DType read_dtype(hid_t dataset, const std::string& name, ExitCode code) {
  if (H5Aexists(dataset, "dtype") > 0) return DType::bf16;
  const Handle type(ARCUS_H5(code, H5Dget_type(dataset), "{}", name));
  for (const DType dtype : {DType::f32, DType::f64, DType::i32, DType::i64, DType::u8, DType::u16,
                            DType::u32, DType::u64}) {
    if (H5Tequal(type.id(), native_type(dtype)) > 0) return dtype;
  }
  ARCUS_FAIL(code, "dataset {} has an element type that Arcus does not write", name);
}

/// The driver notes failures instead of returning them; here they come to light.
void require_no_error(const WriteStatus* status, std::string_view what, ExitCode code) {
  ARCUS_REQUIRE(status == nullptr || status->error == 0, code, "writing {} failed: {}", what,
                std::strerror(status->error));
}

std::string open_failure(const WriteStatus& status) {
  return status.error != 0 ? std::strerror(status.error) : error_stack();
}

Handle make_dataset(hid_t file, const std::string& name, DType dtype, hid_t space, hid_t properties,
                    ExitCode code) {
  const Handle links = link_properties(code);
  // No times of day in the file: equal content gives equal bytes.
  ARCUS_H5(code, H5Pset_obj_track_times(properties, false), "{}", name);
  Handle dataset(ARCUS_H5(code,
                          H5Dcreate2(file, name.c_str(), native_type(dtype), space, links.id(),
                                     properties, H5P_DEFAULT),
                          "creating dataset {}", name));
  mark_bf16(dataset.id(), dtype, code);
  return dataset;
}

}  // namespace

bool is_thread_safe() {
  hbool_t safe = false;
  return H5is_library_threadsafe(&safe) >= 0 && safe;
}

Handle& Handle::operator=(Handle&& other) noexcept {
  std::swap(id_, other.id_);
  return *this;
}
Handle::~Handle() {
  if (id_ >= 0) H5Idec_ref(id_);
}

Dataset::Dataset(Handle handle, std::string name, ExitCode code,
                 std::shared_ptr<const WriteStatus> status)
    : handle_(std::move(handle)), name_(std::move(name)), code_(code), status_(std::move(status)) {
  const Handle space(ARCUS_H5(code_, H5Dget_space(handle_.id()), "{}", name_));
  const int rank = ARCUS_H5(code_, H5Sget_simple_extent_ndims(space.id()), "{}", name_);
  std::vector<hsize_t> dims(static_cast<std::size_t>(rank));
  ARCUS_H5(code_, H5Sget_simple_extent_dims(space.id(), dims.data(), nullptr), "{}", name_);
  shape_.assign(dims.begin(), dims.end());
  dtype_ = read_dtype(handle_.id(), name_, code_);
}

std::int64_t Dataset::size() const {
  return std::accumulate(shape_.begin(), shape_.end(), std::int64_t{1}, std::multiplies<>());
}

std::int64_t Dataset::offset() const {
  const haddr_t address = H5Dget_offset(handle_.id());
  return address == HADDR_UNDEF ? -1 : static_cast<std::int64_t>(address);
}

bool Dataset::is_virtual() const {
  const Handle properties(ARCUS_H5(code_, H5Dget_create_plist(handle_.id()), "{}", name_));
  return H5Pget_layout(properties.id()) == H5D_VIRTUAL;
}

void Dataset::transfer(std::int64_t begin, std::int64_t count, void* data, bool write) const {
  quiet();
  const std::int64_t rows = shape_.empty() ? 1 : shape_[0];
  ARCUS_CHECK(begin >= 0 && count >= 0 && begin + count <= rows,
              "rows {}..{} outside dataset {} of {} rows", begin, begin + count, name_, rows);
  if (count == 0) return;
  const Handle file_space(ARCUS_H5(code_, H5Dget_space(handle_.id()), "{}", name_));
  Shape part = shape_;
  if (!part.empty()) {
    part[0] = count;
    std::vector<hsize_t> start(part.size(), 0);
    start[0] = static_cast<hsize_t>(begin);
    ARCUS_H5(code_,
             H5Sselect_hyperslab(file_space.id(), H5S_SELECT_SET, start.data(), nullptr,
                                 dims_of(part).data(), nullptr),
             "{}", name_);
  }
  const Handle memory = make_space(part, code_);
  if (write) {
    ARCUS_H5(code_,
             H5Dwrite(handle_.id(), native_type(dtype_), memory.id(), file_space.id(), H5P_DEFAULT,
                      data),
             "writing dataset {} (is the disk full?)", name_);
    require_no_error(status_.get(), name_, code_);
  } else {
    ARCUS_H5(
        code_,
        H5Dread(handle_.id(), native_type(dtype_), memory.id(), file_space.id(), H5P_DEFAULT, data),
        "reading dataset {}", name_);
  }
}

void Dataset::read_rows(std::int64_t begin, std::int64_t count, void* out) const {
  transfer(begin, count, out, false);
}
void Dataset::write_rows(std::int64_t begin, std::int64_t count, const void* data) {
  transfer(begin, count, const_cast<void*>(data), true);  // H5Dwrite only reads it
}
void Dataset::read_all(void* out) const { transfer(0, shape_.empty() ? 1 : shape_[0], out, false); }

File::File(Handle handle, std::filesystem::path path, ExitCode code,
           std::shared_ptr<WriteStatus> status)
    : handle_(std::move(handle)), path_(std::move(path)), code_(code), status_(std::move(status)) {}

void File::require_written() const { require_no_error(status_.get(), path_.string(), code_); }

File File::create(const std::filesystem::path& path, ExitCode code) {
  quiet();
  auto status = std::make_shared<WriteStatus>();
  const Handle access(ARCUS_H5(code, make_write_access(status), "file access"));
  Handle handle(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access.id()));
  ARCUS_REQUIRE(handle.id() >= 0, code, "cannot create {}: {}", path.string(),
                open_failure(*status));
  return {std::move(handle), path, code, std::move(status)};
}

File File::open(const std::filesystem::path& path, ExitCode code) {
  quiet();
  ARCUS_REQUIRE(std::filesystem::exists(path), code, "{} does not exist", path.string());
  return {Handle(ARCUS_H5(code, H5Fopen(path.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT),
                          "cannot open {}", path.string())),
          path, code};
}

File File::open_for_writing(const std::filesystem::path& path, ExitCode code) {
  quiet();
  auto status = std::make_shared<WriteStatus>();
  const Handle access(ARCUS_H5(code, make_write_access(status), "file access"));
  Handle handle(H5Fopen(path.c_str(), H5F_ACC_RDWR, access.id()));
  ARCUS_REQUIRE(handle.id() >= 0, code, "cannot open {} for writing: {}", path.string(),
                open_failure(*status));
  return {std::move(handle), path, code, std::move(status)};
}

Dataset File::create_dataset(const std::string& name, DType dtype, const Shape& shape) {
  quiet();
  require_written();
  const Handle space = make_space(shape, code_);
  const Handle properties(ARCUS_H5(code_, H5Pcreate(H5P_DATASET_CREATE), "{}", name));
  // Early allocation, so that the file's size and H5Dget_offset are final from the start.
  ARCUS_H5(code_, H5Pset_alloc_time(properties.id(), H5D_ALLOC_TIME_EARLY), "{}", name);
  ARCUS_H5(code_, H5Pset_fill_time(properties.id(), H5D_FILL_TIME_NEVER), "{}", name);
  return {make_dataset(handle_.id(), name, dtype, space.id(), properties.id(), code_), name, code_,
          status_};
}

Dataset File::create_growing_dataset(const std::string& name, DType dtype, const Shape& row_shape,
                                     std::int64_t chunk_rows) {
  quiet();
  require_written();
  std::vector<hsize_t> dims{0};
  std::vector<hsize_t> limit{H5S_UNLIMITED};
  std::vector<hsize_t> chunk{static_cast<hsize_t>(chunk_rows)};
  for (const std::int64_t extent : row_shape) {
    for (auto* list : {&dims, &limit, &chunk}) list->push_back(static_cast<hsize_t>(extent));
  }
  const Handle space(
      ARCUS_H5(code_, H5Screate_simple(static_cast<int>(dims.size()), dims.data(), limit.data()),
               "{}", name));
  const Handle properties(ARCUS_H5(code_, H5Pcreate(H5P_DATASET_CREATE), "{}", name));
  ARCUS_H5(code_, H5Pset_chunk(properties.id(), static_cast<int>(chunk.size()), chunk.data()), "{}",
           name);
  return {make_dataset(handle_.id(), name, dtype, space.id(), properties.id(), code_), name, code_,
          status_};
}

void File::extend(const std::string& name, std::int64_t rows) {
  const Handle dataset(
      ARCUS_H5(code_, H5Dopen2(handle_.id(), name.c_str(), H5P_DEFAULT), "{}", name));
  const Handle space(ARCUS_H5(code_, H5Dget_space(dataset.id()), "{}", name));
  const int rank = ARCUS_H5(code_, H5Sget_simple_extent_ndims(space.id()), "{}", name);
  std::vector<hsize_t> dims(static_cast<std::size_t>(rank));
  ARCUS_H5(code_, H5Sget_simple_extent_dims(space.id(), dims.data(), nullptr), "{}", name);
  dims[0] = static_cast<hsize_t>(rows);
  ARCUS_H5(code_, H5Dset_extent(dataset.id(), dims.data()), "growing dataset {}", name);
}

void File::create_virtual_dataset(const std::string& name, DType dtype, const Shape& shape,
                                  std::span<const VirtualSource> sources) {
  quiet();
  const Handle space = make_space(shape, code_);
  const Handle properties(ARCUS_H5(code_, H5Pcreate(H5P_DATASET_CREATE), "{}", name));
  ARCUS_H5(code_, H5Pset_layout(properties.id(), H5D_VIRTUAL), "{}", name);
  const std::int64_t cols = shape.size() < 2 ? 1 : shape.back();
  // Rows are counted over all but the last dimension, so a range of rows is a list of boxes.
  const auto rank = shape.size();
  const std::int64_t inner = rank < 3 ? 1
                                      : std::accumulate(shape.begin() + 1, shape.end() - 1,
                                                        std::int64_t{1}, std::multiplies<>());
  ARCUS_CHECK(rank <= 3, "virtual dataset {} has {} dimensions, at most 3 are supported", name,
              rank);
  const auto select = [&](std::int64_t row, std::int64_t count, H5S_seloper_t op) {
    std::vector<hsize_t> start;
    std::vector<hsize_t> extent;
    if (rank == 3) {
      const std::int64_t whole = row % inner == 0 ? count / inner : 0;
      start = {static_cast<hsize_t>(row / inner), static_cast<hsize_t>(row % inner), 0};
      extent = {static_cast<hsize_t>(std::max<std::int64_t>(whole, 1)),
                static_cast<hsize_t>(whole > 0 ? inner : std::min(count, inner - row % inner)),
                static_cast<hsize_t>(cols)};
    } else {
      start = {static_cast<hsize_t>(row)};
      extent = {static_cast<hsize_t>(count)};
      if (rank == 2) {
        start.push_back(0);
        extent.push_back(static_cast<hsize_t>(cols));
      }
    }
    ARCUS_H5(code_,
             H5Sselect_hyperslab(space.id(), op, start.data(), nullptr, extent.data(), nullptr),
             "{}", name);
    return static_cast<std::int64_t>(rank == 3 ? extent[0] * extent[1] : extent[0]);
  };
  for (const VirtualSource& source : sources) {
    // A source keeps the tensor's own dimensions only in its last one: [source_rows, cols].
    const Shape source_shape =
        rank < 2 ? Shape{source.source_rows} : Shape{source.source_rows, cols};
    std::int64_t done = 0;
    while (done < source.rows) {
      const std::int64_t count = select(source.begin + done, source.rows - done, H5S_SELECT_SET);
      const Handle source_space = make_space(source_shape, code_);
      std::vector<hsize_t> start(source_shape.size(), 0);
      std::vector<hsize_t> extent = dims_of(source_shape);
      start[0] = static_cast<hsize_t>(source.source_begin) + static_cast<hsize_t>(done);
      extent[0] = static_cast<hsize_t>(count);
      ARCUS_H5(code_,
               H5Sselect_hyperslab(source_space.id(), H5S_SELECT_SET, start.data(), nullptr,
                                   extent.data(), nullptr),
               "{}", name);
      ARCUS_H5(code_,
               H5Pset_virtual(properties.id(), space.id(), source.file.c_str(),
                              source.dataset.c_str(), source_space.id()),
               "mapping {} of {} into {}", source.dataset, source.file, name);
      done += count;
    }
  }
  ARCUS_H5(code_, H5Sselect_all(space.id()), "{}", name);
  make_dataset(handle_.id(), name, dtype, space.id(), properties.id(), code_);
}

Dataset File::dataset(const std::string& name) const {
  quiet();
  ARCUS_REQUIRE(exists(name), code_, "{} has no dataset {}", path_.string(), name);
  return {Handle(ARCUS_H5(code_, H5Dopen2(handle_.id(), name.c_str(), H5P_DEFAULT),
                          "{}: opening dataset {}", path_.string(), name)),
          name, code_, status_};
}

bool File::exists(const std::string& name) const {
  quiet();
  // H5Lexists needs every group on the way to exist.
  for (std::size_t slash = name.find('/', 1); slash != std::string::npos;
       slash = name.find('/', slash + 1)) {
    if (H5Lexists(handle_.id(), name.substr(0, slash).c_str(), H5P_DEFAULT) <= 0) return false;
  }
  return H5Lexists(handle_.id(), name.c_str(), H5P_DEFAULT) > 0;
}

std::vector<std::string> File::dataset_names() const {
  quiet();
  std::vector<std::string> names;
  ARCUS_H5(code_,
           H5Ovisit2(
               handle_.id(), H5_INDEX_NAME, H5_ITER_INC,
               [](hid_t, const char* name, const H5O_info_t* info, void* out) -> herr_t {
                 if (info->type == H5O_TYPE_DATASET) {
                   static_cast<std::vector<std::string>*>(out)->emplace_back(name);
                 }
                 return 0;
               },
               &names, H5O_INFO_BASIC),
           "{}: listing datasets", path_.string());
  return names;
}

void File::write_attribute(const std::string& name, std::string_view text) {
  quiet();
  const Handle space(ARCUS_H5(code_, H5Screate(H5S_SCALAR), "{}", name));
  const Handle type(ARCUS_H5(code_, H5Tcopy(H5T_C_S1), "{}", name));
  ARCUS_H5(code_, H5Tset_size(type.id(), H5T_VARIABLE), "{}", name);
  ARCUS_H5(code_, H5Tset_cset(type.id(), H5T_CSET_UTF8), "{}", name);
  const Handle attribute(ARCUS_H5(
      code_,
      H5Acreate2(handle_.id(), name.c_str(), type.id(), space.id(), H5P_DEFAULT, H5P_DEFAULT),
      "attribute {}", name));
  const std::string copy(text);
  const char* pointer = copy.c_str();
  ARCUS_H5(code_, H5Awrite(attribute.id(), type.id(), static_cast<const void*>(&pointer)),
           "attribute {}", name);
}

void File::write_attribute(const std::string& name, std::int64_t value) {
  quiet();
  const Handle space(ARCUS_H5(code_, H5Screate(H5S_SCALAR), "{}", name));
  const Handle attribute(ARCUS_H5(
      code_,
      H5Acreate2(handle_.id(), name.c_str(), H5T_STD_I64LE, space.id(), H5P_DEFAULT, H5P_DEFAULT),
      "attribute {}", name));
  ARCUS_H5(code_, H5Awrite(attribute.id(), H5T_STD_I64LE, &value), "attribute {}", name);
}

std::string File::text_attribute(const std::string& name) const {
  quiet();
  ARCUS_REQUIRE(has_attribute(name), code_, "{} has no attribute {}", path_.string(), name);
  const Handle attribute(
      ARCUS_H5(code_, H5Aopen(handle_.id(), name.c_str(), H5P_DEFAULT), "attribute {}", name));
  const Handle type(ARCUS_H5(code_, H5Aget_type(attribute.id()), "attribute {}", name));
  ARCUS_REQUIRE(H5Tis_variable_str(type.id()) > 0, code_, "{}: attribute {} is no text",
                path_.string(), name);
  char* pointer = nullptr;
  ARCUS_H5(code_, H5Aread(attribute.id(), type.id(), static_cast<void*>(&pointer)), "attribute {}",
           name);
  std::string result(pointer != nullptr ? pointer : "");
  H5free_memory(pointer);
  return result;
}

std::int64_t File::int_attribute(const std::string& name) const {
  quiet();
  ARCUS_REQUIRE(has_attribute(name), code_, "{} has no attribute {}", path_.string(), name);
  const Handle attribute(
      ARCUS_H5(code_, H5Aopen(handle_.id(), name.c_str(), H5P_DEFAULT), "attribute {}", name));
  std::int64_t value = 0;
  ARCUS_H5(code_, H5Aread(attribute.id(), H5T_STD_I64LE, &value), "attribute {}", name);
  return value;
}

bool File::has_attribute(const std::string& name) const {
  quiet();
  return H5Aexists(handle_.id(), name.c_str()) > 0;
}

void File::flush() {
  ARCUS_H5(code_, H5Fflush(handle_.id(), H5F_SCOPE_GLOBAL), "writing {} (is the disk full?)",
           path_.string());
  require_written();
}

void File::close() {
  quiet();
  flush();
  handle_ = Handle();
  require_written();  // closing cuts the file to its length
}

}  // namespace arcus::h5
