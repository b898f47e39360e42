#include "checkpoints/interop/gguf.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "checkpoints/interop/file_checks.hpp"
#include "checkpoints/interop/gguf_types.hpp"
#include "src/base/error.hpp"
#include "src/data/utf8.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;
using file_checks::shown;

/// Goes through a file's description; every step is checked against what is left of the file.
class Cursor {
 public:
  Cursor(const fs::path& path, std::string_view contents) : path_(path), contents_(contents) {}

  const fs::path& path() const { return path_; }
  std::size_t at() const { return at_; }
  std::size_t left() const { return contents_.size() - at_; }
  /// For messages: what is being read, "key 3 of 20" or "tensor 7 of 9" (from 1) and its name.
  void enter(const char* kind, std::uint64_t idx, std::uint64_t count) {
    kind_ = kind;
    idx_ = idx;
    count_ = count;
    name_ = {};
  }
  void set_name(std::string_view name) { name_ = name; }
  std::string where() const {
    if (count_ == 0) return "the header";
    const std::string number = fmt::format("{} {} of {}", kind_, idx_ + 1, count_);
    return name_.empty() ? number : fmt::format("{} ({})", number, shown(name_));
  }

  template <class T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
    return value;
  }
  std::string_view text() { return take(number<std::uint64_t>()); }
  /// How many items of at least `bytes` bytes each follow; more than the file can hold is refused
  /// here, before memory is asked for.
  std::uint64_t count(std::size_t bytes) {
    const auto items = number<std::uint64_t>();
    if (items > left() / bytes) {
      fail_short(fmt::format("{} items of {} or more bytes", items, bytes));
    }
    return items;
  }
  template <class... Args>
  [[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) const {
    ARCUS_FAIL(ExitCode::data, "{}: {} {}", path_.string(), where(),
               fmt::format(format, std::forward<Args>(args)...));
  }

 private:
  std::string_view take(std::uint64_t bytes) {
    if (bytes > left()) fail_short(fmt::format("{} bytes", bytes));
    const std::string_view taken = contents_.substr(at_, bytes);
    at_ += bytes;
    return taken;
  }
  [[noreturn]] void fail_short(const std::string& what) const {
    file_checks::fail_short(path_, fmt::format("in {}, {} are to follow byte {}, there are {}",
                                               where(), what, at_, left()));
  }

  const fs::path& path_;
  std::string_view contents_;
  std::size_t at_ = 0;
  const char* kind_ = "";
  std::uint64_t idx_ = 0;
  std::uint64_t count_ = 0;
  std::string_view name_;
};

bool read_bool(Cursor& cursor) {
  const auto byte = cursor.number<std::uint8_t>();
  if (byte > 1) cursor.fail("has a truth value {}; 0 and 1 are known", byte);
  return byte == 1;
}

/// A u64 beyond i64 stands for nothing that a model's description counts.
std::int64_t read_wide(Cursor& cursor, bool is_signed) {
  if (is_signed) return cursor.number<std::int64_t>();
  const auto value = cursor.number<std::uint64_t>();
  if (!std::in_range<std::int64_t>(value)) cursor.fail("has the number {}, beyond 2^63", value);
  return static_cast<std::int64_t>(value);
}

template <class Stored, class Read>
std::vector<Stored> read_items(Cursor& cursor, std::size_t bytes, Read read) {
  std::vector<Stored> items;
  const std::uint64_t count = cursor.count(bytes);
  items.reserve(count);
  for (std::uint64_t i = 0; i < count; ++i) items.push_back(read());
  return items;
}

template <class T, class Stored>
std::vector<Stored> read_numbers(Cursor& cursor) {
  return read_items<Stored>(cursor, sizeof(T), [&] { return Stored{cursor.number<T>()}; });
}

