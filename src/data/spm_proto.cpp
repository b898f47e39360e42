#include "src/data/spm_proto.hpp"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <functional>

#include "src/base/error.hpp"
#include "src/data/utf8.hpp"

namespace arcus {
namespace {

/// The wire format of protocol buffers: fields of (number, type), little-endian.
struct Field {
  std::uint64_t number = 0;
  std::uint64_t value = 0;  ///< of a varint or the bits of a fixed one
  std::string_view bytes;   ///< of a length-delimited one
};

class Wire {
 public:
  explicit Wire(std::string_view bytes) : rest_(bytes) {}
  bool done() const { return rest_.empty(); }

  Field next() {
    const std::uint64_t tag = varint();
    Field field{.number = tag >> 3};
    switch (tag & 7) {
      case 0:
        field.value = varint();
        break;
      case 1:
        field.value = fixed(8);
        break;
      case 2:
        field.bytes = take(varint());
        break;
      case 5:
        field.value = fixed(4);
        break;
      default:
        fail();
    }
    return field;
  }

 private:
  [[noreturn]] static void fail() {
    ARCUS_FAIL(ExitCode::data, "the tokenizer.model is no SentencePiece model or is damaged");
  }
  std::string_view take(std::uint64_t bytes) {
    if (bytes > rest_.size()) fail();
    const std::string_view taken = rest_.substr(0, bytes);
    rest_.remove_prefix(bytes);
    return taken;
  }
  std::uint64_t varint() {
    std::uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>(take(1)[0]);
      value |= std::uint64_t{byte & 0x7FU} << shift;
      if (byte < 0x80) return value;
    }
    fail();
  }
  std::uint64_t fixed(std::size_t bytes) {
    const std::string_view taken = take(bytes);
    std::uint64_t value = 0;
    std::memcpy(&value, taken.data(), bytes);
    return value;
  }

  std::string_view rest_;
};

void for_each_field(std::string_view message, const std::function<void(const Field&)>& visit) {
  for (Wire wire(message); !wire.done();) visit(wire.next());
}

float float_of(std::uint64_t bits) {
  const auto low = static_cast<std::uint32_t>(bits);
  float value = 0;
  std::memcpy(&value, &low, sizeof value);
  return value;
}

SpmProto::Piece read_piece(std::string_view message) {
  SpmProto::Piece piece;
  for_each_field(message, [&](const Field& field) {
    if (field.number == 1) piece.text = field.bytes;
    if (field.number == 2) piece.score = float_of(field.value);
    if (field.number == 3) piece.type = static_cast<std::int32_t>(field.value);
  });
  return piece;
}

void read_trainer_spec(std::string_view message, SpmProto& proto) {
  for_each_field(message, [&](const Field& field) {
    if (field.number == 3) proto.model = static_cast<std::int32_t>(field.value);
    if (field.number == 24) proto.blank_is_suffix = field.value != 0;
    if (field.number == 35) proto.byte_fallback = field.value != 0;
    if (field.number == 45) proto.unk_piece = field.bytes;
    if (field.number == 46) proto.bos_piece = field.bytes;
    if (field.number == 47) proto.eos_piece = field.bytes;
    if (field.number == 48) proto.pad_piece = field.bytes;
  });
}

/// The rules for characters: u32 bytes of a trie, the trie (a double array of u32 units, in the
/// layout of darts-clone), texts that each end with NUL. The library follows it without looking
/// where it leads, so every place that a text can lead it to is looked at here.
class Rules {
 public:
  explicit Rules(std::string_view bytes) {
    const std::uint32_t trie_bytes = bytes.size() < 4 ? ~0U : word(bytes, 0);
    require(trie_bytes % 4 == 0 &&
            trie_bytes <= bytes.size() - std::min<std::size_t>(4, bytes.size()));
    units_.resize(trie_bytes / 4);
    for (std::size_t i = 0; i < units_.size(); ++i) units_[i] = word(bytes, 4 + 4 * i);
    texts_ = bytes.size() - 4 - trie_bytes;
    require(!units_.empty() && texts_ > 0 && bytes.back() == '\0');
  }

  void check() const {
    std::vector<bool> seen(units_.size());
    std::vector<std::size_t> waiting{0};
    while (!waiting.empty()) {
      const std::size_t node = waiting.back();
      waiting.pop_back();
      const std::size_t children = node ^ offset(units_[node]);
      require((children | 0xFF) < units_.size());
      if ((units_[node] >> 8 & 1) != 0) require((units_[children] & 0x7FFFFFFF) < texts_);
      for (std::uint32_t byte = 0; byte < 256; ++byte) {
        const std::size_t child = children ^ byte;
        if ((units_[child] & 0x800000FF) != byte || seen[child]) continue;
        seen[child] = true;
        waiting.push_back(child);
      }
    }
  }

