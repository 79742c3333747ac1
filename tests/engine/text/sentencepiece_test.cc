#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "src/text/sentencepiece_check.h"
#include "src/text/sentencepiece_tokenizer.h"
#include "tests/engine/text/tiny_tokenizers.h"

namespace fq::text {
namespace {

using fq::testing::field;
using fq::testing::piece;
using fq::testing::tiny_sentencepiece;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

std::shared_ptr<const Tokenizer> make() {
  auto result = SentencePieceTokenizer::parse(tiny_sentencepiece());
  if (!result) {
    ADD_FAILURE() << result.error().to_string();
    return nullptr;
  }
  return *result;
}

TEST(SentencePiece, EncodesWithTheDummyPrefixAndDecodesWithoutIt) {
  const auto tokenizer = make();
  EXPECT_THAT(*tokenizer->encode("ab ab"), ElementsAre(7, 7));
  EXPECT_THAT(*tokenizer->encode("ba"), ElementsAre(6, 4, 3));
  EXPECT_THAT(*tokenizer->encode(""), IsEmpty());
  EXPECT_EQ(tokenizer->decode(std::vector<TokenId>{7, 7}), "ab ab");
  EXPECT_EQ(tokenizer->token_bytes(7), " ab");
  EXPECT_EQ(tokenizer->vocab_size(), 9);
}

TEST(SentencePiece, SpecialPiecesAreParsedOnlyWhenAsked) {
  const auto tokenizer = make();
  EXPECT_THAT(*tokenizer->encode("ab</s>ab<|stop|>"), ElementsAre(7, 2, 7, 8));
  const auto plain = *tokenizer->encode("ab</s>ab<|stop|>", false);
  EXPECT_THAT(plain, ::testing::Not(::testing::Contains(2)));
  EXPECT_THAT(plain, ::testing::Not(::testing::Contains(8)));
  EXPECT_EQ(tokenizer->decode(std::vector<TokenId>{1, 7, 8, 2}), "ab");
  EXPECT_EQ(tokenizer->token_bytes(2), "");
  EXPECT_EQ(tokenizer->token_bytes(8), "");
}

TEST(SentencePiece, IdsOutsideTheVocabularyDecodeToNothing) {
  const auto tokenizer = make();
  EXPECT_EQ(tokenizer->decode(std::vector<TokenId>{-1, 7, 9, INT32_MAX}), "ab");
  EXPECT_EQ(tokenizer->token_bytes(9), "");
}

TEST(SentencePiece, TextThatIsNotUtf8IsRefused) {
  const auto result = make()->encode("a\xFF");
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().code, Code::kInvalidArgument);
}

TEST(SentencePiece, DamagedFilesAreRefused) {
  const std::string good = tiny_sentencepiece();
  ASSERT_TRUE(SentencePieceTokenizer::parse(good));
  const std::string no_unknown = piece("a", 0, fq::testing::kNormal);
  const std::string not_finite = good + piece("c", NAN, fq::testing::kNormal);
  const std::string twice = good + piece("a", 0, fq::testing::kNormal);
  const std::string empty_piece = good + piece("", 0, fq::testing::kNormal);
  const std::string beyond_end = good + "\x0A\x7F";
  for (const std::string& bad : {std::string(), std::string("{}"), std::string(100, '\xFF'),
                                 no_unknown, not_finite, twice, empty_piece, beyond_end}) {
    const auto result = SentencePieceTokenizer::parse(bad);
    ASSERT_FALSE(result);
    EXPECT_EQ(result.error().code, Code::kCorruptModel) << result.error().message;
  }
}

// A character map is a double array: units of (offset << 10 | has value << 8 | label), and a leaf
// with bit 31.
std::string chars_map(const std::vector<uint32_t>& units, std::string_view text) {
  std::string out(4 + units.size() * 4, '\0');
  const auto bytes = static_cast<uint32_t>(units.size() * 4);
  std::memcpy(out.data(), &bytes, 4);
  if (!units.empty()) std::memcpy(out.data() + 4, units.data(), units.size() * 4);
  return out + std::string(text);
}

constexpr uint32_t unit(uint32_t offset, uint32_t label, bool value = false) {
  return offset << 10 | (value ? 0x100u : 0) | label;
}
constexpr uint32_t leaf(uint32_t value) { return 0x80000000u | value; }
constexpr uint32_t kUnused = leaf(0);  // no label fits

// Replaces "A" by "b": root -> 'A' -> value 0 of "b\0".
std::vector<uint32_t> good_units() {
  std::vector<uint32_t> units(512, kUnused);
  units[0] = unit(256, 0);
  units[256 ^ 'A'] = unit(1, 'A', true);  // children at (256 ^ 'A') ^ 1
  units[(256 ^ 'A') ^ 1] = leaf(0);
  return units;
}

bool accepted(const std::string& map) {
  return check_sentencepiece_model(tiny_sentencepiece(map)).ok();
}

TEST(SentencePiece, ACharacterMapIsAppliedByTheLibraryAsTheCheckReadsIt) {
  const std::string model = tiny_sentencepiece(chars_map(good_units(), std::string("b\0", 2)));
  const auto tokenizer = SentencePieceTokenizer::parse(model);
  ASSERT_TRUE(tokenizer) << tokenizer.error().to_string();
  EXPECT_THAT(*(*tokenizer)->encode("aA"), ElementsAre(7));
}

TEST(SentencePiece, CharacterMapsThatLeadOutOfTheFileAreRefused) {
  const std::string text("b\0", 2);
  ASSERT_TRUE(accepted(chars_map(good_units(), text)));
  EXPECT_FALSE(accepted("abc"));                                   // no size
  EXPECT_FALSE(accepted(std::string("\xFF\xFF\xFF\x7F....", 8)));  // a size beyond the end
  EXPECT_FALSE(accepted(chars_map(good_units(), "b")));            // a text without end
  EXPECT_FALSE(accepted(chars_map({}, text)));                     // no root
  EXPECT_FALSE(accepted(chars_map({unit(0, 0)}, text)));           // children beyond the end
  auto far = good_units();
  far[256 ^ 'A'] = unit(4096, 'A', false);
  EXPECT_FALSE(accepted(chars_map(far, text)));
  auto value = good_units();
  value[(256 ^ 'A') ^ 1] = leaf(2);
  EXPECT_FALSE(accepted(chars_map(value, text)));  // a text beyond the end
  auto cycle = good_units();
  cycle[256 ^ 'A'] = unit('A' ^ 'B', 'A', false);  // its children start at 256 ^ 'B'
  cycle[256 ^ 'B' ^ 'C'] = unit(0, 'C', false);
  cycle[256 ^ 'B' ^ 'C' ^ 'D'] = unit('A' ^ 'B' ^ 'C' ^ 'D' ^ 'A', 'D', false);
  // D's children start where the root's do, so A follows D again.
  EXPECT_FALSE(accepted(chars_map(cycle, text)));
}

TEST(SentencePiece, MoreNestedMatchesThanTheLibraryHasRoomForAreRefused) {
  // A chain x, xx, xxx, ... of which every step has a value; each step uses a block of 256 units.
  for (const size_t depth : {32u, 33u}) {
    std::vector<uint32_t> units((depth + 2) * 256, kUnused);
    units[0] = unit(256, 0);
    size_t place = 256 ^ 'x';
    for (size_t step = 1; step <= depth; ++step) {
      const size_t base = (step + 1) * 256;
      const auto offset = static_cast<uint32_t>(place ^ base);
      units[place] = unit(offset, 'x', true);
      units[base] = leaf(0);
      place = base ^ 'x';
    }
    EXPECT_EQ(accepted(chars_map(units, std::string("b\0", 2))), depth == 32);
  }
}

TEST(SentencePiece, RandomDamageNeverCrashes) {
  const std::string good = tiny_sentencepiece(chars_map(good_units(), std::string("b\0", 2)));
  std::mt19937 random(20260101);
  int readable = 0;
  for (int round = 0; round < 2000; ++round) {
    std::string damaged = good;
    const int edits = 1 + static_cast<int>(random() % 3);
    for (int edit = 0; edit < edits; ++edit) {
      // Half of the edits fall on the first bytes: most of the file is empty trie.
      const size_t place = random() % (random() % 2 == 0 ? 150 : damaged.size());
      if (random() % 4 == 0) {
        damaged.erase(place, 1 + random() % 4);
      } else {
        damaged[place] = static_cast<char>(random());
      }
    }
    const auto result = SentencePieceTokenizer::parse(damaged);
    if (!result) continue;
    ++readable;
    const auto ids = (*result)->encode("ab A </s> <|stop|> \u00e9");
    if (ids) (*result)->decode(*ids);
  }
  EXPECT_GT(readable, 10);
}

}  // namespace
}  // namespace fq::text