GgufValue read_array(Cursor& cursor) {
  const auto type = cursor.number<std::uint32_t>();
  switch (static_cast<GgufType>(type)) {
    case GgufType::u8:
      return read_numbers<std::uint8_t, std::uint32_t>(cursor);
    case GgufType::u16:
      return read_numbers<std::uint16_t, std::uint32_t>(cursor);
    case GgufType::u32:
      return read_numbers<std::uint32_t, std::uint32_t>(cursor);
    case GgufType::i8:
      return read_numbers<std::int8_t, std::int32_t>(cursor);
    case GgufType::i16:
      return read_numbers<std::int16_t, std::int32_t>(cursor);
    case GgufType::i32:
      return read_numbers<std::int32_t, std::int32_t>(cursor);
    case GgufType::u64:
      return read_items<std::int64_t>(cursor, 8, [&] { return read_wide(cursor, false); });
    case GgufType::i64:
      return read_items<std::int64_t>(cursor, 8, [&] { return read_wide(cursor, true); });
    case GgufType::f32:
      return read_numbers<float, float>(cursor);
    case GgufType::f64:
      return read_numbers<double, double>(cursor);
    case GgufType::boolean:
      return read_items<bool>(cursor, 1, [&] { return read_bool(cursor); });
    case GgufType::text:
      return read_items<std::string>(cursor, 8, [&] { return std::string(cursor.text()); });
    case GgufType::array:
      cursor.fail("is an array of arrays, which Arcus does not read");
  }
  cursor.fail("is an array of an unknown type {}; types 0 to 12 are known", type);
}

GgufValue read_value(Cursor& cursor) {
  const auto type = cursor.number<std::uint32_t>();
  switch (static_cast<GgufType>(type)) {
    case GgufType::u8:
      return cursor.number<std::uint8_t>();
    case GgufType::i8:
      return cursor.number<std::int8_t>();
    case GgufType::u16:
      return cursor.number<std::uint16_t>();
    case GgufType::i16:
      return cursor.number<std::int16_t>();
    case GgufType::u32:
      return cursor.number<std::uint32_t>();
    case GgufType::i32:
      return cursor.number<std::int32_t>();
    case GgufType::u64:
      return cursor.number<std::uint64_t>();
    case GgufType::i64:
      return cursor.number<std::int64_t>();
    case GgufType::f32:
      return cursor.number<float>();
    case GgufType::f64:
      return cursor.number<double>();
    case GgufType::boolean:
      return read_bool(cursor);
    case GgufType::text:
      return std::string(cursor.text());
    case GgufType::array:
      return read_array(cursor);
  }
  cursor.fail("has an unknown type {}; types 0 to 12 are known", type);
}

void read_key(Cursor& cursor, std::map<std::string, GgufValue>& keys) {
  std::string name(cursor.text());
  cursor.set_name(name);
  if (name.empty()) cursor.fail("has no name");
  if (find_invalid_utf8(name) != std::string_view::npos) cursor.fail("has a name that is no UTF-8");
  if (keys.contains(name)) cursor.fail("is there twice");
  GgufValue value = read_value(cursor);
  keys.emplace(std::move(name), std::move(value));
}

/// Dimensions of the file, fastest first, as a shape.
std::vector<std::int64_t> read_shape(Cursor& cursor) {
  constexpr std::uint32_t kMostDims = 4;  // GGML's limit
  const auto dims = cursor.number<std::uint32_t>();
  if (dims > kMostDims) cursor.fail("has {} dimensions; GGUF knows up to {}", dims, kMostDims);
  std::vector<std::int64_t> shape(dims);
  for (auto dim = shape.rbegin(); dim != shape.rend(); ++dim) {
    const auto size = cursor.number<std::uint64_t>();
    if (size > std::uint64_t{1} << 62) cursor.fail("has a dimension of {}, beyond 2^62", size);
    *dim = static_cast<std::int64_t>(size);
  }
  return shape;
}

FileType read_type(Cursor& cursor) {
  const auto number = cursor.number<std::uint32_t>();
  const auto type = file_type_of_ggml(number);
  if (!type) {
    cursor.fail(
        "has the type {}, which Arcus does not read; convert the model to F32, F16, BF16, Q8_0, "
        "Q4_0 or Q4_1 first",
        ggml_type_name(number));
  }
  return *type;
}

/// The offset is from the beginning of the data yet.
FileTensor read_tensor(Cursor& cursor, std::uint32_t alignment, const std::string& name) {
  FileTensor tensor{.name = name, .shape = read_shape(cursor)};
  tensor.type = read_type(cursor);
  const auto elements = file_checks::num_elements(tensor.shape);
  const auto row = tensor.shape.empty() ? 1 : tensor.shape.back();
  if (!file_checks::num_bytes(tensor.type, row)) {
    cursor.fail("has rows of {} numbers, {} goes in blocks of 32", row, name_of(tensor.type));
  }
  const auto bytes = elements ? file_checks::num_bytes(tensor.type, *elements) : std::nullopt;
  if (!bytes) cursor.fail("has the shape {}, beyond 2^62 bytes", shown(tensor.shape));
  tensor.bytes = *bytes;
  const auto offset = cursor.number<std::uint64_t>();
  if (offset % alignment != 0) {
    cursor.fail("begins at byte {} of the data, no multiple of the alignment {}", offset,
                alignment);
  }
  if (offset > std::uint64_t{1} << 62) {
    cursor.fail("begins at byte {} of the data, beyond 2^62", offset);
  }
  tensor.offset = static_cast<std::int64_t>(offset);
  return tensor;
}

