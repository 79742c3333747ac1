#include "src/runtime/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace fq::runtime {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

// What may follow the first byte of a character (Unicode 15, table 3-7).
struct Lead {
  int missing = -1;                 // continuation bytes; -1: no character starts like this
  uint8_t low = 0x80, high = 0xBF;  // of the first of them
};

Lead lead_of(uint8_t byte) {
  if (byte < 0x80) return {0};
  if (byte < 0xC2) return {-1};
  if (byte < 0xE0) return {1};
  if (byte == 0xE0) return {2, 0xA0, 0xBF};  // no overlong forms
  if (byte == 0xED) return {2, 0x80, 0x9F};  // no surrogates
  if (byte < 0xF0) return {2};
  if (byte == 0xF0) return {3, 0x90, 0xBF};
  if (byte < 0xF4) return {3};
  if (byte == 0xF4) return {3, 0x80, 0x8F};  // up to U+10FFFF
  return {-1};
}

}  // namespace

bool is_valid_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const Lead lead = lead_of(static_cast<uint8_t>(text[i++]));
    if (lead.missing < 0) return false;
    uint8_t low = lead.low, high = lead.high;
    for (int m = lead.missing; m > 0; --m, ++i) {
      if (i >= text.size()) return false;
      const auto byte = static_cast<uint8_t>(text[i]);
      if (byte < low || byte > high) return false;
      low = 0x80;
      high = 0xBF;
    }
  }
  return true;
}

StopMatcher::StopMatcher(std::vector<std::string> stop_strings) {
  size_t longest = 0;
  for (std::string& text : stop_strings) {
    if (text.empty()) continue;
    Pattern pattern{std::move(text), {}, 0};
    longest = std::max(longest, pattern.text.size());
    pattern.border.assign(pattern.text.size(), 0);
    for (size_t i = 1; i < pattern.text.size(); ++i) {
      uint32_t n = pattern.border[i - 1];
      while (n > 0 && pattern.text[n] != pattern.text[i]) n = pattern.border[n - 1];
      pattern.border[i] = n + (pattern.text[n] == pattern.text[i] ? 1 : 0);
    }
    patterns_.push_back(std::move(pattern));
  }
  pending_.reserve(longest + 64);
}

bool StopMatcher::push(std::string_view bytes, std::string* text) {
  for (char byte : bytes) {
    if (stopped_) break;
    decode(static_cast<uint8_t>(byte));
  }
  release(text);
  return stopped_;
}

bool StopMatcher::flush(std::string* text) {
  if (!stopped_ && missing_ > 0) {
    missing_ = 0;
    accept_replacement();
  }
  if (!stopped_) {
    for (Pattern& pattern : patterns_) pattern.matched = 0;
  }
  release(text);
  return stopped_;
}

void StopMatcher::decode(uint8_t byte) {
  if (missing_ > 0) {
    if (byte >= low_ && byte <= high_) {
      partial_[partial_size_++] = byte;
      low_ = 0x80;
      high_ = 0xBF;
      if (--missing_ > 0) return;
      for (int i = 0; i < partial_size_ && !stopped_; ++i) accept(partial_[i]);
      return;
    }
    // The character broke off; `byte` may begin the next one.
    missing_ = 0;
    accept_replacement();
    if (stopped_) return;
  }
  const Lead lead = lead_of(byte);
  if (lead.missing < 0) {
    accept_replacement();
  } else if (lead.missing == 0) {
    accept(byte);
  } else {
    partial_[0] = byte;
    partial_size_ = 1;
    missing_ = lead.missing;
    low_ = lead.low;
    high_ = lead.high;
  }
}

void StopMatcher::accept_replacement() {
  for (char byte : kReplacement) {
    if (!stopped_) accept(static_cast<uint8_t>(byte));
  }
}

void StopMatcher::accept(uint8_t byte) {
  const char c = static_cast<char>(byte);
  pending_.push_back(c);
  for (Pattern& pattern : patterns_) {
    uint32_t n = pattern.matched;
    while (n > 0 && pattern.text[n] != c) n = pattern.border[n - 1];
    if (pattern.text[n] == c) ++n;
    pattern.matched = n;
    if (n < pattern.text.size()) continue;
    stopped_ = true;
    if (pattern.text.size() > matched_.size()) matched_ = pattern.text;
  }
  if (stopped_) pending_.resize(pending_.size() - matched_.size());
}

void StopMatcher::release(std::string* text) {
  size_t held = 0;
  if (!stopped_) {
    // A suffix that begins a stop string; all of it is pending, for it was held since it began.
    for (const Pattern& pattern : patterns_) held = std::max<size_t>(held, pattern.matched);
  }
  const size_t ready = pending_.size() - held;
  text->append(pending_, 0, ready);
  pending_.erase(0, ready);
}

}  // namespace fq::runtime
