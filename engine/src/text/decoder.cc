// Decoding steps with the effect that Hugging Face tokenizers gives them.
#include "src/text/decoder.h"

#include <algorithm>
#include <utility>

#include "src/text/pre_tokenizer.h"
#include "src/text/unicode.h"

namespace fq::text {
namespace {

constexpr int kMaxDepth = 8;

std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  std::string out;
  size_t position = 0;
  for (size_t hit; (hit = text.find(from, position)) != std::string_view::npos;
       position = hit + from.size()) {
    out += text.substr(position, hit - position);
    out += to;
  }
  out += text.substr(position);
  return out;
}

// The bytes behind characters of the byte alphabet; a token with any other character is its own
// text.
std::string from_byte_alphabet(std::string_view token) {
  const ByteAlphabet& alphabet = ByteAlphabet::get();
  std::string out;
  for (size_t i = 0; i < token.size();) {
    const Utf8Unit unit = utf8_unit(token, i);
    if (!unit.valid || unit.code_point >= alphabet.byte.size() ||
        alphabet.byte[unit.code_point] < 0) {
      return std::string(token);
    }
    out += static_cast<char>(alphabet.byte[unit.code_point]);
    i += unit.bytes;
  }
  return out;
}

// The value of "<0xHH>", or -1.
int byte_of(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || !token.ends_with('>')) return -1;
  int value = 0;
  for (const char c : token.substr(3, 2)) {
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                             : -1;
    if (digit < 0) return -1;
    value = value * 16 + digit;
  }
  return value;
}

// Runs of byte tokens become text; a run that is no text becomes one U+FFFD for each byte.
std::vector<std::string> join_bytes(std::vector<std::string> tokens) {
  std::vector<std::string> out;
  std::string run;
  const auto flush = [&] {
    if (run.empty()) return;
    if (is_valid_utf8(run)) {
      out.push_back(run);
    } else {
      out.insert(out.end(), run.size(), "\xEF\xBF\xBD");
    }
    run.clear();
  };
  for (std::string& token : tokens) {
    const int byte = byte_of(token);
    if (byte >= 0) {
      run += static_cast<char>(byte);
    } else {
      flush();
      out.push_back(std::move(token));
    }
  }
  flush();
  return out;
}

std::string join(const std::vector<std::string>& tokens) {
  std::string out;
  for (const std::string& token : tokens) out += token;
  return out;
}

std::string strip(std::string_view text, std::string_view character, int start, int stop) {
  for (int i = 0; i < start && text.starts_with(character); ++i) {
    text.remove_prefix(character.size());
  }
  for (int i = 0; i < stop && text.ends_with(character); ++i) {
    text.remove_suffix(character.size());
  }
  return std::string(text);
}

Status read_character(const ObjectReader& object, const char* key, std::string& out) {
  FQ_ASSIGN_OR_RETURN(out, object.string(key));
  if (out.empty() || utf8_length(out[0]) != out.size()) {
    return corrupt(object.path(key) + ": expected one character");
  }
  return {};
}

}  // namespace

Result<Decoder> Decoder::read(const Json* value) {
  if (value == nullptr) return unsupported("decoder is null: tokens would be joined by spaces");
  Decoder decoder;
  FQ_RETURN_IF_ERROR(decoder.add(*value, "decoder", 0));
  return decoder;
}

