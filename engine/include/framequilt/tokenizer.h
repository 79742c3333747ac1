// Text <-> token ids for embedded applications, read from the tokenizer file a model directory
// carries. Immutable after open(); any thread.
#pragma once

#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "framequilt/status.h"
#include "framequilt/types.h"

namespace fq {

class Tokenizer {
 public:
  // Opens the tokenizer that the model directory's config names (byte-level BPE "tokenizer.json" or
  // a SentencePiece "tokenizer.model"). Errors: not_found, corrupt_model, unsupported.
  static Result<std::shared_ptr<const Tokenizer>> open(
      const std::filesystem::path& model_directory);
  virtual ~Tokenizer() = default;

  // Special tokens spelled out in the text ("<|im_end|>") become their ids when `parse_special`.
  virtual Result<std::vector<TokenId>> encode(std::string_view text,
                                              bool parse_special = true) const = 0;
  // Raw bytes of one token; may be part of a UTF-8 character. Special tokens give "".
  virtual std::string_view token_bytes(TokenId id) const = 0;
  virtual std::string decode(std::span<const TokenId> ids) const;
  virtual int vocab_size() const = 0;
};

}  // namespace fq