 private:
  static void require(bool condition) {
    ARCUS_REQUIRE(condition, ExitCode::data,
                  "the rules for characters of the SentencePiece model are damaged");
  }
  static std::uint32_t word(std::string_view bytes, std::size_t at) {
    std::uint32_t value = 0;
    std::memcpy(&value, bytes.data() + at, sizeof value);
    return value;
  }
  static std::size_t offset(std::uint32_t unit) {
    return std::size_t{unit >> 10} << ((unit & (1U << 9)) >> 6);
  }

  std::vector<std::uint32_t> units_;
  std::size_t texts_ = 0;
};

void read_normalizer_spec(std::string_view message, SpmProto& proto) {
  for_each_field(message, [&](const Field& field) {
    if (field.number == 2) proto.has_rules = !field.bytes.empty();
    if (field.number == 2 && proto.has_rules) Rules(field.bytes).check();
    if (field.number == 3) proto.add_dummy_prefix = field.value != 0;
    if (field.number == 4) proto.remove_extra_whitespaces = field.value != 0;
    if (field.number == 5) proto.escape_whitespaces = field.value != 0;
  });
}

void put_varint(std::uint64_t value, std::string& out) {
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(0x80 | (value & 0x7F));
  out += static_cast<char>(value);
}

void put_number(std::uint64_t field, std::uint64_t value, std::string& out) {
  put_varint(field << 3, out);
  put_varint(value, out);
}

void put_bytes(std::uint64_t field, std::string_view bytes, std::string& out) {
  put_varint(field << 3 | 2, out);
  put_varint(bytes.size(), out);
  out += bytes;
}

void put_float(std::uint64_t field, float value, std::string& out) {
  put_varint(field << 3 | 5, out);
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

}  // namespace

SpmProto read_spm_proto(std::string_view model) {
  SpmProto proto;
  for_each_field(model, [&](const Field& field) {
    if (field.number == 1) proto.pieces.push_back(read_piece(field.bytes));
    if (field.number == 2) read_trainer_spec(field.bytes, proto);
    if (field.number == 3) read_normalizer_spec(field.bytes, proto);
    if (field.number == 5) {  // for decoding, which Arcus does itself
      SpmProto unused;
      read_normalizer_spec(field.bytes, unused);
    }
  });
  return proto;
}

std::string write_spm_proto(const SpmProto& proto) {
  std::string out;
  for (const SpmProto::Piece& piece : proto.pieces) {
    std::string message;
    put_bytes(1, piece.text, message);
    put_float(2, piece.score, message);
    put_number(3, static_cast<std::uint64_t>(piece.type), message);
    put_bytes(1, message, out);
  }
  std::string trainer;
  put_number(3, static_cast<std::uint64_t>(proto.model), trainer);
  put_number(4, proto.pieces.size(), trainer);  // vocab_size
  put_number(35, proto.byte_fallback ? 1 : 0, trainer);
  put_bytes(45, proto.unk_piece, trainer);
  put_bytes(46, proto.bos_piece, trainer);
  put_bytes(47, proto.eos_piece, trainer);
  put_bytes(48, proto.pad_piece, trainer);
  put_bytes(2, trainer, out);
  std::string normalizer;
  put_bytes(1, "identity", normalizer);
  put_number(3, proto.add_dummy_prefix ? 1 : 0, normalizer);
  put_number(4, proto.remove_extra_whitespaces ? 1 : 0, normalizer);
  put_number(5, proto.escape_whitespaces ? 1 : 0, normalizer);
  put_bytes(3, normalizer, out);
  return out;
}

/// Messages that follow one another are one message, and of equal fields the last one counts.
std::string without_dummy_prefix(std::string model) {
  std::string normalizer;
  put_number(3, 0, normalizer);
  put_bytes(3, normalizer, model);
  return model;
}

int byte_of_piece(std::string_view piece) {
  if (piece.size() != 6 || !piece.starts_with("<0x") || piece.back() != '>') return -1;
  int value = -1;
  const auto parsed = std::from_chars(piece.data() + 3, piece.data() + 5, value, 16);
  return parsed.ptr == piece.data() + 5 ? value : -1;
}

std::string with_blanks(std::string_view piece) {
  std::string text;
  for (std::size_t at = 0; at < piece.size();) {
    const bool blank = piece.substr(at).starts_with(kSpmBlank);
    text.push_back(blank ? ' ' : piece[at]);
    at += blank ? kSpmBlank.size() : 1;
  }
  return text;
}

}  // namespace arcus
