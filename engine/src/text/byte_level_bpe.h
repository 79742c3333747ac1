// A Hugging Face tokenizer.json whose model is BPE: byte-level, or SentencePiece-like with byte
// fallback. Owns everything it read; immutable. Any thread.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "framequilt/status.h"
#include "framequilt/tokenizer.h"
#include "src/text/added_tokens.h"
#include "src/text/bpe_model.h"
#include "src/text/decoder.h"
#include "src/text/normalizer.h"
#include "src/text/pre_tokenizer.h"

namespace fq::text {

// Longer texts are refused: no context holds them.
inline constexpr size_t kMaxTextBytes = size_t{256} << 20;

class ByteLevelBpe final : public Tokenizer {
 public:
  // `json` is the content of a tokenizer.json. Its post_processor, truncation and padding are not
  // applied: the model directory's config says what is put before a prompt. Errors: corrupt_model,
  // unsupported.
  static Result<std::shared_ptr<const Tokenizer>> parse(std::string_view json);

  Result<std::vector<TokenId>> encode(std::string_view text, bool parse_special) const override;
  std::string_view token_bytes(TokenId id) const override;
  std::string decode(std::span<const TokenId> ids) const override;
  int vocab_size() const override { return static_cast<int>(entries_.size()); }

 private:
  struct Entry {
    std::string token;  // as the vocabulary spells it
    std::string bytes;  // what it stands for; empty for special tokens
    bool used = false, special = false;
  };

  ByteLevelBpe(BpeModel model, Normalizer normalizer, PreTokenizer pre_tokenizer, Decoder decoder,
               AddedTokens added);
  Result<std::vector<TokenId>> encode_all(std::string_view text, bool parse_special) const;
  Status encode_text(std::string_view text, bool at_start, BpeModel::Workspace& workspace,
                     std::vector<TokenId>& out) const;

  BpeModel model_;
  Normalizer normalizer_;
  PreTokenizer pre_tokenizer_;
  Decoder decoder_;
  AddedTokens added_;
  std::vector<Entry> entries_;  // by id
};

}  // namespace fq::text
