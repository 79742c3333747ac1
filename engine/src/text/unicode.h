// UTF-8 and the Unicode normal forms, as the tokenizers need them.
// Free functions: no state, results own their memory. Any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "framequilt/status.h"

namespace fq::text {

// What starts at one place of a byte string: a character, or a broken sequence (its maximal
// subpart, as Unicode 3.9 recommends to replace it).
struct Utf8Unit {
  size_t bytes = 0;  // 0 only at the end of the string
  uint32_t code_point = 0;
  bool valid = false;
};
Utf8Unit utf8_unit(std::string_view bytes, size_t position);

bool is_valid_utf8(std::string_view bytes);
// The same text with each broken sequence replaced by U+FFFD.
std::string replace_broken_utf8(std::string_view bytes);
void append_utf8(uint32_t code_point, std::string& out);

// Length of the character that starts with `lead`, in text known to be valid.
constexpr size_t utf8_length(char lead) {
  const auto byte = static_cast<unsigned char>(lead);
  return byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

// The Unicode property White_Space.
bool is_white_space(uint32_t code_point);
// Bytes of white space at the start (end) of valid text.
size_t leading_white_space(std::string_view text);
size_t trailing_white_space(std::string_view text);

enum class NormalForm : uint8_t { kNfc, kNfd, kNfkc, kNfkd };
// `text` is valid UTF-8. Errors: out_of_memory, invalid_argument.
Result<std::string> normalize(std::string_view text, NormalForm form);

}  // namespace fq::text