/// With offsets from the beginning of the file.
std::vector<FileTensor> read_tensors(Cursor& cursor, std::uint64_t count, std::uint32_t alignment) {
  std::vector<FileTensor> tensors;
  for (std::uint64_t i = 0; i < count; ++i) {
    cursor.enter("tensor", i, count);
    const std::string name(cursor.text());
    cursor.set_name(name);
    tensors.push_back(read_tensor(cursor, alignment, name));
  }
  const auto data_begin =
      static_cast<std::int64_t>((cursor.at() + alignment - 1) / alignment * alignment);
  for (FileTensor& tensor : tensors) tensor.offset += data_begin;
  return tensors;
}

/// Magic and version.
void check_kind(Cursor& cursor, std::string_view contents) {
  file_checks::require_fetched(cursor.path(), contents);
  const std::string path = cursor.path().string();
  const std::string_view magic = contents.substr(0, kGgufMagic.size());
  ARCUS_REQUIRE(kGgufMagic.starts_with(magic), ExitCode::data,
                "{} is no GGUF file: it begins with {}, not with {}", path, shown(magic),
                kGgufMagic);
  cursor.number<std::uint32_t>();
  const auto version = cursor.number<std::uint32_t>();
  ARCUS_REQUIRE(version == 0 || version % (1U << 16) != 0, ExitCode::data,
                "{} is big-endian, which Arcus does not read; convert it to little-endian", path);
  ARCUS_REQUIRE(version == 2 || version == 3, ExitCode::data,
                "{} has version {} of the GGUF format; Arcus reads 2 and 3: convert it{}", path,
                version, version == 1 ? " anew, 1 is obsolete" : "");
}

std::uint32_t alignment_of(const fs::path& path, const std::map<std::string, GgufValue>& keys) {
  constexpr std::uint32_t kMost = 1U << 20;
  const auto found = keys.find("general.alignment");
  if (found == keys.end()) return kGgufAlignment;
  const auto* alignment = std::get_if<std::uint32_t>(&found->second);
  ARCUS_REQUIRE(alignment != nullptr, ExitCode::data, "{}: general.alignment is {}, not u32",
                path.string(), kind_of(found->second));
  ARCUS_REQUIRE(std::has_single_bit(*alignment) && *alignment <= kMost, ExitCode::data,
                "{}: general.alignment is {}; a power of two up to {} belongs there", path.string(),
                *alignment, kMost);
  return *alignment;
}

/// `wanted`: what the caller takes the key for.
[[noreturn]] void fail_kind(const fs::path& path, const std::string& key, const GgufValue& value,
                            const char* wanted) {
  ARCUS_FAIL(ExitCode::data, "{}: the key {} is {}, not {}", path.string(), shown(key),
             kind_of(value), wanted);
}

/// fn(integer) for an integer of any width; false for other values.
template <class Fn>
bool with_integer(const GgufValue& value, Fn fn) {
  return std::visit(
      [&]<class T>(const T& held) {
        constexpr bool fits = std::is_integral_v<T> && !std::is_same_v<T, bool>;
        if constexpr (fits) fn(held);
        return fits;
      },
      value);
}

}  // namespace

GgufFile::GgufFile(const fs::path& path) : TensorFile(path) {
  Cursor cursor(path, contents());
  check_kind(cursor, contents());
  // The least that a tensor and a key take, with names of one byte.
  const std::uint64_t num_tensors = cursor.count(8 + 1 + 4 + 4 + 8);
  const std::uint64_t num_keys = cursor.count(8 + 1 + 4 + 1);
  for (std::uint64_t i = 0; i < num_keys; ++i) {
    cursor.enter("key", i, num_keys);
    read_key(cursor, keys_);
  }
  const std::int64_t num_files = integer("split.count", 1);
  ARCUS_REQUIRE(num_files <= 1, ExitCode::data,
                "{} is one of {} files of a model; join them with llama-gguf-split --merge first",
                path.string(), num_files);
  set_tensors(read_tensors(cursor, num_tensors, alignment_of(path, keys_)));
}

