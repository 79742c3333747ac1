// Small tokenizer files, made by hand so that the expected ids can be worked out on paper.
#pragma once

#include <cstdint>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fq::testing {

// Characters a..z have ids 0..25, the space ("Ġ" in the byte alphabet) 26; then come the merges, in
// order.
inline nlohmann::json tiny_byte_level() {
  nlohmann::json vocab;
  for (int i = 0; i < 26; ++i) vocab[std::string(1, static_cast<char>('a' + i))] = i;
  vocab["\u0120"] = 26;
  int next = 27;
  nlohmann::json merges = nlohmann::json::array();
  const std::vector<std::pair<std::string, std::string>> rules = {
      {"a", "b"}, {"b", "c"}, {"ab", "c"}, {"\u0120", "abc"}};
  for (const auto& [left, right] : rules) {
    merges.push_back(left + " " + right);
    vocab[left + right] = next++;
  }
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", nlohmann::json::array()},
          {"normalizer", nullptr},
          {"pre_tokenizer",
           {{"type", "ByteLevel"},
            {"add_prefix_space", false},
            {"trim_offsets", true},
            {"use_regex", true}}},
          {"post_processor", nullptr},
          {"decoder", {{"type", "ByteLevel"}}},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"ignore_merges", false},
            {"vocab", vocab},
            {"merges", merges}}}};
}

inline nlohmann::json added_token(int id, std::string_view content, bool special) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", special}};
}

// Protocol buffer writing, as much as a SentencePiece model needs.
inline std::string varint(uint64_t value) {
  std::string out;
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(0x80 | (value & 0x7F));
  return out + static_cast<char>(value);
}
inline std::string field(int number, std::string_view content) {
  return varint(static_cast<uint64_t>(number) << 3 | 2) + varint(content.size()) +
         std::string(content);
}
inline std::string field(int number, uint64_t value) {
  return varint(static_cast<uint64_t>(number) << 3) + varint(value);
}
inline std::string field(int number, float value) {
  std::string bytes(sizeof(value), '\0');
  std::memcpy(bytes.data(), &value, sizeof(value));
  return varint(static_cast<uint64_t>(number) << 3 | 5) + bytes;
}

enum PieceType : uint64_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4 };
inline std::string piece(std::string_view text, float score, PieceType type) {
  return field(1, field(1, text) + field(2, score) + field(3, static_cast<uint64_t>(type)));
}

// 0 <unk>, 1 <s>, 2 </s>, 3 "a", 4 "b", 5 "ab", 6 "▁", 7 "▁ab", 8 <|stop|> (user-defined). BPE.
inline std::string tiny_sentencepiece(std::string_view chars_map = "") {
  return piece("<unk>", 0, kUnknown) + piece("<s>", 0, kControl) + piece("</s>", 0, kControl) +
         piece("a", -4, kNormal) + piece("b", -5, kNormal) + piece("ab", -1, kNormal) +
         piece("\u2581", -6, kNormal) + piece("\u2581ab", -2, kNormal) +
         piece("<|stop|>", 0, kUserDefined) +
         field(2, field(3, uint64_t{2})) +  // trainer_spec.model_type = BPE
         field(3, field(1, std::string_view("identity")) + field(2, chars_map));
}

}  // namespace fq::testing
