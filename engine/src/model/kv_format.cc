#include "src/model/kv_format.h"

#include <algorithm>
#include <array>
#include <optional>

#include "src/core/printable.h"

namespace fq::model {
namespace {

// Takes one of `values` from the front of `text`; the longest first, so that 128 is not 16's 1.
template <size_t kCount>
std::optional<int> take_number(std::string_view& text, const std::array<int, kCount>& values) {
  size_t digits = 0;
  while (digits < text.size() && text[digits] >= '0' && text[digits] <= '9') ++digits;
  for (const int value : values) {
    if (std::to_string(value) == text.substr(0, digits)) {
      text.remove_prefix(digits);
      return value;
    }
  }
  return std::nullopt;
}

bool take(std::string_view& text, std::string_view word) {
  if (!text.starts_with(word)) return false;
  text.remove_prefix(word.size());
  return true;
}

std::optional<KvFormat> parse(std::string_view text) {
  KvFormat format;
  if (take(text, "kv")) {
    const auto bits = take_number(text, kKvBits);
    if (!bits) return std::nullopt;
    format.k_bits = format.v_bits = *bits;
  } else {
    if (!take(text, "k")) return std::nullopt;
    const auto k = take_number(text, kKvBits);
    if (!k || !take(text, "v")) return std::nullopt;
    const auto v = take_number(text, kKvBits);
    if (!v) return std::nullopt;
    format.k_bits = *k;
    format.v_bits = *v;
  }
  if (take(text, "g")) {
    const auto group = take_number(text, kKvGroups);
    if (!group || !format.has_codes()) return std::nullopt;
    format.group = *group;
  }
  while (!text.empty()) {
    bool* option = nullptr;
    if (take(text, "+ends16")) option = &format.ends16;
    if (option == nullptr && take(text, "+rotate")) option = &format.rotate;
    if (option == nullptr && take(text, "+scale32")) option = &format.scale32;
    if (option == nullptr || *option) return std::nullopt;
    *option = true;
  }
  if ((format.ends16 || format.scale32) && !format.has_codes()) return std::nullopt;
  return format;
}

}  // namespace

std::string KvFormat::name() const {
  std::string text = k_bits == v_bits ? "kv" + std::to_string(k_bits)
                                      : "k" + std::to_string(k_bits) + "v" + std::to_string(v_bits);
  if (group > 0) text += "g" + std::to_string(group);
  if (ends16) text += "+ends16";
  if (rotate) text += "+rotate";
  if (scale32) text += "+scale32";
  return text;
}

KvFormat KvFormat::of_layer(int layer, int layers) const {
  KvFormat format = *this;
  format.ends16 = false;
  if (ends16 && (layer == 0 || layer == layers - 1)) {
    format.k_bits = std::max(k_bits, 16);
    format.v_bits = std::max(v_bits, 16);
    format.group = 0;
    format.scale32 = false;
  }
  return format;
}

Result<KvFormat> parse_kv_format(std::string_view text) {
  if (const auto format = parse(text)) return *format;
  return Error{Code::kInvalidArgument, "unknown KV cache format " + printable(text),
               "use kv32, kv16, kv8, kv6, kv4, kv3, kv2, or K and V apart as in k8v4; with codes "
               "a group may follow (g16, g32, g64, g128) and +ends16, +scale32; with any +rotate: "
               "kv4g32+ends16+rotate"};
}

}  // namespace fq::model
