// UTF-8 decoding, replacement of broken bytes, and normal forms (utf8proc). No state. Any thread.
#include "src/text/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace fq::text {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

}  // namespace

Utf8Unit utf8_unit(std::string_view bytes, size_t position) {
  if (position >= bytes.size()) return {};
  const auto at = [&](size_t i) { return static_cast<unsigned char>(bytes[i]); };
  const unsigned char lead = at(position);
  if (lead < 0x80) return {1, lead, true};
  // The range of the second byte excludes overlong forms, surrogates and values above U+10FFFF.
  size_t length = 0;
  unsigned char low = 0x80, high = 0xBF;
  uint32_t value = 0;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
    value = lead & 0x1F;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    value = lead & 0x0F;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    value = lead & 0x07;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return {1, 0, false};
  }
  for (size_t i = 1; i < length; ++i) {
    if (position + i >= bytes.size()) return {i, 0, false};
    const unsigned char next = at(position + i);
    if (next < low || next > high) return {i, 0, false};
    value = (value << 6) | (next & 0x3F);
    low = 0x80;
    high = 0xBF;
  }
  return {length, value, true};
}

bool is_valid_utf8(std::string_view bytes) {
  for (size_t i = 0; i < bytes.size();) {
    const Utf8Unit unit = utf8_unit(bytes, i);
    if (!unit.valid) return false;
    i += unit.bytes;
  }
  return true;
}

std::string replace_broken_utf8(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  for (size_t i = 0; i < bytes.size();) {
    const Utf8Unit unit = utf8_unit(bytes, i);
    out += unit.valid ? bytes.substr(i, unit.bytes) : kReplacement;
    i += unit.bytes;
  }
  return out;
}

void append_utf8(uint32_t code_point, std::string& out) {
  const auto tail = [&](int shift) {
    out += static_cast<char>(0x80 | ((code_point >> shift) & 0x3F));
  };
  if (code_point < 0x80) {
    out += static_cast<char>(code_point);
  } else if (code_point < 0x800) {
    out += static_cast<char>(0xC0 | (code_point >> 6));
    tail(0);
  } else if (code_point < 0x10000) {
    out += static_cast<char>(0xE0 | (code_point >> 12));
    tail(6);
    tail(0);
  } else {
    out += static_cast<char>(0xF0 | (code_point >> 18));
    tail(12);
    tail(6);
    tail(0);
  }
}

bool is_white_space(uint32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

size_t leading_white_space(std::string_view text) {
  size_t end = 0;
  while (end < text.size()) {
    const Utf8Unit unit = utf8_unit(text, end);
    if (!unit.valid || !is_white_space(unit.code_point)) break;
    end += unit.bytes;
  }
  return end;
}

size_t trailing_white_space(std::string_view text) {
  size_t begin = text.size();
  while (begin > 0) {
    size_t start = begin - 1;
    while (start > 0 && (static_cast<unsigned char>(text[start]) & 0xC0) == 0x80) --start;
    const Utf8Unit unit = utf8_unit(text, start);
    if (!unit.valid || !is_white_space(unit.code_point)) break;
    begin = start;
  }
  return text.size() - begin;
}

Result<std::string> normalize(std::string_view text, NormalForm form) {
  // ASCII is in every normal form; below U+0300 (lead byte 0xCC) everything is in NFC.
  const int untouched = form == NormalForm::kNfc ? 0xCC : 0x80;
  if (std::all_of(text.begin(), text.end(),
                  [&](char c) { return static_cast<unsigned char>(c) < untouched; })) {
    return std::string(text);
  }
  const bool compose = form == NormalForm::kNfc || form == NormalForm::kNfkc;
  const bool compatible = form == NormalForm::kNfkc || form == NormalForm::kNfkd;
  const int options = UTF8PROC_STABLE | (compose ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE) |
                      (compatible ? UTF8PROC_COMPAT : 0);
  utf8proc_uint8_t* mapped = nullptr;
  const utf8proc_ssize_t size = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                             static_cast<utf8proc_ssize_t>(text.size()), &mapped,
                                             static_cast<utf8proc_option_t>(options));
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owned(mapped, &std::free);
  if (size == UTF8PROC_ERROR_NOMEM) {
    return Error{Code::kOutOfMemory, "Unicode normalization ran out of memory", ""};
  }
  if (size < 0) {
    return Error{Code::kInvalidArgument,
                 std::string("Unicode normalization failed: ") + utf8proc_errmsg(size), ""};
  }
  return std::string(reinterpret_cast<const char*>(mapped), static_cast<size_t>(size));
}

}  // namespace fq::text
