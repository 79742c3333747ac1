// Reads and applies the normalizers whose effect is exactly known; others are refused by name.
#include "src/text/normalizer.h"

#include <map>
#include <utility>

namespace fq::text {
namespace {

constexpr int kMaxDepth = 8;
// A replacement may be longer than what it replaces, and steps multiply.
constexpr size_t kMaxGrowth = 64;

Result<std::string> replace_matches(const Regex& pattern, std::string_view content,
                                    std::string_view text) {
  FQ_ASSIGN_OR_RETURN(Regex::Splitter splitter, Regex::Splitter::make(pattern, text.size()));
  std::vector<Span> spans;
  FQ_RETURN_IF_ERROR(splitter.split(text, spans));
  std::string out;
  out.reserve(text.size());
  for (const Span& span : spans) {
    out += span.matched ? content : text.substr(span.begin, span.end - span.begin);
  }
  return out;
}

}  // namespace

Result<Regex> read_pattern(const Json& value, const std::string& where) {
  FQ_ASSIGN_OR_RETURN(const ObjectReader object, ObjectReader::of(value, where));
  FQ_RETURN_IF_ERROR(object.allow_only({"String", "Regex"}));
  if (value.size() != 1) return corrupt(where + ": expected one of \"String\" and \"Regex\"");
  if (object.find("Regex") != nullptr) {
    FQ_ASSIGN_OR_RETURN(const std::string pattern, object.string("Regex"));
    return Regex::compile(pattern, where);
  }
  FQ_ASSIGN_OR_RETURN(const std::string text, object.string("String"));
  return Regex::literal(text, where);
}

Result<Normalizer> Normalizer::read(const Json* value) {
  Normalizer normalizer;
  if (value != nullptr) FQ_RETURN_IF_ERROR(normalizer.add(*value, "normalizer", 0));
  return normalizer;
}

Status Normalizer::add(const Json& value, const std::string& where, int depth) {
  FQ_ASSIGN_OR_RETURN(const ObjectReader object, ObjectReader::of(value, where));
  FQ_ASSIGN_OR_RETURN(const std::string type, object.string("type"));
  static const std::map<std::string, NormalForm> kForms = {{"NFC", NormalForm::kNfc},
                                                           {"NFD", NormalForm::kNfd},
                                                           {"NFKC", NormalForm::kNfkc},
                                                           {"NFKD", NormalForm::kNfkd}};
  if (const auto form = kForms.find(type); form != kForms.end()) {
    FQ_RETURN_IF_ERROR(object.allow_only({"type"}));
    steps_.emplace_back(form->second);
  } else if (type == "Prepend") {
    FQ_RETURN_IF_ERROR(object.allow_only({"type", "prepend"}));
    FQ_ASSIGN_OR_RETURN(std::string text, object.string("prepend"));
    steps_.emplace_back(Prepend{std::move(text)});
  } else if (type == "Replace") {
    FQ_RETURN_IF_ERROR(object.allow_only({"type", "pattern", "content"}));
    FQ_ASSIGN_OR_RETURN(const Json* pattern, object.member("pattern"));
    FQ_ASSIGN_OR_RETURN(Regex regex, read_pattern(*pattern, object.path("pattern")));
    FQ_ASSIGN_OR_RETURN(std::string content, object.string("content"));
    if (content.size() > kMaxGrowth) {
      return unsupported(where + ": a replacement longer than " + std::to_string(kMaxGrowth) +
                         " bytes");
    }
    steps_.emplace_back(Replace{std::move(regex), std::move(content)});
  } else if (type == "Sequence") {
    FQ_RETURN_IF_ERROR(object.allow_only({"type", "normalizers"}));
    FQ_ASSIGN_OR_RETURN(const Json* parts, object.member("normalizers"));
    if (!parts->is_array()) return corrupt(object.path("normalizers") + ": expected an array");
    if (depth >= kMaxDepth) return unsupported(where + ": sequences nested too deeply");
    size_t index = 0;
    for (const Json& part : *parts) {
      FQ_RETURN_IF_ERROR(
          add(part, object.path("normalizers") + "[" + std::to_string(index++) + "]", depth + 1));
    }
  } else {
    return unsupported(where + ": normalizer \"" + type + "\"");
  }
  if (steps_.size() > 16) return unsupported(where + ": more than 16 normalizers");
  return {};
}

Result<std::string> Normalizer::apply(std::string text) const {
  const size_t limit = (text.size() + 64) * kMaxGrowth;
  for (const Step& step : steps_) {
    if (const auto* form = std::get_if<NormalForm>(&step)) {
      FQ_ASSIGN_OR_RETURN(text, normalize(text, *form));
    } else if (const auto* prepend = std::get_if<Prepend>(&step)) {
      if (!text.empty()) text.insert(0, prepend->text);
    } else if (const auto* replace = std::get_if<Replace>(&step)) {
      FQ_ASSIGN_OR_RETURN(text, replace_matches(replace->pattern, replace->content, text));
    }
    if (text.size() > limit) {
      return Error{Code::kInvalidArgument, "the tokenizer's normalizer makes this text too long",
                   ""};
    }
  }
  return text;
}

}  // namespace fq::text