Status Decoder::add(const Json& value, const std::string& where, int depth) {
  FQ_ASSIGN_OR_RETURN(const ObjectReader object, ObjectReader::of(value, where));
  FQ_ASSIGN_OR_RETURN(const std::string type, object.string("type"));
  if (steps_.size() > 16) return unsupported(where + ": more than 16 decoders");
  if (type == "ByteLevel") {
    FQ_RETURN_IF_ERROR(
        object.allow_only({"type", "add_prefix_space", "trim_offsets", "use_regex"}));
    steps_.emplace_back(ByteLevel{});
  } else if (type == "ByteFallback") {
    FQ_RETURN_IF_ERROR(object.allow_only({"type"}));
    steps_.emplace_back(ByteFallback{});
  } else if (type == "Fuse") {
    FQ_RETURN_IF_ERROR(object.allow_only({"type"}));
    steps_.emplace_back(Fuse{});
  } else if (type == "Replace") {
    FQ_RETURN_IF_ERROR(object.allow_only({"type", "pattern", "content"}));
    FQ_ASSIGN_OR_RETURN(const Json* pattern, object.member("pattern"));
    FQ_ASSIGN_OR_RETURN(const ObjectReader kind,
                        ObjectReader::of(*pattern, object.path("pattern")));
    FQ_RETURN_IF_ERROR(kind.allow_only({"String"}));
    Replace step;
    FQ_ASSIGN_OR_RETURN(step.pattern, kind.string("String"));
    FQ_ASSIGN_OR_RETURN(step.content, object.string("content"));
    if (step.pattern.empty()) return unsupported(where + ": an empty pattern");
    if (step.content.size() > 64) return unsupported(where + ": a replacement of over 64 bytes");
    steps_.emplace_back(std::move(step));
  } else if (type == "Strip") {
    FQ_RETURN_IF_ERROR(object.allow_only({"type", "content", "start", "stop"}));
    Strip step;
    FQ_RETURN_IF_ERROR(read_character(object, "content", step.content));
    FQ_ASSIGN_OR_RETURN(step.start, object.integer("start", 0, 1 << 20));
    FQ_ASSIGN_OR_RETURN(step.stop, object.integer("stop", 0, 1 << 20));
    steps_.emplace_back(std::move(step));
  } else if (type == "Metaspace") {
    FQ_RETURN_IF_ERROR(object.allow_only(
        {"type", "replacement", "add_prefix_space", "prepend_scheme", "split", "str_rep"}));
    Metaspace step;
    FQ_RETURN_IF_ERROR(read_character(object, "replacement", step.mark));
    FQ_ASSIGN_OR_RETURN(const bool prefix, object.boolean_or("add_prefix_space", true));
    FQ_ASSIGN_OR_RETURN(const std::string scheme,
                        object.string_or("prepend_scheme", prefix ? "always" : "never"));
    step.drop_first = scheme != "never";
    steps_.emplace_back(std::move(step));
  } else if (type == "Sequence") {
    FQ_RETURN_IF_ERROR(object.allow_only({"type", "decoders"}));
    FQ_ASSIGN_OR_RETURN(const Json* parts, object.member("decoders"));
    if (!parts->is_array()) return corrupt(object.path("decoders") + ": expected an array");
    if (depth >= kMaxDepth) return unsupported(where + ": sequences nested too deeply");
    size_t index = 0;
    for (const Json& part : *parts) {
      FQ_RETURN_IF_ERROR(
          add(part, object.path("decoders") + "[" + std::to_string(index++) + "]", depth + 1));
    }
  } else {
    return unsupported(where + ": decoder \"" + type + "\"");
  }
  return {};
}

std::string Decoder::decode(std::vector<std::string> tokens) const {
  for (const Step& step : steps_) {
    if (std::holds_alternative<ByteLevel>(step)) {
      std::string bytes;
      for (const std::string& token : tokens) bytes += from_byte_alphabet(token);
      tokens.assign(1, replace_broken_utf8(bytes));
    } else if (std::holds_alternative<ByteFallback>(step)) {
      tokens = join_bytes(std::move(tokens));
    } else if (std::holds_alternative<Fuse>(step)) {
      tokens.assign(1, join(tokens));
    } else if (const auto* replace = std::get_if<Replace>(&step)) {
      for (std::string& token : tokens) {
        token = replace_all(token, replace->pattern, replace->content);
      }
    } else if (const auto* cut = std::get_if<Strip>(&step)) {
      for (std::string& token : tokens) token = strip(token, cut->content, cut->start, cut->stop);
    } else if (const auto* mark = std::get_if<Metaspace>(&step)) {
      for (size_t i = 0; i < tokens.size(); ++i) {
        const bool drop = i == 0 && mark->drop_first;
        tokens[i] = replace_all(tokens[i], mark->mark, drop ? "" : " ");
      }
    }
  }
  return join(tokens);
}

std::string Decoder::token_bytes(std::string_view token) const {
  std::string text(token);
  bool whole_text = false;
  for (const Step& step : steps_) {
    if (std::holds_alternative<ByteLevel>(step)) {
      text = from_byte_alphabet(text);
      whole_text = true;
    } else if (std::holds_alternative<ByteFallback>(step)) {
      if (const int byte = byte_of(text); byte >= 0) return std::string(1, static_cast<char>(byte));
    } else if (std::holds_alternative<Fuse>(step)) {
      whole_text = true;
    } else if (const auto* replace = std::get_if<Replace>(&step)) {
      text = replace_all(text, replace->pattern, replace->content);
    } else if (const auto* cut = std::get_if<Strip>(&step)) {
      if (!whole_text) text = strip(text, cut->content, cut->start, cut->stop);
    } else if (const auto* mark = std::get_if<Metaspace>(&step)) {
      text = replace_all(text, mark->mark, " ");
    }
  }
  return text;
}

}  // namespace fq::text
