#include "src/text/unicode.h"

#include <gtest/gtest.h>

#include <string>

namespace fq::text {
namespace {

// Examples of Unicode 15, section 3.9, tables 3-8 and 3-11: one U+FFFD for each maximal subpart.
TEST(Utf8, BrokenSequencesBecomeOneReplacementForEachMaximalSubpart) {
  const std::string r = "\uFFFD";
  EXPECT_EQ(replace_broken_utf8("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"),
            r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(replace_broken_utf8("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"), r + r + r + r + "A");
  EXPECT_EQ(replace_broken_utf8("\xED\xA0\x80"), r + r + r);          // a surrogate
  EXPECT_EQ(replace_broken_utf8("\xF4\x90\x80\x80"), r + r + r + r);  // above U+10FFFF
  EXPECT_EQ(replace_broken_utf8("a\xE2\x82"), "a" + r);               // cut off
}

TEST(Utf8, EveryCodePointSurvivesWritingAndReading) {
  for (uint32_t c = 0; c <= 0x10FFFF; ++c) {
    if (c >= 0xD800 && c <= 0xDFFF) continue;
    std::string text;
    append_utf8(c, text);
    const Utf8Unit unit = utf8_unit(text, 0);
    ASSERT_TRUE(unit.valid);
    ASSERT_EQ(unit.code_point, c);
    ASSERT_EQ(unit.bytes, text.size());
    ASSERT_EQ(utf8_length(text[0]), text.size());
  }
}

TEST(Utf8, WhiteSpaceIsCountedAtBothEnds) {
  const std::string text = " \u3000\u00a0x y\u2028\t";
  EXPECT_EQ(leading_white_space(text), 6u);
  EXPECT_EQ(trailing_white_space(text), 4u);
  EXPECT_EQ(leading_white_space("  "), 2u);
  EXPECT_EQ(trailing_white_space("  "), 2u);
  EXPECT_EQ(leading_white_space("\u200b "), 0u);  // zero width space is no White_Space
}

// UAX 15, figures 3 to 6.
TEST(Normalize, FormsAreThoseOfTheStandard) {
  EXPECT_EQ(*normalize("\u0041\u030A", NormalForm::kNfc), "\u00C5");
  EXPECT_EQ(*normalize("\u212B", NormalForm::kNfc), "\u00C5");
  EXPECT_EQ(*normalize("\u00C5", NormalForm::kNfd), "\u0041\u030A");
  EXPECT_EQ(*normalize("\u1E9B\u0323", NormalForm::kNfc), "\u1E9B\u0323");
  EXPECT_EQ(*normalize("\u1E9B\u0323", NormalForm::kNfd), "\u017F\u0323\u0307");
  EXPECT_EQ(*normalize("\u1E9B\u0323", NormalForm::kNfkc), "\u1E69");
  EXPECT_EQ(*normalize("\u1E9B\u0323", NormalForm::kNfkd), "\u0073\u0323\u0307");
  EXPECT_EQ(*normalize("\uFB01", NormalForm::kNfc), "\uFB01");
  EXPECT_EQ(*normalize("\u00B2", NormalForm::kNfkc), "2");
  const std::string with_zero("a\0\u0041\u030A", 5);
  EXPECT_EQ(*normalize(with_zero, NormalForm::kNfc), std::string("a\0\u00C5", 4));
}

}  // namespace
}  // namespace fq::text
