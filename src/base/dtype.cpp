#include "src/base/dtype.hpp"

#include <array>

namespace arcus {
namespace {

struct Row {
  DType dtype;
  std::size_t size;
  std::string_view name;
};
constexpr std::array<Row, 9> kRows{{{DType::f32, 4, "f32"},
                                    {DType::f64, 8, "f64"},
                                    {DType::bf16, 2, "bf16"},
                                    {DType::i32, 4, "i32"},
                                    {DType::i64, 8, "i64"},
                                    {DType::u8, 1, "u8"},
                                    {DType::u16, 2, "u16"},
                                    {DType::u32, 4, "u32"},
                                    {DType::u64, 8, "u64"}}};

}  // namespace

std::size_t size_of(DType dtype) { return kRows[static_cast<std::size_t>(dtype)].size; }
std::string_view name_of(DType dtype) { return kRows[static_cast<std::size_t>(dtype)].name; }

DType dtype_from_name(std::string_view name) {
  for (const Row& row : kRows) {
    if (row.name == name) return row.dtype;
  }
  ARCUS_FAIL(ExitCode::usage,
             "unknown element type \"{}\"; known: f32, f64, bf16, i32, i64, u8, "
             "u16, u32, u64",
             name);
}

}  // namespace arcus
