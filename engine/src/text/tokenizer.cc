// Opens the tokenizer of a model directory and holds what all tokenizers share. No state. Any
// thread.
#include "framequilt/tokenizer.h"

#include "src/text/byte_level_bpe.h"
#include "src/text/guard.h"
#include "src/text/json_file.h"
#include "src/text/sentencepiece_tokenizer.h"
#include "src/text/unicode.h"

namespace fq {
namespace {

constexpr size_t kMaxConfigBytes = size_t{16} << 20;

Result<std::shared_ptr<const Tokenizer>> open_checked(const std::filesystem::path& directory) {
  using text::ObjectReader;
  // Only the tokenizer's two keys are looked at: what the rest of the config means is the loader's
  // business.
  FQ_ASSIGN_OR_RETURN(const std::string config_text,
                      text::read_file(directory / "config.json", kMaxConfigBytes));
  FQ_ASSIGN_OR_RETURN(const text::Json config, text::parse_json(config_text, "config.json"));
  FQ_ASSIGN_OR_RETURN(const ObjectReader root, ObjectReader::of(config, "config.json"));
  FQ_ASSIGN_OR_RETURN(const text::Json* tokens_json, root.member("tokens"));
  FQ_ASSIGN_OR_RETURN(const ObjectReader tokens, ObjectReader::of(*tokens_json, "tokens"));
  FQ_ASSIGN_OR_RETURN(const text::Json* tokenizer_json, tokens.member("tokenizer"));
  FQ_ASSIGN_OR_RETURN(const ObjectReader tokenizer,
                      ObjectReader::of(*tokenizer_json, "tokens.tokenizer"));
  FQ_ASSIGN_OR_RETURN(const std::string kind, tokenizer.string("kind"));
  FQ_ASSIGN_OR_RETURN(const std::string file, tokenizer.string("file"));
  const std::filesystem::path name(file);
  if (file.find('\0') != std::string::npos || name != name.filename() || file == "." ||
      file == ".." || file.empty()) {
    return text::corrupt("tokens.tokenizer.file \"" + file + "\" is not a plain file name");
  }
  if (kind != "huggingface" && kind != "sentencepiece") {
    return text::unsupported("tokens.tokenizer.kind \"" + kind +
                             "\"; there are huggingface and sentencepiece");
  }
  FQ_ASSIGN_OR_RETURN(const std::string content,
                      text::read_file(directory / name, text::kMaxFileBytes));
  return kind == "huggingface" ? text::ByteLevelBpe::parse(content)
                               : text::SentencePieceTokenizer::parse(content);
}

}  // namespace

Result<std::shared_ptr<const Tokenizer>> Tokenizer::open(
    const std::filesystem::path& model_directory) {
  return text::guarded(Code::kInternal, "opening the tokenizer",
                       [&] { return open_checked(model_directory); });
}

std::string Tokenizer::decode(std::span<const TokenId> ids) const {
  std::string bytes;
  for (const TokenId id : ids) bytes += token_bytes(id);
  return text::replace_broken_utf8(bytes);
}

}  // namespace fq
