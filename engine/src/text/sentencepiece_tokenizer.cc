// libsentencepiece behind fq::Tokenizer: ids are checked here, because the library trusts them.
#include "src/text/sentencepiece_tokenizer.h"

#include <sentencepiece_processor.h>

#include <algorithm>
#include <utility>

#include "src/text/byte_level_bpe.h"
#include "src/text/guard.h"
#include "src/text/json_file.h"
#include "src/text/regex.h"
#include "src/text/sentencepiece_check.h"
#include "src/text/unicode.h"

namespace fq::text {
namespace {

constexpr std::string_view kSpaceMark = "\xE2\x96\x81";

constexpr std::string_view kMarkup =
    R"(\A(?:<\|.+\|>|</?(?:s|bos|eos|pad|unk|(?:start|end)_of_\w+|im_\w+|image\w*|video\w*)>)"
    R"(|\[/?[A-Z_]+\])\z)";

std::string piece_bytes(const sentencepiece::SentencePieceProcessor& processor, int id) {
  // The library writes an unknown piece as its unk_surface, which only decoding tells.
  if (processor.IsUnknown(id)) return processor.DecodeIds({id});
  const std::string& piece = processor.IdToPiece(id);
  if (processor.IsByte(id)) {
    return std::string(1, static_cast<char>(std::stoi(piece.substr(3, 2), nullptr, 16)));
  }
  std::string out;
  for (size_t i = 0; i < piece.size();) {
    if (std::string_view(piece).substr(i).starts_with(kSpaceMark)) {
      out += ' ';
      i += kSpaceMark.size();
    } else {
      out += piece[i++];
    }
  }
  return out;
}

}  // namespace

Result<std::shared_ptr<const Tokenizer>> SentencePieceTokenizer::parse(std::string_view model) {
  FQ_RETURN_IF_ERROR(check_sentencepiece_model(model));
  // The library throws from its trie builder when a piece is broken.
  return guarded(Code::kCorruptModel, "tokenizer.model",
                 [&]() -> Result<std::shared_ptr<const Tokenizer>> {
                   auto processor = std::make_unique<sentencepiece::SentencePieceProcessor>();
                   const auto status = processor->LoadFromSerializedProto(model);
                   if (!status.ok()) return corrupt("tokenizer.model: " + status.ToString());
                   std::unique_ptr<SentencePieceTokenizer> tokenizer(
                       new SentencePieceTokenizer(std::move(processor)));
                   FQ_RETURN_IF_ERROR(tokenizer->read_pieces());
                   return std::shared_ptr<const Tokenizer>(std::move(tokenizer));
                 });
}

SentencePieceTokenizer::SentencePieceTokenizer(
    std::unique_ptr<sentencepiece::SentencePieceProcessor> processor)
    : processor_(std::move(processor)) {}

Status SentencePieceTokenizer::read_pieces() {
  FQ_ASSIGN_OR_RETURN(const Regex markup, Regex::compile(kMarkup, "tokenizer.model"));
  FQ_ASSIGN_OR_RETURN(Regex::Splitter splitter, Regex::Splitter::make(markup, 0));
  std::vector<Span> spans;
  std::vector<int> ids;
  const int size = processor_->GetPieceSize();
  bytes_.resize(static_cast<size_t>(size));
  special_.resize(bytes_.size());
  for (int id = 0; id < size; ++id) {
    const std::string& piece = processor_->IdToPiece(id);
    bool special = processor_->IsControl(id);
    if (!special && (piece.starts_with('<') || piece.starts_with('[')) && is_valid_utf8(piece)) {
      FQ_RETURN_IF_ERROR(splitter.split(piece, spans));
      if (spans.front().matched && processor_->Encode(piece, &ids).ok()) {
        special = std::find(ids.begin(), ids.end(), id) != ids.end();
      }
    }
    special_[static_cast<size_t>(id)] = special;
    if (special) {
      special_texts_.add(piece, id);
    } else {
      bytes_[static_cast<size_t>(id)] = piece_bytes(*processor_, id);
    }
  }
  return {};
}

SentencePieceTokenizer::~SentencePieceTokenizer() = default;

Result<std::vector<TokenId>> SentencePieceTokenizer::encode(std::string_view text,
                                                            bool parse_special) const {
  if (text.size() > kMaxTextBytes) {
    return Error{Code::kInvalidArgument,
                 "a text of " + std::to_string(text.size()) + " bytes, more than the limit of " +
                     std::to_string(kMaxTextBytes),
                 "shorten the text"};
  }
  if (!is_valid_utf8(text)) {
    return Error{Code::kInvalidArgument, "the text is not valid UTF-8", "convert it to UTF-8"};
  }
  return guarded(Code::kInternal, "encoding", [&] { return encode_all(text, parse_special); });
}

Result<std::vector<TokenId>> SentencePieceTokenizer::encode_all(std::string_view text,
                                                                bool parse_special) const {
  std::vector<TokenId> ids;
  std::vector<int> part;
  const auto encode_part = [&](size_t begin, size_t end) -> Status {
    if (begin == end) return {};
    const auto status = processor_->Encode(text.substr(begin, end - begin), &part);
    if (!status.ok()) return Error{Code::kInternal, "SentencePiece: " + status.ToString(), ""};
    ids.insert(ids.end(), part.begin(), part.end());
    return {};
  };
  size_t covered = 0;
  for (size_t i = 0; i < text.size();) {
    int id = 0;
    const size_t length = special_texts_.longest(text, i, id);
    if (length == 0) {
      ++i;
      continue;
    }
    if (parse_special) {
      FQ_RETURN_IF_ERROR(encode_part(covered, i));
      ids.push_back(id);
      covered = i + length;
    } else if (!processor_->IsControl(id)) {
      const size_t cut = i + utf8_length(text[i]);
      FQ_RETURN_IF_ERROR(encode_part(covered, cut));
      covered = cut;
    }
    i += length;
  }
  FQ_RETURN_IF_ERROR(encode_part(covered, text.size()));
  return ids;
}

std::string_view SentencePieceTokenizer::token_bytes(TokenId id) const {
  return id < 0 || id >= vocab_size() ? std::string_view() : bytes_[static_cast<size_t>(id)];
}

std::string SentencePieceTokenizer::decode(std::span<const TokenId> ids) const {
  std::vector<int> known;
  known.reserve(ids.size());
  for (const TokenId id : ids) {
    if (id >= 0 && id < vocab_size() && !special_[static_cast<size_t>(id)]) known.push_back(id);
  }
  std::string text;
  const auto status = processor_->Decode(known, &text);
  return status.ok() ? replace_broken_utf8(text) : std::string();
}

}  // namespace fq::text
