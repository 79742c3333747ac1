// Damaged and malicious tokenizer files: a coded error that names the place, never a crash.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <random>
#include <string>

#include "src/text/byte_level_bpe.h"
#include "src/text/sentencepiece_tokenizer.h"
#include "tests/engine/text/tiny_tokenizers.h"

namespace fq::text {
namespace {

using fq::testing::added_token;
using fq::testing::tiny_byte_level;
using nlohmann::json;

struct Case {
  const char* name;
  Code code;
  const char* message;  // a part of it
  std::function<void(json&)> damage;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

class DamagedFile : public ::testing::TestWithParam<Case> {};

TEST_P(DamagedFile, IsRefusedByName) {
  json file = tiny_byte_level();
  GetParam().damage(file);
  const auto result = ByteLevelBpe::parse(file.dump());
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().code, GetParam().code);
  EXPECT_THAT(result.error().message, ::testing::HasSubstr(GetParam().message));
}

json nested(int depth) {
  json value = {{"type", "NFC"}};
  for (int i = 0; i < depth; ++i) value = {{"type", "Sequence"}, {"normalizers", {value}}};
  return value;
}

constexpr Code kCorrupt = Code::kCorruptModel, kUnsupported = Code::kUnsupported;

INSTANTIATE_TEST_SUITE_P(
    All, DamagedFile,
    ::testing::Values(
        Case{"no_model", kCorrupt, "model", [](json& f) { f.erase("model"); }},
        Case{"model_is_a_list", kCorrupt, "model", [](json& f) { f["model"] = json::array(); }},
        Case{"other_model", kUnsupported, "WordPiece",
             [](json& f) { f["model"]["type"] = "WordPiece"; }},
        Case{"unknown_key", kUnsupported, "surprise", [](json& f) { f["surprise"] = 1; }},
        Case{"unknown_model_key", kUnsupported, "surprise",
             [](json& f) { f["model"]["surprise"] = 1; }},
        Case{"other_version", kUnsupported, "2.0", [](json& f) { f["version"] = "2.0"; }},
        Case{"dropout", kUnsupported, "dropout", [](json& f) { f["model"]["dropout"] = 0.1; }},
        Case{"suffix", kUnsupported, "</w>",
             [](json& f) { f["model"]["end_of_word_suffix"] = "</w>"; }},
        Case{"empty_vocab", kCorrupt, "vocab", [](json& f) { f["model"]["vocab"] = json::object(); }},
        Case{"negative_id", kCorrupt, "-1", [](json& f) { f["model"]["vocab"]["a"] = -1; }},
        Case{"huge_id", kCorrupt, "4194304", [](json& f) { f["model"]["vocab"]["a"] = 4194304; }},
        Case{"id_beyond_int", kCorrupt, "18446744073709551615",
             [](json& f) { f["model"]["vocab"]["a"] = UINT64_MAX; }},
        Case{"fractional_id", kCorrupt, "0.5", [](json& f) { f["model"]["vocab"]["a"] = 0.5; }},
        Case{"text_id", kCorrupt, "string", [](json& f) { f["model"]["vocab"]["a"] = "0"; }},
        Case{"duplicate_id", kCorrupt, "id 1 ", [](json& f) { f["model"]["vocab"]["a"] = 1; }},
        Case{"merge_of_unknown_token", kCorrupt, "\"Q\"",
             [](json& f) { f["model"]["merges"].push_back("Q a"); }},
        Case{"merge_into_unknown_token", kCorrupt, "\"za\"",
             [](json& f) { f["model"]["merges"].push_back("z a"); }},
        Case{"merge_of_three", kCorrupt, "merges[4]",
             [](json& f) { f["model"]["merges"].push_back("a b c"); }},
        Case{"merge_of_one", kCorrupt, "merges[4]",
             [](json& f) { f["model"]["merges"].push_back("a"); }},
        Case{"merge_of_numbers", kCorrupt, "merges[4]",
             [](json& f) { f["model"]["merges"].push_back({1, 2}); }},
        Case{"unknown_unk", kCorrupt, "<unk>", [](json& f) { f["model"]["unk_token"] = "<unk>"; }},
        Case{"lowercase", kUnsupported, "Lowercase",
             [](json& f) { f["normalizer"] = {{"type", "Lowercase"}}; }},
        Case{"normalizer_depth", kUnsupported, "nested",
             [](json& f) { f["normalizer"] = nested(12); }},
        Case{"growing_replacement", kUnsupported, "replacement",
             [](json& f) {
               f["normalizer"] = {{"type", "Replace"},
                                  {"pattern", {{"String", "a"}}},
                                  {"content", std::string(65, 'a')}};
             }},
        Case{"unknown_pre_tokenizer", kUnsupported, "BertPreTokenizer",
             [](json& f) { f["pre_tokenizer"] = {{"type", "BertPreTokenizer"}}; }},
        Case{"unknown_behavior", kUnsupported, "Sideways",
             [](json& f) {
               f["pre_tokenizer"] = {{"type", "Split"},
                                     {"pattern", {{"String", " "}}},
                                     {"behavior", "Sideways"},
                                     {"invert", false}};
             }},
        Case{"bad_pattern", kUnsupported, "pre_tokenizer.pattern",
             [](json& f) {
               f["pre_tokenizer"] = {{"type", "Split"},
                                     {"pattern", {{"Regex", "(?R)"}}},
                                     {"behavior", "Isolated"},
                                     {"invert", false}};
             }},
        Case{"no_decoder", kUnsupported, "decoder", [](json& f) { f["decoder"] = nullptr; }},
        Case{"unknown_decoder", kUnsupported, "CTC",
             [](json& f) { f["decoder"] = {{"type", "CTC"}}; }},
        Case{"added_twice", kCorrupt, "added_tokens[1]",
             [](json& f) { f["added_tokens"] = {added_token(31, "x1", true), added_token(31, "x2", true)}; }},
        Case{"added_contradicts_vocab", kCorrupt, "contradicts",
             [](json& f) { f["added_tokens"] = {added_token(3, "a", true)}; }},
        Case{"added_takes_id", kCorrupt, "contradicts",
             [](json& f) { f["added_tokens"] = {added_token(3, "<s>", true)}; }},
        Case{"added_id_out_of_range", kCorrupt, "added_tokens[0].id",
             [](json& f) { f["added_tokens"] = {added_token(1 << 22, "<s>", true)}; }},
        Case{"single_word", kUnsupported, "single_word",
             [](json& f) {
               f["added_tokens"] = {added_token(31, "<s>", true)};
               f["added_tokens"][0]["single_word"] = true;
             }},
        Case{"added_too_long", kUnsupported, "added_tokens[0]",
             [](json& f) { f["added_tokens"] = {added_token(31, std::string(2000, 'x'), true)}; }}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(HostileTokenizerJson, EveryTruncationIsAnError) {
  const std::string text = tiny_byte_level().dump();
  for (size_t size = 0; size < text.size(); ++size) {
    const auto result = ByteLevelBpe::parse(std::string_view(text).substr(0, size));
    ASSERT_FALSE(result) << size;
    EXPECT_EQ(result.error().code, Code::kCorruptModel);
  }
}

TEST(HostileTokenizerJson, DeepNestingIsRefusedBeforeParsing) {
  for (const char* open : {"[", "{\"a\":"}) {
    std::string text;
    for (int i = 0; i < 1000000; ++i) text += open;
    const auto result = ByteLevelBpe::parse(text);
    ASSERT_FALSE(result);
    EXPECT_THAT(result.error().message, ::testing::HasSubstr("nested"));
  }
}

TEST(HostileTokenizerJson, MoreValuesThanAnyTokenizerHasAreRefused) {
  std::string text = "[";
  text.append(size_t{9} << 20, ',');
  const auto result = ByteLevelBpe::parse(text);
  ASSERT_FALSE(result);
  EXPECT_THAT(result.error().message, ::testing::HasSubstr("values"));
}

// Any answer will do, as long as there is one and text can then be encoded and decoded.
TEST(HostileTokenizerJson, RandomDamageNeverCrashes) {
  json file = tiny_byte_level();
  file["added_tokens"] = {added_token(31, "<s>", true)};
  file["normalizer"] = {{"type", "Replace"}, {"pattern", {{"Regex", "x+"}}}, {"content", "y"}};
  const std::string text = file.dump();
  std::mt19937 random(20260101);
  int readable = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string damaged = text;
    const int edits = 1 + static_cast<int>(random() % 3);
    for (int edit = 0; edit < edits; ++edit) {
      const size_t place = random() % damaged.size();
      switch (random() % 3) {
        case 0:
          damaged[place] = static_cast<char>(random());
          break;
        case 1:
          damaged.erase(place, 1 + random() % 8);
          break;
        default:
          damaged.insert(place, damaged.substr(random() % damaged.size(), random() % 12));
      }
    }
    const auto result = ByteLevelBpe::parse(damaged);
    if (!result) {
      EXPECT_NE(result.error().code, Code::kInternal) << result.error().message;
      continue;
    }
    ++readable;
    const auto ids = (*result)->encode("abc <s> xx \u00e9");
    if (ids) (*result)->decode(*ids);
  }
  EXPECT_GT(readable, 10);  // else the damage was so heavy that nothing was tried
}

}  // namespace
}  // namespace fq::text
