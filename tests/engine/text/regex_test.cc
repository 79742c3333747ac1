#include "src/text/regex.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace fq::text {
namespace {

// The parts of `text`; a matched one is in angle brackets.
std::string split(std::string_view pattern, std::string_view text) {
  const auto regex = Regex::compile(pattern, "test");
  if (!regex) return regex.error().message;
  auto splitter = Regex::Splitter::make(*regex, text.size());
  std::vector<Span> spans;
  const Status status = splitter->split(text, spans);
  if (!status) return status.error().message;
  std::string out;
  for (const Span& span : spans) {
    const std::string part(text.substr(span.begin, span.end - span.begin));
    out += span.matched ? "<" + part + ">" : part;
  }
  return out;
}

bool refused(std::string_view pattern) {
  const auto regex = Regex::compile(pattern, "test");
  return !regex && regex.error().code == Code::kUnsupported &&
         regex.error().message.find("test") != std::string::npos;
}

TEST(Regex, SplitsAtMatches) {
  EXPECT_EQ(split("a+", "xaaya"), "x<aa>y<a>");
  EXPECT_EQ(split("a", ""), "");
  EXPECT_EQ(split(R"(\p{L}+| ?\p{N})", "Ünder 12"), "<Ünder>< 1><2>");
  EXPECT_EQ(split(R"(\s+(?!\S)|\s+)", "a   b"), "a<  >< >b");
}

TEST(Regex, EmptyMatchesSplitButNotRightAfterAMatch) {
  EXPECT_EQ(split("b*", "abcé"), "<>a<b>c<>é<>");
}

// Where the two dialects differ, the pattern means what Oniguruma says.
TEST(Regex, ClassesAreThoseOfTheReference) {
  EXPECT_EQ(split(R"(\s)", "\u180e\u0085\u3000"), "\u180e<\u0085><\u3000>");
  EXPECT_EQ(split(R"(\S)", "\u180e\u0085"), "<\u180e>\u0085");
  EXPECT_EQ(split(R"([^\s])", "\u180e\u0085"), "<\u180e>\u0085");
  EXPECT_EQ(split(R"(\w+)", "e\u0301_Ⅷ\u203f½"), "<e\u0301_Ⅷ\u203f>½");
  EXPECT_EQ(split(R"(\d)", "1٣²"), "<1><٣>²");
  EXPECT_EQ(split(R"(\p{Han})", "中、"), "<中>、");  // 、 is used with Han, but is of no script
  EXPECT_EQ(split("^a$", "b\na\nb"), "b\n<a>\nb");
  EXPECT_EQ(split("a{,2}b", "aaab"), "a<aab>");
  EXPECT_EQ(split("(?:a{1,2}+a)", "aaaaa"), "<aaaaa>");  // greedy, not possessive
  EXPECT_EQ(split("a{b", "a{b"), "<a{b>");
  EXPECT_EQ(split("(?i:'s|k)", "'\u017F \u212A"), "<'\u017F> <\u212A>");
}

TEST(Regex, ConstructsOfUnclearMeaningAreRefused) {
  for (const char* pattern : {R"(\h)",
                              R"(\bx)",
                              R"(\1)",
                              R"(\K)",
                              R"(\R)",
                              R"(\X)",
                              R"(\Qx\E)",
                              R"(\pL)",
                              "(?m:.)",
                              "(?i)a",
                              "(*ACCEPT)",
                              "(*LIMIT_MATCH=1)",
                              "(?R)",
                              "(?1)",
                              "(?<n>a)",
                              "(?#c)",
                              "[a[b]]",
                              "[a&&b]",
                              "[[:alpha:]]",
                              "[]a]",
                              R"([\S])",
                              R"([\W])",
                              "a**",
                              "a{2}?",
                              "a{2}{3}",
                              "*a",
                              "(",
                              ")",
                              "[a",
                              "\\",
                              R"(\p{)",
                              R"(\p{Nonsense})",
                              R"(\x{110000})",
                              R"(\xFF)",
                              "(?",
                              "a|*"}) {
    EXPECT_TRUE(refused(pattern)) << pattern;
  }
  EXPECT_TRUE(refused(std::string(5000, 'a')));
  EXPECT_TRUE(refused(std::string(200, '(') + std::string(200, ')')));
}

TEST(Regex, LiteralTextHasNoOperators) {
  const std::string text = "a.*[\\(\u2581 +";
  const auto regex = Regex::literal(text, "test");
  ASSERT_TRUE(regex) << regex.error().to_string();
  auto splitter = Regex::Splitter::make(*regex, 100);
  std::vector<Span> spans;
  ASSERT_TRUE(splitter->split("x" + text, spans));
  ASSERT_EQ(spans.size(), 2u);
  EXPECT_TRUE(spans[1].matched);
  EXPECT_EQ(spans[1].end - spans[1].begin, text.size());
}

TEST(Regex, CatastrophicPatternsEndWithAnError) {
  const std::string text(5000, 'a');
  EXPECT_NE(split("(?:a+)+[bc]", text).find("too much work"), std::string::npos);
  // Each match is affordable, but there are many of them.
  EXPECT_NE(split("(?:a{1,5}){1,6}[bc]|a", std::string(50000, 'a')).find("too much work"),
            std::string::npos);
}

TEST(Regex, LongRunsOfOrdinaryTextAreSplit) {
  const std::string spaces(300000, ' ');
  EXPECT_EQ(split(R"(\s*[\r\n]+|\s+(?!\S)|\s+)", spaces).size(), spaces.size() + 2);
  const std::string letters(300000, 'x');
  EXPECT_EQ(split(R"([^\r\n\p{L}\p{N}]?\p{L}+)", letters).size(), letters.size() + 2);
}

}  // namespace
}  // namespace fq::text
