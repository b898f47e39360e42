#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>

#include "checkpoints/interop/file_checks.hpp"
#include "checkpoints/interop/tensor_file.hpp"
#include "src/base/dtype.hpp"
#include "src/base/error.hpp"

namespace arcus {
namespace {

static_assert(std::endian::native == std::endian::little, "the files are little-endian");

struct TypeRow {
  std::string_view name;
  int elements;  ///< of a block
  int bytes;
};
/// By FileType.
constexpr std::array<TypeRow, 6> kTypes{{{"F32", 1, 4},
                                         {"F16", 1, 2},
                                         {"BF16", 1, 2},
                                         {"Q8_0", 32, 34},
                                         {"Q4_0", 32, 18},
                                         {"Q4_1", 32, 20}}};

const TypeRow& row_of(FileType type) { return kTypes.at(static_cast<std::size_t>(type)); }

template <class T>
T load(const char* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

template <class T>
void store(char* bytes, T value) {
  std::memcpy(bytes, &value, sizeof value);
}

// Both conversions choose between results instead of branching, so that loops over them become
// vector code on every processor.

inline float widened(std::uint16_t half) {
  const std::uint32_t sign = std::uint32_t{half & 0x8000U} << 16;
  const std::uint32_t rest = std::uint32_t{half & 0x7FFFU} << 13;
  const std::uint32_t normal = rest + ((127U - 15U) << 23);
  const std::uint32_t special = rest + ((255U - 31U) << 23);
  // The fraction f of a subnormal means f 2^-24; under the exponent -14 it means 2^-14 more.
  const float subnormal = std::bit_cast<float>(rest + (113U << 23)) - 0x1p-14F;
  const std::uint32_t exponent = rest & (31U << 23);
  const std::uint32_t bits = exponent == 0             ? std::bit_cast<std::uint32_t>(subnormal)
                             : exponent == (31U << 23) ? special
                                                       : normal;
  return std::bit_cast<float>(sign | bits);
}

inline std::uint16_t narrowed(float value) {
  const auto all = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (all >> 16) & 0x8000U;
  const std::uint32_t rest = all & 0x7FFFFFFFU;
  // Half of the last place, less one where the last bit is even: ties go there.
  const std::uint32_t normal = (rest - ((127U - 15U) << 23) + 0xFFFU + ((rest >> 13) & 1U)) >> 13;
  // One whose last place is 2^-24: the addition rounds.
  const float shifted = std::bit_cast<float>(rest) + 0.5F;
  const std::uint32_t subnormal =
      std::bit_cast<std::uint32_t>(shifted) - std::bit_cast<std::uint32_t>(0.5F);
  const std::uint32_t nan = 0x7E00U | ((rest >> 13) & 0x3FFU);
  const std::uint32_t infinity = 0x7C00U;
  const std::uint32_t bits = rest > 0x7F800000U    ? nan
                             : rest >= 0x47800000U ? infinity   // 2^16
                             : rest < 0x38800000U  ? subnormal  // 2^-14
                                                   : normal;
  return static_cast<std::uint16_t>(sign | bits);
}

bool is_finite(float value) {
  return (std::bit_cast<std::uint32_t>(value) & 0x7FFFFFFFU) < 0x7F800000U;
}

// Blocks as GGML lays them out: an f16 scale d (and for Q4_1 an f16 offset m), then the numbers.

void decode_q8_0(const char* block, float* out) {
  const float d = widened(load<std::uint16_t>(block));
  for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(load<std::int8_t>(block + 2 + i)) * d;
}

/// Low halves of the bytes are the first 16 numbers, high halves the other 16.
void decode_q4_0(const char* block, float* out) {
  const float d = widened(load<std::uint16_t>(block));
  for (int i = 0; i < 16; ++i) {
    const int both = load<std::uint8_t>(block + 2 + i);
    out[i] = static_cast<float>((both & 15) - 8) * d;
    out[i + 16] = static_cast<float>((both >> 4) - 8) * d;
  }
}

void decode_q4_1(const char* block, float* out) {
  const float d = widened(load<std::uint16_t>(block));
  const float m = widened(load<std::uint16_t>(block + 2));
  for (int i = 0; i < 16; ++i) {
    const int both = load<std::uint8_t>(block + 4 + i);
    out[i] = static_cast<float>(both & 15) * d + m;
    out[i + 16] = static_cast<float>(both >> 4) * d + m;
  }
}

template <class Widen>
void decode_16_bits(const char* bytes, std::span<float> out, Widen widen) {
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = widen(load<std::uint16_t>(bytes + 2 * i));
}

template <class DecodeBlock>
void decode_blocks(const char* bytes, int block_bytes, std::span<float> out,
                   DecodeBlock decode_block) {
  for (std::size_t i = 0; i < out.size(); i += 32, bytes += block_bytes) {
    decode_block(bytes, out.data() + i);
  }
}

/// Returns whether a finite value became infinite.
template <class Narrow>
bool encode_16_bits(std::span<const float> values, char* out, std::uint16_t infinity,
                    Narrow narrow) {
  std::uint32_t overflows = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::uint16_t bits = narrow(values[i]);
    overflows |= static_cast<std::uint32_t>(is_finite(values[i]) && (bits & 0x7FFFU) == infinity);
    store(out + 2 * i, bits);
  }
  return overflows != 0;
}

std::uint16_t bf16_bits(float value) { return bf16(value).bits; }

[[noreturn]] void fail_overflow(FileType type, std::span<const float> values,
                                std::string_view what) {
  const auto* largest = &values[0];
  for (const float& value : values) {
    const bool beyond = is_finite(value) && !(std::abs(value) <= std::abs(*largest));
    if (beyond || !is_finite(*largest)) largest = &value;
  }
  ARCUS_FAIL(ExitCode::data, "{}: number {} is {}, too large for {}; write {}", what,
             largest - values.data(), *largest, name_of(type),
             type == FileType::f16 ? "BF16 or F32" : "F32");
}

}  // namespace

std::string_view name_of(FileType type) { return row_of(type).name; }

std::optional<std::int64_t> file_checks::num_bytes(FileType type, std::int64_t elements) {
  const TypeRow& row = row_of(type);
  constexpr std::int64_t kMost = std::int64_t{1} << 62;
  const bool fits =
      elements >= 0 && elements % row.elements == 0 && elements / row.elements <= kMost / row.bytes;
  if (!fits) return {};
  return elements / row.elements * row.bytes;
}

std::int64_t bytes_of(FileType type, std::int64_t elements) {
  const auto bytes = file_checks::num_bytes(type, elements);
  ARCUS_REQUIRE(bytes.has_value(), ExitCode::data,
                "{} numbers cannot be written as {}: they come in blocks of {}, and a tensor has "
                "at most 2^62 bytes",
                elements, name_of(type), row_of(type).elements);
  return *bytes;
}

std::uint16_t f16_from_float(float value) { return narrowed(value); }
float float_from_f16(std::uint16_t bits) { return widened(bits); }

std::string encode(FileType type, std::span<const float> values, std::string_view what) {
  std::string bytes(static_cast<std::size_t>(bytes_of(type, std::ssize(values))), '\0');
  if (values.empty()) return bytes;
  bool overflow = false;
  switch (type) {
    case FileType::f32:
      std::memcpy(bytes.data(), values.data(), bytes.size());
      break;
    case FileType::f16:
      overflow = encode_16_bits(values, bytes.data(), 0x7C00U, narrowed);
      break;
    case FileType::bf16:
      overflow = encode_16_bits(values, bytes.data(), 0x7F80U, bf16_bits);
      break;
    default:
      ARCUS_FAIL(ExitCode::internal, "{}: Arcus reads {} and does not write it", what,
                 name_of(type));
  }
  if (overflow) fail_overflow(type, values, what);
  return bytes;
}

void decode(FileType type, std::string_view bytes, std::span<float> out) {
  ARCUS_CHECK(std::ssize(bytes) == bytes_of(type, std::ssize(out)),
              "{} bytes of {} are to become {} numbers", bytes.size(), name_of(type), out.size());
  const int block_bytes = row_of(type).bytes;
  switch (type) {
    case FileType::f32:
      if (!out.empty()) std::memcpy(out.data(), bytes.data(), bytes.size());
      return;
    case FileType::f16:
      return decode_16_bits(bytes.data(), out, widened);
    case FileType::bf16:
      return decode_16_bits(bytes.data(), out, [](std::uint16_t bits) {
        return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
      });
    case FileType::q8_0:
      return decode_blocks(bytes.data(), block_bytes, out, decode_q8_0);
    case FileType::q4_0:
      return decode_blocks(bytes.data(), block_bytes, out, decode_q4_0);
    case FileType::q4_1:
      return decode_blocks(bytes.data(), block_bytes, out, decode_q4_1);
  }
}

bool all_finite(std::span<const float> values) {
  // An exponent of all ones; branchless, so that it vectorises.
  std::uint32_t bad = 0;
  for (const float value : values) {
    bad |= (std::bit_cast<std::uint32_t>(value) & 0x7f800000U) == 0x7f800000U ? 1U : 0U;
  }
  return bad == 0;
}

}  // namespace arcus
