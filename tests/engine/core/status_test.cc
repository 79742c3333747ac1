// Error text, and making untrusted bytes printable.
#include "framequilt/status.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

#include "src/core/printable.h"

namespace fq {
namespace {

TEST(Error, TextHasCodeMessageAndTheHintOnlyIfThereIsOne) {
  EXPECT_EQ((Error{Code::kNotFound, "no file 'x'", ""}).to_string(), "not_found: no file 'x'");
  EXPECT_EQ((Error{Code::kIo, "disk", "try again"}).to_string(), "io: disk (hint: try again)");
}

TEST(Error, EveryCodeHasItsOwnName) {
  std::set<std::string_view> names;
  for (int code = 0; code <= static_cast<int>(Code::kInternal); ++code) {
    names.insert(code_name(static_cast<Code>(code)));
  }
  EXPECT_EQ(names.size(), static_cast<size_t>(Code::kInternal) + 1);
}

Result<int> half(int value) {
  if (value % 2 != 0) return Error{Code::kInvalidArgument, "odd", ""};
  return value / 2;
}

Result<int> quarter(int value) {
  FQ_ASSIGN_OR_RETURN(const int first, half(value));
  return half(first);
}

TEST(Result, MacrosPassValuesAndErrorsOn) {
  ASSERT_TRUE(quarter(12));
  EXPECT_EQ(*quarter(12), 3);
  EXPECT_FALSE(quarter(6));
  EXPECT_FALSE(quarter(5));
  EXPECT_EQ(quarter(5).error().message, "odd");
}

TEST(Printable, EscapesWhatATerminalOrJsonCouldChokeOn) {
  EXPECT_EQ(printable("plain"), "\"plain\"");
  EXPECT_EQ(printable("a\"b\\c"), "\"a\\\"b\\\\c\"");
  EXPECT_EQ(printable(std::string_view("\x1b[0m\0\xff", 6)), "\"\\x1b[0m\\x00\\xff\"");
  EXPECT_EQ(printable(std::string(200, 'y'), 3), "\"yyy...\"");
}

}  // namespace
}  // namespace fq
