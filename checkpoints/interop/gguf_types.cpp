#include "checkpoints/interop/gguf_types.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <type_traits>

namespace arcus {
namespace {

struct GgmlType {
  std::uint32_t number;
  std::string_view name;
};
/// Types that were withdrawn are named as well: old files have them.
constexpr std::array<GgmlType, 42> kGgmlTypes{
    {{0, "F32"},     {1, "F16"},         {2, "Q4_0"},        {3, "Q4_1"},        {4, "Q4_2"},
     {5, "Q4_3"},    {6, "Q5_0"},        {7, "Q5_1"},        {8, "Q8_0"},        {9, "Q8_1"},
     {10, "Q2_K"},   {11, "Q3_K"},       {12, "Q4_K"},       {13, "Q5_K"},       {14, "Q6_K"},
     {15, "Q8_K"},   {16, "IQ2_XXS"},    {17, "IQ2_XS"},     {18, "IQ3_XXS"},    {19, "IQ1_S"},
     {20, "IQ4_NL"}, {21, "IQ3_S"},      {22, "IQ2_S"},      {23, "IQ4_XS"},     {24, "I8"},
     {25, "I16"},    {26, "I32"},        {27, "I64"},        {28, "F64"},        {29, "IQ1_M"},
     {30, "BF16"},   {31, "Q4_0_4_4"},   {32, "Q4_0_4_8"},   {33, "Q4_0_8_8"},   {34, "TQ1_0"},
     {35, "TQ2_0"},  {36, "IQ4_NL_4_4"}, {37, "IQ4_NL_4_8"}, {38, "IQ4_NL_8_8"}, {39, "MXFP4"},
     {40, "NVFP4"},  {41, "Q1_0"}}};

constexpr std::array<FileType, 6> kFileTypes{FileType::f32,  FileType::f16,  FileType::bf16,
                                             FileType::q8_0, FileType::q4_0, FileType::q4_1};

template <class T>
constexpr GgufType gguf_type() {
  if constexpr (std::is_same_v<T, std::uint8_t>) return GgufType::u8;
  if constexpr (std::is_same_v<T, std::int8_t>) return GgufType::i8;
  if constexpr (std::is_same_v<T, std::uint16_t>) return GgufType::u16;
  if constexpr (std::is_same_v<T, std::int16_t>) return GgufType::i16;
  if constexpr (std::is_same_v<T, std::uint32_t>) return GgufType::u32;
  if constexpr (std::is_same_v<T, std::int32_t>) return GgufType::i32;
  if constexpr (std::is_same_v<T, std::uint64_t>) return GgufType::u64;
  if constexpr (std::is_same_v<T, std::int64_t>) return GgufType::i64;
  if constexpr (std::is_same_v<T, float>) return GgufType::f32;
  if constexpr (std::is_same_v<T, double>) return GgufType::f64;
  if constexpr (std::is_same_v<T, bool>) return GgufType::boolean;
  return GgufType::text;
}

template <class T>
struct ItemOf {
  using type = T;
  static constexpr bool array = false;
};
template <class T>
struct ItemOf<std::vector<T>> {
  using type = T;
  static constexpr bool array = true;
};

constexpr std::array<std::string_view, 13> kTypeNames{
    "u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "text", "array", "u64", "i64", "f64"};

}  // namespace

GgufType type_of(const GgufValue& value) {
  return std::visit(
      []<class T>(const T& /*held*/) { return gguf_type<typename ItemOf<T>::type>(); }, value);
}

bool is_array(const GgufValue& value) {
  return std::visit([]<class T>(const T& /*held*/) { return ItemOf<T>::array; }, value);
}

std::string kind_of(const GgufValue& value) {
  const auto name = kTypeNames.at(static_cast<std::size_t>(type_of(value)));
  return fmt::format("{}{}", is_array(value) ? "an array of " : "", name);
}

std::string ggml_type_name(std::uint32_t number) {
  const auto* row = std::ranges::find(kGgmlTypes, number, &GgmlType::number);
  return row == kGgmlTypes.end() ? fmt::format("number {}", number) : std::string(row->name);
}

std::uint32_t ggml_type_of(FileType type) {
  return std::ranges::find(kGgmlTypes, name_of(type), &GgmlType::name)->number;
}

std::optional<FileType> file_type_of_ggml(std::uint32_t number) {
  const auto* type = std::ranges::find(kFileTypes, number, ggml_type_of);
  if (type == kFileTypes.end()) return {};
  return *type;
}

}  // namespace arcus