std::string GgufFile::text(const std::string& key, std::optional<std::string> otherwise) const {
  const GgufValue* value = find_key(key, otherwise.has_value());
  if (value == nullptr) return *otherwise;
  const auto* text = std::get_if<std::string>(value);
  if (text == nullptr) fail_kind(path(), key, *value, "a text");
  return *text;
}

std::int64_t GgufFile::integer(const std::string& key,
                               std::optional<std::int64_t> otherwise) const {
  const GgufValue* value = find_key(key, otherwise.has_value());
  if (value == nullptr) return *otherwise;
  std::int64_t integer = 0;
  const bool found = with_integer(*value, [&](auto held) {
    ARCUS_REQUIRE(std::in_range<std::int64_t>(held), ExitCode::data,
                  "{}: the key {} is {}, beyond 2^63", path().string(), shown(key), held);
    integer = static_cast<std::int64_t>(+held);
  });
  if (!found) fail_kind(path(), key, *value, "an integer");
  return integer;
}

double GgufFile::number(const std::string& key, std::optional<double> otherwise) const {
  const GgufValue* value = find_key(key, otherwise.has_value());
  if (value == nullptr) return *otherwise;
  if (const auto* number = std::get_if<float>(value)) return *number;
  if (const auto* number = std::get_if<double>(value)) return *number;
  double number = 0;
  const bool found = with_integer(*value, [&](auto held) { number = static_cast<double>(held); });
  if (!found) fail_kind(path(), key, *value, "a number");
  return number;
}

bool GgufFile::flag(const std::string& key, std::optional<bool> otherwise) const {
  const GgufValue* value = find_key(key, otherwise.has_value());
  if (value == nullptr) return *otherwise;
  const auto* flag = std::get_if<bool>(value);
  if (flag == nullptr) fail_kind(path(), key, *value, "true or false");
  return *flag;
}

std::vector<std::int64_t> GgufFile::integers(const std::string& key) const {
  const GgufValue& value = *find_key(key, false);
  const auto widened = [](const auto& held) {
    return std::vector<std::int64_t>(held.begin(), held.end());
  };
  if (const auto* held = std::get_if<std::vector<std::uint32_t>>(&value)) return widened(*held);
  if (const auto* held = std::get_if<std::vector<std::int32_t>>(&value)) return widened(*held);
  if (const auto* held = std::get_if<std::vector<std::int64_t>>(&value)) return *held;
  if (!with_integer(value, [](auto) {})) fail_kind(path(), key, value, "an array of integers");
  return {integer(key)};
}

std::vector<float> GgufFile::numbers(const std::string& key) const {
  const GgufValue& value = *find_key(key, false);
  std::vector<double> wide;
  if (const auto* held = std::get_if<std::vector<float>>(&value)) return *held;
  if (const auto* held = std::get_if<float>(&value)) return {*held};
  if (const auto* held = std::get_if<std::vector<double>>(&value)) {
    wide = *held;
  } else if (const auto* single = std::get_if<double>(&value)) {
    wide = {*single};
  } else {
    fail_kind(path(), key, value, "an array of floats");
  }
  std::vector<float> numbers;
  for (const double number : wide) {
    const bool fits =
        !std::isfinite(number) || std::abs(number) <= double{std::numeric_limits<float>::max()};
    ARCUS_REQUIRE(fits, ExitCode::data, "{}: the key {} holds {}, too large for a float",
                  path().string(), shown(key), number);
    numbers.push_back(static_cast<float>(number));
  }
  return numbers;
}

std::vector<std::string> GgufFile::texts(const std::string& key) const {
  const GgufValue& value = *find_key(key, false);
  const auto* texts = std::get_if<std::vector<std::string>>(&value);
  if (texts == nullptr) fail_kind(path(), key, value, "an array of texts");
  return *texts;
}

const GgufValue* GgufFile::find_key(const std::string& key, bool may_be_absent) const {
  const auto found = keys_.find(key);
  if (found != keys_.end()) return &found->second;
  ARCUS_REQUIRE(may_be_absent, ExitCode::data, "{} lacks the key {}", path().string(), shown(key));
  return nullptr;
}

}  // namespace arcus
