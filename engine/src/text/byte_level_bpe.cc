// Puts the parts of a tokenizer.json together in the order of the reference: added tokens in the
// raw text, normalizer, added tokens in the normalized text, pre-tokenizer, BPE.
#include "src/text/byte_level_bpe.h"

#include <algorithm>
#include <utility>

#include "src/text/guard.h"
#include "src/text/json_file.h"
#include "src/text/unicode.h"

namespace fq::text {

Result<std::shared_ptr<const Tokenizer>> ByteLevelBpe::parse(std::string_view json) {
  FQ_ASSIGN_OR_RETURN(const Json value, parse_json(json, "tokenizer.json"));
  FQ_ASSIGN_OR_RETURN(const ObjectReader object, ObjectReader::of(value, "tokenizer.json"));
  FQ_RETURN_IF_ERROR(
      object.allow_only({"version", "truncation", "padding", "added_tokens", "normalizer",
                         "pre_tokenizer", "post_processor", "decoder", "model"}));
  FQ_ASSIGN_OR_RETURN(const std::string version, object.string_or("version", "1.0"));
  if (version != "1.0") return unsupported("tokenizer.json version \"" + version + "\"");
  FQ_ASSIGN_OR_RETURN(Normalizer normalizer, Normalizer::read(object.find("normalizer")));
  FQ_ASSIGN_OR_RETURN(PreTokenizer pre_tokenizer, PreTokenizer::read(object.find("pre_tokenizer")));
  FQ_ASSIGN_OR_RETURN(Decoder decoder, Decoder::read(object.find("decoder")));
  FQ_ASSIGN_OR_RETURN(const Json* model_json, object.member("model"));
  FQ_ASSIGN_OR_RETURN(BpeModel model, BpeModel::read(*model_json));
  FQ_ASSIGN_OR_RETURN(AddedTokens added,
                      AddedTokens::read(object.find("added_tokens"), model, normalizer));
  return std::shared_ptr<const Tokenizer>(new ByteLevelBpe(std::move(model), std::move(normalizer),
                                                           std::move(pre_tokenizer),
                                                           std::move(decoder), std::move(added)));
}

ByteLevelBpe::ByteLevelBpe(BpeModel model, Normalizer normalizer, PreTokenizer pre_tokenizer,
                           Decoder decoder, AddedTokens added)
    : model_(std::move(model)),
      normalizer_(std::move(normalizer)),
      pre_tokenizer_(std::move(pre_tokenizer)),
      decoder_(std::move(decoder)),
      added_(std::move(added)) {
  int size = model_.size();
  for (const AddedToken& token : added_.tokens()) size = std::max(size, token.id + 1);
  entries_.resize(static_cast<size_t>(size));
  for (TokenId id = 0; id < model_.size(); ++id) {
    if (const auto token = model_.token(id)) {
      entries_[static_cast<size_t>(id)] = {std::string(*token), decoder_.token_bytes(*token), true,
                                           false};
    }
  }
  for (const AddedToken& token : added_.tokens()) {
    entries_[static_cast<size_t>(token.id)] = {
        token.decoded, token.special ? "" : decoder_.token_bytes(token.decoded), true,
        token.special};
  }
}

Result<std::vector<TokenId>> ByteLevelBpe::encode(std::string_view text, bool parse_special) const {
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

Result<std::vector<TokenId>> ByteLevelBpe::encode_all(std::string_view text,
                                                      bool parse_special) const {
  std::vector<TokenId> ids;
  BpeModel::Workspace workspace;
  for (const Segment& raw : added_.split(text, /*normalized=*/false, parse_special)) {
    if (raw.token >= 0) {
      ids.push_back(raw.token);
      continue;
    }
    FQ_ASSIGN_OR_RETURN(
        const std::string normal,
        normalizer_.apply(std::string(text.substr(raw.begin, raw.end - raw.begin))));
    for (const Segment& segment : added_.split(normal, /*normalized=*/true, parse_special)) {
      if (segment.token >= 0) {
        ids.push_back(segment.token);
        continue;
      }
      FQ_RETURN_IF_ERROR(
          encode_text(std::string_view(normal).substr(segment.begin, segment.end - segment.begin),
                      raw.begin == 0 && segment.begin == 0, workspace, ids));
    }
  }
  return ids;
}

Status ByteLevelBpe::encode_text(std::string_view text, bool at_start,
                                 BpeModel::Workspace& workspace, std::vector<TokenId>& out) const {
  std::vector<Word> words = {{std::string(text), at_start}};
  FQ_RETURN_IF_ERROR(pre_tokenizer_.apply(words));
  for (const Word& word : words) model_.encode(word.text, workspace, out);
  return {};
}

std::string_view ByteLevelBpe::token_bytes(TokenId id) const {
  return id < 0 || id >= vocab_size() ? std::string_view()
                                      : entries_[static_cast<size_t>(id)].bytes;
}

std::string ByteLevelBpe::decode(std::span<const TokenId> ids) const {
  std::vector<std::string> tokens;
  tokens.reserve(ids.size());
  for (const TokenId id : ids) {
    if (id < 0 || id >= vocab_size()) continue;
    const Entry& entry = entries_[static_cast<size_t>(id)];
    if (entry.used && !entry.special) tokens.push_back(entry.token);
  }
  return decoder_.decode(std::move(tokens));
}

}  // namespace fq::text
