// The stop matcher against a whole-text oracle: decode everything, find the first complete stop
// string, cut there.
#include "src/runtime/stop_matcher.h"

#include <gtest/gtest.h>

#include <optional>
#include <random>

namespace fq::runtime {
namespace {

struct Outcome {
  std::string text;
  bool stopped = false;
  std::string matched;
  bool operator==(const Outcome&) const = default;
};
std::ostream& operator<<(std::ostream& out, const Outcome& o) {
  return out << '"' << ::testing::PrintToString(o.text) << "\" " << o.stopped << " " << o.matched;
}

Outcome feed(const std::vector<std::string>& stops, const std::vector<std::string>& pieces) {
  StopMatcher matcher(stops);
  Outcome outcome;
  for (const std::string& piece : pieces) {
    matcher.push(piece, &outcome.text);
    EXPECT_TRUE(is_valid_utf8(outcome.text)) << "after " << ::testing::PrintToString(piece);
  }
  matcher.flush(&outcome.text);
  outcome.stopped = matcher.stopped();
  outcome.matched = matcher.matched();
  return outcome;
}

// Ill-formed bytes to U+FFFD by trying every length of a character: slow and unlike the code under
// test.
std::string sanitize(std::string_view bytes) {
  std::string text;
  for (size_t i = 0; i < bytes.size();) {
    size_t whole = 0;
    for (size_t n = 1; n <= 4 && i + n <= bytes.size() && whole == 0; ++n) {
      if (is_valid_utf8(bytes.substr(i, n))) whole = n;
    }
    if (whole > 0) {
      text += bytes.substr(i, whole);
      i += whole;
      continue;
    }
    // The longest part that some continuation makes a character.
    size_t part = 1;
    for (size_t n = 2; n <= 3 && i + n <= bytes.size(); ++n) {
      const std::string_view head = bytes.substr(i, n);
      bool can_be_finished = false;
      for (int a = 0x80; a <= 0xBF && !can_be_finished; ++a) {
        std::string longer(head);
        longer.push_back(static_cast<char>(a));
        can_be_finished = is_valid_utf8(longer);
        longer.push_back('\x80');
        can_be_finished = can_be_finished || is_valid_utf8(longer);
      }
      if (!can_be_finished) break;
      part = n;
    }
    text += "\xEF\xBF\xBD";
    i += part;
  }
  return text;
}

Outcome oracle(const std::vector<std::string>& stops, std::string_view bytes) {
  const std::string text = sanitize(bytes);
  std::optional<size_t> end;
  std::string matched;
  for (const std::string& stop : stops) {
    const size_t at = text.find(stop);
    if (at == std::string::npos) continue;
    const size_t stop_end = at + stop.size();
    if (!end || stop_end < *end || (stop_end == *end && stop.size() > matched.size())) {
      end = stop_end;
      matched = stop;
    }
  }
  if (!end) return {text, false, ""};
  return {text.substr(0, *end - matched.size()), true, matched};
}

TEST(IsValidUtf8, FollowsTheUnicodeTable) {
  for (const char* good : {"", "a", "\xC2\x80", "\xE0\xA0\x80", "\xED\x9F\xBF", "\xEE\x80\x80",
                           "\xF0\x90\x80\x80", "\xF4\x8F\xBF\xBF", "\xE2\x82\xAC uro"}) {
    EXPECT_TRUE(is_valid_utf8(good)) << ::testing::PrintToString(good);
  }
  for (const char* bad :
       {"\x80", "\xC0\x80", "\xC1\xBF", "\xE0\x9F\xBF", "\xED\xA0\x80", "\xF0\x8F\xBF\xBF",
        "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xFF", "\xC2", "\xE2\x82",
        "\xC2"
        "a"}) {
    EXPECT_FALSE(is_valid_utf8(bad)) << ::testing::PrintToString(bad);
  }
}

TEST(StopMatcher, ReleasesPlainTextAtOnce) {
  StopMatcher matcher;
  std::string text;
  EXPECT_FALSE(matcher.push("Hello", &text));
  EXPECT_EQ(text, "Hello");
  EXPECT_FALSE(matcher.push(" world", &text));
  EXPECT_EQ(text, "Hello world");
}

TEST(StopMatcher, HoldsAnUnfinishedCharacterBack) {
  StopMatcher matcher;
  std::string text;
  matcher.push("x\xE2\x82", &text);
  EXPECT_EQ(text, "x");
  matcher.push("\xAC", &text);
  EXPECT_EQ(text, "x\xE2\x82\xAC");
}

TEST(StopMatcher, HoldsExactlyWhatMayBecomeAStopString) {
  StopMatcher matcher({"###", "END"});
  std::string text;
  EXPECT_FALSE(matcher.push("a##", &text));
  EXPECT_EQ(text, "a");
  EXPECT_FALSE(matcher.push("b", &text));
  EXPECT_EQ(text, "a##b");
  EXPECT_FALSE(matcher.push("EN", &text));
  EXPECT_EQ(text, "a##b");
  EXPECT_TRUE(matcher.push("D and more", &text));
  EXPECT_EQ(text, "a##b");
  EXPECT_EQ(matcher.matched(), "END");
  EXPECT_TRUE(matcher.push("ignored", &text));
  EXPECT_TRUE(matcher.flush(&text));
  EXPECT_EQ(text, "a##b");
}

TEST(StopMatcher, FlushReleasesWhatWasHeld) {
  EXPECT_EQ(feed({"###"}, {"a##"}), (Outcome{"a##", false, ""}));
  EXPECT_EQ(feed({}, {"a\xE2\x82"}), (Outcome{"a\xEF\xBF\xBD", false, ""}));
  EXPECT_EQ(feed({"x\xEF\xBF\xBD"}, {"ax\xE2\x82"}), (Outcome{"a", true, "x\xEF\xBF\xBD"}));
}

TEST(StopMatcher, OverlappingStopStringsEndAtTheFirstComplete) {
  EXPECT_EQ(feed({"abcd", "bc"}, {"xabcd"}), (Outcome{"xa", true, "bc"}));
  EXPECT_EQ(feed({"bcd", "abcd"}, {"xabcd"}), (Outcome{"x", true, "abcd"}));
  EXPECT_EQ(feed({"aab"}, {"aaa", "ab"}), (Outcome{"aa", true, "aab"}));
  EXPECT_EQ(feed({"aab"}, {"aaab"}), (Outcome{"a", true, "aab"}));
  EXPECT_EQ(feed({"abab"}, {"abaabab!"}), (Outcome{"aba", true, "abab"}));
}

TEST(StopMatcher, IllFormedBytesBecomeOneReplacementPerMaximalPart) {
  const std::string r = "\xEF\xBF\xBD";
  EXPECT_EQ(feed({}, {"\xC0\xAF"}).text, r + r);
  EXPECT_EQ(feed({}, {"\xF0\x90\x80"
                      "a"})
                .text,
            r + "a");
  EXPECT_EQ(feed({}, {"\xE2\x82\xE2\x82\xAC"}).text, r + "\xE2\x82\xAC");
  EXPECT_EQ(feed({}, {"\xED\xA0\x80"}).text, r + r + r);  // a surrogate is three errors
  EXPECT_EQ(feed({}, {"\xF4\x90\x80\x80"}).text, r + r + r + r);
}

TEST(StopMatcher, HowTheBytesAreCutChangesNothing) {
  std::mt19937 random(7);
  auto uniform = [&](size_t n) { return random() % n; };
  const std::vector<std::string> alphabet = {
      "a",    "b",    "ab",       "\n",   "\xC3\xA9", "\xE2\x82\xAC", "\xF0\x9F\x98\x80",
      "\xE2", "\x82", "\xF0\x9F", "\xFF", "<|"};
  const std::vector<std::string> stop_alphabet = {
      "a", "b", "ab", "\n", "\xC3\xA9", "\xE2\x82\xAC", "\xEF\xBF\xBD", "<|"};
  int stopped = 0;
  for (int round = 0; round < 3000; ++round) {
    // Every other round has two letters only, so that stop strings overlap themselves and each
    // other.
    const size_t letters = round % 2 == 0 ? 3 : alphabet.size();
    const size_t stop_letters = round % 2 == 0 ? 3 : stop_alphabet.size();
    std::string bytes;
    for (size_t n = uniform(30); n > 0; --n) bytes += alphabet[uniform(letters)];
    std::vector<std::string> stops(uniform(4));
    for (std::string& stop : stops) {
      for (size_t n = 1 + uniform(4); n > 0; --n) stop += stop_alphabet[uniform(stop_letters)];
    }
    const Outcome want = oracle(stops, bytes);
    stopped += want.stopped;
    ASSERT_EQ(feed(stops, {bytes}), want) << ::testing::PrintToString(bytes);
    std::vector<std::string> single;
    for (char c : bytes) single.emplace_back(1, c);
    ASSERT_EQ(feed(stops, single), want) << ::testing::PrintToString(bytes);
    std::vector<std::string> cut;
    for (size_t at = 0; at < bytes.size();) {
      const size_t n = uniform(5);  // empty pieces too
      cut.push_back(bytes.substr(at, n));
      at += n;
    }
    ASSERT_EQ(feed(stops, cut), want) << ::testing::PrintToString(bytes);
  }
  EXPECT_GT(stopped, 300);
}

TEST(StopMatcher, MovedMatcherStillNamesItsMatch) {
  StopMatcher first({"stop"});
  std::string text;
  first.push("a stop", &text);
  StopMatcher second(std::move(first));
  EXPECT_EQ(second.matched(), "stop");
}

}  // namespace
}  // namespace fq::runtime
