#include "src/text/byte_level_bpe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/engine/text/tiny_tokenizers.h"

namespace fq::text {
namespace {

using fq::testing::added_token;
using fq::testing::tiny_byte_level;
using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

std::shared_ptr<const Tokenizer> make(const json& file) {
  auto result = ByteLevelBpe::parse(file.dump());
  if (!result) {
    ADD_FAILURE() << result.error().to_string();
    return nullptr;
  }
  return *result;
}

std::vector<TokenId> ids(const Tokenizer& tokenizer, std::string_view text, bool special = true) {
  auto result = tokenizer.encode(text, special);
  if (!result) {
    ADD_FAILURE() << result.error().to_string();
    return {};
  }
  return *result;
}

TEST(ByteLevelBpe, MergesBySmallestRankThenLeftmost) {
  const auto tokenizer = make(tiny_byte_level());
  EXPECT_THAT(ids(*tokenizer, "abc"), ElementsAre(29));       // ab first, then abc
  EXPECT_THAT(ids(*tokenizer, "bc"), ElementsAre(28));        // b c
  EXPECT_THAT(ids(*tokenizer, "abbc"), ElementsAre(27, 28));  // ab, bc
  EXPECT_THAT(ids(*tokenizer, "z abc abc"), ElementsAre(25, 30, 30));
  EXPECT_THAT(ids(*tokenizer, ""), IsEmpty());
  EXPECT_EQ(tokenizer->vocab_size(), 31);
}

TEST(ByteLevelBpe, BothWaysOfWritingMergesMeanTheSame) {
  json file = tiny_byte_level();
  json pairs = json::array();
  for (const auto& merge : file["model"]["merges"]) {
    const auto rule = merge.get<std::string>();
    const size_t space = rule.find(' ');
    pairs.push_back({rule.substr(0, space), rule.substr(space + 1)});
  }
  file["model"]["merges"] = pairs;
  EXPECT_THAT(ids(*make(file), "z abcbc"), ElementsAre(25, 30, 28));
}

TEST(ByteLevelBpe, CharactersWithoutTokenDisappearOrBecomeUnknown) {
  json file = tiny_byte_level();
  EXPECT_THAT(ids(*make(file), "aXXb"), ElementsAre(27));  // a and b become neighbours
  file["model"]["vocab"]["<unk>"] = 31;
  file["model"]["unk_token"] = "<unk>";
  EXPECT_THAT(ids(*make(file), "aXXb"), ElementsAre(0, 31, 31, 1));
  file["model"]["fuse_unk"] = true;
  EXPECT_THAT(ids(*make(file), "aXXb"), ElementsAre(0, 31, 1));
}

TEST(ByteLevelBpe, ByteFallbackWritesUnknownCharactersAsBytes) {
  json file = tiny_byte_level();
  file["pre_tokenizer"] = nullptr;
  file["model"]["byte_fallback"] = true;
  file["model"]["vocab"]["<unk>"] = 31;
  file["model"]["unk_token"] = "<unk>";
  file["model"]["vocab"]["<0xC3>"] = 32;
  file["model"]["vocab"]["<0x9F>"] = 33;
  file["decoder"] = {{"type", "Sequence"},
                     {"decoders", {{{"type", "ByteFallback"}}, {{"type", "Fuse"}}}}};
  const auto tokenizer = make(file);
  EXPECT_THAT(ids(*tokenizer, "aß"), ElementsAre(0, 32, 33));
  EXPECT_THAT(ids(*tokenizer, "aà"), ElementsAre(0, 31));  // <0xA0> is not there
  EXPECT_EQ(tokenizer->token_bytes(32), "\xC3");
  EXPECT_EQ(tokenizer->decode(std::vector<TokenId>{0, 32, 33}), "aß");
  // The reference writes one replacement for each byte of a broken run, valid bytes included.
  EXPECT_EQ(tokenizer->decode(std::vector<TokenId>{32, 33, 32, 0}), "\uFFFD\uFFFD\uFFFDa");
}

TEST(ByteLevelBpe, IgnoreMergesTakesWholeWordsFirst) {
  json file = tiny_byte_level();
  file["model"]["vocab"]["xyz"] = 31;
  EXPECT_THAT(ids(*make(file), "xyz"), ElementsAre(23, 24, 25));
  file["model"]["ignore_merges"] = true;
  EXPECT_THAT(ids(*make(file), "xyz"), ElementsAre(31));
}

TEST(ByteLevelBpe, SpecialTokensAreParsedOnlyWhenAsked) {
  json file = tiny_byte_level();
  file["added_tokens"] = {added_token(31, "<s>", true), added_token(32, "<t>", false)};
  const auto tokenizer = make(file);
  EXPECT_THAT(ids(*tokenizer, "a<s>b"), ElementsAre(0, 31, 1));
  EXPECT_THAT(ids(*tokenizer, "a<s>b", false), ElementsAre(0, 18, 1));  // < and > have no token
  EXPECT_THAT(ids(*tokenizer, "a<t>b", false), ElementsAre(0, 32, 1));
  EXPECT_EQ(tokenizer->vocab_size(), 33);
  EXPECT_EQ(tokenizer->token_bytes(31), "");
  EXPECT_EQ(tokenizer->token_bytes(32), "<t>");
  EXPECT_EQ(tokenizer->decode(std::vector<TokenId>{31, 0, 32}), "a<t>");
}

TEST(ByteLevelBpe, TheLongestAddedTokenWinsAndMayTakeSpaceAlong) {
  json file = tiny_byte_level();
  file["added_tokens"] = {added_token(31, "<s", true), added_token(32, "<s>", true)};
  EXPECT_THAT(ids(*make(file), "<s<s>"), ElementsAre(31, 32));
  file["added_tokens"][1]["lstrip"] = true;
  file["added_tokens"][1]["rstrip"] = true;
  EXPECT_THAT(ids(*make(file), "a \t<s>  b <s> <s>c"), ElementsAre(0, 32, 1, 32, 32, 2));
}

TEST(ByteLevelBpe, NormalizedAddedTokensAreFoundInNormalizedText) {
  json file = tiny_byte_level();
  file["normalizer"] = {{"type", "NFC"}};
  file["added_tokens"] = {added_token(31, "\u00C5", false)};
  EXPECT_THAT(ids(*make(file), "aA\u030Ab"), ElementsAre(27));  // no such token in raw text
  file["added_tokens"][0]["normalized"] = true;
  EXPECT_THAT(ids(*make(file), "aA\u030Ab"), ElementsAre(0, 31, 1));
}

TEST(ByteLevelBpe, TokenBytesMayBePartOfACharacter) {
  json file = tiny_byte_level();
  file["model"]["vocab"]["\u00C3"] = 31;  // byte C3 in the byte alphabet
  file["model"]["vocab"]["\u0141"] = 32;  // byte 9F
  const auto tokenizer = make(file);
  EXPECT_THAT(ids(*tokenizer, "ß"), ElementsAre(31, 32));
  EXPECT_EQ(tokenizer->token_bytes(31), "\xC3");
  EXPECT_EQ(tokenizer->decode(std::vector<TokenId>{31, 32}), "ß");
  EXPECT_EQ(tokenizer->decode(std::vector<TokenId>{32, 0, 31}), "\uFFFDa\uFFFD");
}

TEST(ByteLevelBpe, IdsOutsideTheVocabularyDecodeToNothing) {
  const auto tokenizer = make(tiny_byte_level());
  EXPECT_EQ(tokenizer->decode(std::vector<TokenId>{kMediaToken, 0, 31, INT32_MAX, INT32_MIN}), "a");
  EXPECT_EQ(tokenizer->token_bytes(-1), "");
  EXPECT_EQ(tokenizer->token_bytes(31), "");
}

TEST(ByteLevelBpe, TextThatIsNotUtf8IsRefused) {
  const auto tokenizer = make(tiny_byte_level());
  for (const char* text : {"a\xFF", "\xC3", "\xED\xA0\x80"}) {
    const auto result = tokenizer->encode(text);
    ASSERT_FALSE(result);
    EXPECT_EQ(result.error().code, Code::kInvalidArgument);
  }
}

TEST(ByteLevelBpe, AWordOfAMillionCharactersIsMergedCompletely) {
  const auto tokenizer = make(tiny_byte_level());
  std::string text;
  for (int i = 0; i < 333333; ++i) text += "abc";
  const auto result = ids(*tokenizer, text);
  EXPECT_EQ(result, std::vector<TokenId>(333333, 29));
}

}  // namespace
}  // namespace fq::text
