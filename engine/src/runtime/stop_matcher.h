// Turns the bytes of generated tokens into text that can be shown: complete, valid UTF-8 that no
// later token can turn into part of a stop string. Owned by the sequence; engine thread only.
//
// What comes out depends on the bytes alone, never on how tokens cut them. The first stop string to
// be complete ends the text (of those complete at the same byte, the longest); the match and what
// follows it are not released. Ill-formed UTF-8 becomes U+FFFD, one for each maximal part of a
// character (Unicode 15, section 3.9).
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace fq::runtime {

bool is_valid_utf8(std::string_view text);

class StopMatcher {
 public:
  // Stop strings are valid UTF-8 and not empty (validate_sampling).
  explicit StopMatcher(std::vector<std::string> stop_strings = {});
  StopMatcher(StopMatcher&&) = default;
  StopMatcher& operator=(StopMatcher&&) = default;
  // A copy's matched() would point into the original.
  StopMatcher(const StopMatcher&) = delete;
  StopMatcher& operator=(const StopMatcher&) = delete;

  // Takes the bytes of one more token and appends to `text` what can be shown now. Returns
  // stopped().
  bool push(std::string_view bytes, std::string* text);
  // The end of generation: appends what was held back. Returns stopped(): an unfinished character
  // becomes U+FFFD, which may complete a stop string.
  bool flush(std::string* text);

  bool stopped() const { return stopped_; }
  // The stop string that matched; empty before.
  std::string_view matched() const { return matched_; }

 private:
  // One stop string with its prefix function (Knuth, Morris, Pratt).
  struct Pattern {
    std::string text;
    std::vector<uint32_t>
        border;            // [i]: longest proper prefix of text[0..i] that is its suffix too
    uint32_t matched = 0;  // longest prefix of text that what was accepted so far ends with
  };

  void decode(uint8_t byte);
  void accept_replacement();
  void accept(uint8_t byte);
  void release(std::string* text);

  std::vector<Pattern> patterns_;
  std::string pending_;  // accepted, not released
  bool stopped_ = false;
  std::string_view matched_;

  // The character being put together.
  std::array<uint8_t, 4> partial_ = {};
  int partial_size_ = 0;
  int missing_ = 0;             // bytes it still needs
  uint8_t low_ = 0, high_ = 0;  // range of the next one
};

}  // namespace fq::runtime
