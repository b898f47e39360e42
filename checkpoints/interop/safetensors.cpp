#include "checkpoints/interop/safetensors.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "checkpoints/interop/file_checks.hpp"
#include "src/base/error.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;
using file_checks::shown;

/// The element types of the format; those without a FileType are known by name and width only.
struct TypeRow {
  std::string_view name;
  int bits;
  std::optional<FileType> type = {};
};
constexpr std::array<TypeRow, 20> kTypes{{{"F32", 32, FileType::f32},
                                          {"F16", 16, FileType::f16},
                                          {"BF16", 16, FileType::bf16},
                                          {"F64", 64},
                                          {"C64", 64},
                                          {"I64", 64},
                                          {"U64", 64},
                                          {"I32", 32},
                                          {"U32", 32},
                                          {"I16", 16},
                                          {"U16", 16},
                                          {"I8", 8},
                                          {"U8", 8},
                                          {"BOOL", 8},
                                          {"F8_E4M3", 8},
                                          {"F8_E5M2", 8},
                                          {"F8_E8M0", 8},
                                          {"F6_E2M3", 6},
                                          {"F6_E3M2", 6},
                                          {"F4", 4}}};

/// A tensor as the header has it.
struct Entry {
  std::string name;
  std::optional<std::string> dtype;
  std::optional<std::vector<std::int64_t>> shape;
  std::optional<std::vector<std::int64_t>> data_offsets;

  std::int64_t begin() const { return data_offsets->at(0); }
  std::int64_t end() const { return data_offsets->at(1); }
};

/// Takes the header's JSON, piece by piece and no deeper than a header goes. (A parsed tree would
/// silently keep one of two equal names.)
class HeaderParser final : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit HeaderParser(const fs::path& path) : path_(path) {}
  std::vector<Entry> entries;
  std::map<std::string, std::string> metadata;

  bool start_object(std::size_t /*size*/) override {
    if (place_ == Place::outside) return go(Place::header);
    if (place_ != Place::header) fail("an object");
    if (key_ == "__metadata__") return go(Place::metadata);
    entries.push_back({.name = key_});
    return go(Place::entry);
  }
  bool end_object() override {
    if (place_ == Place::header) return go(Place::outside);
    if (place_ == Place::entry) require_complete(entries.back());
    return go(Place::header);
  }
  bool key(std::string& name) override {
    const bool known =
        place_ != Place::entry || name == "dtype" || name == "shape" || name == "data_offsets";
    key_ = std::move(name);
    if (!known) fail("an unknown field");
    const bool fresh = place_ == Place::header     ? names_.insert(key_).second
                       : place_ == Place::metadata ? !metadata.contains(key_)
                                                   : !has_field(entries.back());
    ARCUS_REQUIRE(fresh, ExitCode::data, "{}: the header has {} twice", path_.string(), where());
    return true;
  }
  bool string(std::string& text) override {
    if (place_ == Place::metadata) {
      metadata.emplace(key_, std::move(text));
    } else if (place_ == Place::entry && key_ == "dtype") {
      entries.back().dtype = std::move(text);
    } else {
      fail("a text");
    }
    return true;
  }
  bool start_array(std::size_t /*size*/) override {
    if (place_ != Place::entry || key_ == "dtype") fail("an array");
    (key_ == "shape" ? entries.back().shape : entries.back().data_offsets).emplace();
    return go(Place::numbers);
  }
  bool end_array() override { return go(Place::entry); }
  bool number_unsigned(std::uint64_t value) override {
    if (place_ != Place::numbers) fail("a number");
    ARCUS_REQUIRE(value <= std::uint64_t{1} << 62, ExitCode::data,
                  "{}: the header has {} in {}, which is beyond 2^62", path_.string(), value,
                  where());
    numbers().push_back(static_cast<std::int64_t>(value));
    return true;
  }
  bool number_integer(std::int64_t value) override { fail(fmt::format("the number {}", value)); }
  bool number_float(double /*value*/, const std::string& text) override {
    fail(fmt::format("the number {}", shown(text)));
  }
  bool boolean(bool value) override { fail(value ? "true" : "false"); }
  bool null() override { fail("null"); }
  bool binary(nlohmann::json::binary_t& /*bytes*/) override { fail("bytes"); }
  bool parse_error(std::size_t position, const std::string& /*token*/,
                   const nlohmann::json::exception& error) override {
    ARCUS_FAIL(ExitCode::data, "{}: the header is no JSON at byte {}: {}", path_.string(),
               position + 7, reason(error.what()));
  }

 private:
  enum class Place { outside, header, metadata, entry, numbers };

  bool go(Place place) {
    place_ = place;
    return true;
  }
  bool has_field(const Entry& entry) const {
    return key_ == "dtype"   ? entry.dtype.has_value()
           : key_ == "shape" ? entry.shape.has_value()
                             : entry.data_offsets.has_value();
  }
  std::vector<std::int64_t>& numbers() {
    return key_ == "shape" ? *entries.back().shape : *entries.back().data_offsets;
  }
  std::string where() const {
    if (place_ == Place::outside) return "the header";
    if (place_ == Place::header) return shown(key_);
    const std::string owner = place_ == Place::metadata ? "__metadata__" : entries.back().name;
    return fmt::format("{} of {}", shown(key_), shown(owner));
  }
  [[noreturn]] void fail(const std::string& what) const {
    ARCUS_FAIL(ExitCode::data, "{}: the header has {} where none belongs, in {}", path_.string(),
               what, where());
  }
  /// What the parser says, without its numbering and the text that it has read so far.
  static std::string reason(std::string_view message) {
    const std::size_t begin = message.find(" - ");
    if (begin != std::string_view::npos) message.remove_prefix(begin + 3);
    return shown(message.substr(0, message.find("; last read")));
  }
  void require_complete(const Entry& entry) const {
    const char* missing = !entry.dtype ? "dtype" : !entry.shape ? "shape" : "data_offsets";
    ARCUS_REQUIRE(entry.dtype && entry.shape && entry.data_offsets, ExitCode::data,
                  "{}: tensor {} has no {}", path_.string(), shown(entry.name), missing);
    const auto& offsets = *entry.data_offsets;
    ARCUS_REQUIRE(offsets.size() == 2 && offsets[0] <= offsets[1], ExitCode::data,
                  "{}: tensor {} has the data_offsets {}; a begin and an end belong there",
                  path_.string(), shown(entry.name), shown(offsets));
  }

  const fs::path& path_;
  Place place_ = Place::outside;
  std::string key_;
  std::set<std::string> names_;
};

