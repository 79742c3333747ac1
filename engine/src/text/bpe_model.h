// Byte pair encoding: the vocabulary and the merge rules of a tokenizer.json, and the merging of
// one word. Owns both tables; immutable. Any thread, each with its own Workspace.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "framequilt/status.h"
#include "framequilt/types.h"
#include "src/text/json_file.h"

namespace fq::text {

// (left token, right token) -> what they merge into, and how early. Open addressing, built once.
class MergeTable {
 public:
  struct Rule {
    int32_t rank;  // smaller merges first
    TokenId token;
  };
  explicit MergeTable(size_t rules = 0);
  // At most as many rules as the table was made for. The last rule of a pair counts.
  void set(TokenId left, TokenId right, Rule rule);
  const Rule* find(TokenId left, TokenId right) const;

 private:
  struct Slot {
    uint64_t pair;
    Rule rule;
  };
  size_t slot_of(uint64_t pair) const;
  std::vector<Slot> slots_;  // a power of two, at most half full
};

class BpeModel {
 public:
  // `model` is the "model" member of a tokenizer.json. Errors: corrupt_model, unsupported.
  static Result<BpeModel> read(const Json& model);

  struct Symbol {
    TokenId token;
    int32_t previous, next;  // places in the word; -1: none
    bool alive;
  };
  struct Candidate {
    int32_t rank, place;
    TokenId token;
  };
  // Memory that the words of one text share.
  struct Workspace {
    std::vector<Symbol> symbols;
    std::vector<Candidate> queue;
  };

  // Appends the tokens of `word` (valid UTF-8, not empty, below 2^31 bytes). A character that has
  // no token, no bytes to fall back to and no unknown token disappears, as it does in the
  // reference. O(n log n) in the length of the word.
  void encode(std::string_view word, Workspace& workspace, std::vector<TokenId>& out) const;

  std::optional<TokenId> find(std::string_view token) const;
  // Text of a token; nullopt for an id that is not used.
  std::optional<std::string_view> token(TokenId id) const;
  // Largest id + 1.
  int size() const { return static_cast<int>(tokens_.size()); }

 private:
  Status read_vocab(const Json& vocab);
  Status read_merges(const Json& merges);
  void find_symbols(std::string_view word, std::vector<Symbol>& symbols) const;
  void merge(Workspace& workspace) const;

  std::vector<std::string> tokens_;  // by id
  std::vector<bool> used_;
  std::unordered_map<std::string_view, TokenId> ids_;  // keys point into tokens_
  MergeTable merges_;
  std::vector<std::optional<TokenId>> byte_tokens_;  // "<0x00>".. when there is byte fallback
  std::optional<TokenId> unknown_;
  bool fuse_unknown_ = false;
  bool ignore_merges_ = false;
};

}  // namespace fq::text
