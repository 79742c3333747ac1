// A SentencePiece "tokenizer.model", run by libsentencepiece. Owns the model; immutable. Any
// thread.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "framequilt/status.h"
#include "framequilt/tokenizer.h"
#include "src/text/added_tokens.h"

namespace sentencepiece {
class SentencePieceProcessor;
}

namespace fq::text {

class SentencePieceTokenizer final : public Tokenizer {
 public:
  // `model` is the content of the file. Errors: corrupt_model.
  static Result<std::shared_ptr<const Tokenizer>> parse(std::string_view model);
  ~SentencePieceTokenizer() override;

  // Special are the control pieces, and the user-defined ones that look like markup ("<|im_end|>",
  // "[INST]"): the library finds those in any text, so that a text could give orders. Text between
  // special tokens is encoded as a text of its own (and gets the model's dummy prefix). When they
  // are not to be parsed, the text is cut inside each user-defined one.
  Result<std::vector<TokenId>> encode(std::string_view text, bool parse_special) const override;
  // U+2581 is a space here. decode() drops the space that the model's dummy prefix put in front.
  std::string_view token_bytes(TokenId id) const override;
  std::string decode(std::span<const TokenId> ids) const override;
  int vocab_size() const override { return static_cast<int>(bytes_.size()); }

 private:
  explicit SentencePieceTokenizer(std::unique_ptr<sentencepiece::SentencePieceProcessor> processor);
  Status read_pieces();
  Result<std::vector<TokenId>> encode_all(std::string_view text, bool parse_special) const;

  std::unique_ptr<sentencepiece::SentencePieceProcessor> processor_;
  std::vector<std::string> bytes_;  // by id
  std::vector<bool> special_;       // by id
  TokenTrie special_texts_;         // values are ids
};

}  // namespace fq::text