/// The header's text.
std::string_view find_header(const fs::path& path, std::string_view contents) {
  constexpr std::uint64_t kMostHeader = 100'000'000;  // the format's own limit
  file_checks::require_fetched(path, contents);
  if (contents.size() < 8) {
    file_checks::fail_short(path, fmt::format("it has {} bytes", contents.size()));
  }
  std::uint64_t bytes = 0;
  std::memcpy(&bytes, contents.data(), sizeof bytes);
  ARCUS_REQUIRE(bytes <= kMostHeader && bytes >= 2, ExitCode::data,
                "{} is no safetensors file: its header would have {} bytes, the format allows 2 to "
                "{}",
                path.string(), bytes, kMostHeader);
  const bool object = contents.size() == 8 || contents[8] == '{';
  ARCUS_REQUIRE(object, ExitCode::data,
                "{} is no safetensors file: its header begins with {}, not with {{", path.string(),
                shown(contents.substr(8, 1)));
  if (bytes > contents.size() - 8) {
    file_checks::fail_short(path, fmt::format("the header has {} bytes, {} of them are there",
                                              bytes, contents.size() - 8));
  }
  const std::string_view header = contents.substr(8, bytes);
  // The parser would take it for the end and not look at what follows.
  const std::size_t nul = header.find('\0');
  ARCUS_REQUIRE(nul == std::string_view::npos, ExitCode::data,
                "{}: the header is no JSON at byte {}: a zero byte", path.string(), 8 + nul);
  return header;
}

const TypeRow& type_row(const fs::path& path, const Entry& entry) {
  const auto* row = std::ranges::find(kTypes, *entry.dtype, &TypeRow::name);
  ARCUS_REQUIRE(row != kTypes.end(), ExitCode::data, "{}: tensor {} has the unknown type {}",
                path.string(), shown(entry.name), shown(*entry.dtype));
  return *row;
}

/// The byte range must be what type and shape need.
void check_range(const fs::path& path, const Entry& entry) {
  const auto elements = file_checks::num_elements(*entry.shape);
  const int bits = type_row(path, entry).bits;
  const bool fits = elements && *elements <= (std::int64_t{1} << 62) / bits &&
                    *elements * bits % 8 == 0 &&
                    *elements * bits / 8 == entry.end() - entry.begin();
  ARCUS_REQUIRE(fits, ExitCode::data,
                "{}: tensor {} of {} numbers {} does not take the {} bytes of its data_offsets {}",
                path.string(), shown(entry.name), shown(*entry.shape), *entry.dtype,
                entry.end() - entry.begin(), shown(*entry.data_offsets));
}

/// In the order of the data, without gaps, to the end of the file.
void check_contiguous(const fs::path& path, const std::vector<Entry>& entries,
                      std::int64_t data_bytes) {
  std::int64_t end = 0;
  for (const Entry& entry : entries) {
    ARCUS_REQUIRE(entry.begin() == end, ExitCode::data,
                  "{}: tensor {} begins at byte {} of the data, the one in front of it ends at {}",
                  path.string(), shown(entry.name), entry.begin(), end);
    end = entry.end();
  }
  if (end > data_bytes) {
    file_checks::fail_short(
        path, fmt::format("the tensors have {} bytes, {} of them are there", end, data_bytes));
  }
  ARCUS_REQUIRE(end == data_bytes, ExitCode::data,
                "{}: the tensors have {} bytes, but {} follow the header", path.string(), end,
                data_bytes);
}

}  // namespace

SafetensorsFile::SafetensorsFile(const fs::path& path, const Ignored& ignored) : TensorFile(path) {
  const std::string_view header = find_header(path, contents());
  HeaderParser parser(path);
  nlohmann::json::sax_parse(header.begin(), header.end(), &parser);
  metadata_ = std::move(parser.metadata);
  std::ranges::stable_sort(
      parser.entries, {}, [](const Entry& entry) { return std::pair(entry.begin(), entry.end()); });
  for (const Entry& entry : parser.entries) check_range(path, entry);
  const auto data_begin = static_cast<std::int64_t>(8 + header.size());
  check_contiguous(path, parser.entries, std::ssize(contents()) - data_begin);

  std::vector<FileTensor> tensors;
  for (Entry& entry : parser.entries) {
    if (ignored && ignored(entry.name)) continue;
    const auto type = type_row(path, entry).type;
    ARCUS_REQUIRE(type.has_value(), ExitCode::data,
                  "{}: tensor {} has the type {}; Arcus reads F32, F16 and BF16: convert it first",
                  path.string(), shown(entry.name), *entry.dtype);
    tensors.push_back({.name = std::move(entry.name),
                       .type = *type,
                       .shape = std::move(*entry.shape),
                       .offset = data_begin + entry.begin(),
                       .bytes = entry.end() - entry.begin()});
  }
  set_tensors(std::move(tensors));
}

}  // namespace arcus
