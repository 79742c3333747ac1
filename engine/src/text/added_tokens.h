// Tokens that are found in the text before anything is split into words: special tokens and others
// that a tokenizer.json lists under "added_tokens". AddedTokens owns the list, a TokenTrie its
// nodes; both are immutable once filled. Any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "framequilt/status.h"
#include "framequilt/types.h"
#include "src/text/bpe_model.h"
#include "src/text/json_file.h"
#include "src/text/normalizer.h"

namespace fq::text {

// Finds the leftmost, then longest, of many strings.
class TokenTrie {
 public:
  TokenTrie() : nodes_(1) {}
  void add(std::string_view text, int value);
  // Length of the longest string that starts at `position`, 0 if none does; its value in `value`.
  size_t longest(std::string_view text, size_t position, int& value) const;
  bool empty() const { return nodes_.size() == 1; }

 private:
  struct Node {
    std::map<char, int32_t> next;
    int value = -1;
  };
  std::vector<Node> nodes_;
};

struct AddedToken {
  TokenId id = 0;
  std::string content;
  std::string decoded;  // what decoders get: the content, normalized if the token is
  bool special = false;
  bool left_strip = false, right_strip = false;  // takes the white space beside it along
  bool normalized = false;                       // is looked for in normalized text
};

// Part of a text: a token, or text that is still to be encoded (token < 0).
struct Segment {
  size_t begin = 0, end = 0;
  TokenId token = -1;
};

class AddedTokens {
 public:
  // `value` may be null. Every token must agree with the model's vocabulary.
  // Errors: corrupt_model, unsupported.
  static Result<AddedTokens> read(const Json* value, const BpeModel& model,
                                  const Normalizer& normalizer);

  const std::vector<AddedToken>& tokens() const { return tokens_; }
  // Splits raw text at the tokens that are not normalized, or normalized text at those that are.
  // Special tokens stay text unless `parse_special`.
  std::vector<Segment> split(std::string_view text, bool normalized, bool parse_special) const;

 private:
  std::vector<AddedToken> tokens_;
  TokenTrie raw_, normalized_;  // values are places in tokens_
};

}  // namespace fq::text
