// Reads and applies pre-tokenizers. The semantics are those of Hugging Face tokenizers, which the
// tests compare with word for word.
#include "src/text/pre_tokenizer.h"

#include <algorithm>
#include <map>
#include <utility>

#include "src/text/normalizer.h"
#include "src/text/unicode.h"

namespace fq::text {
namespace {

constexpr int kMaxDepth = 8;
constexpr std::string_view kByteLevelPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr std::string_view kPunctuation = R"([\p{P}!-/:-@\[-`{-~])";

std::string to_byte_alphabet(std::string_view text) {
  const ByteAlphabet& alphabet = ByteAlphabet::get();
  std::string out;
  out.reserve(text.size() + text.size() / 2);
  for (const char c : text) append_utf8(alphabet.character[static_cast<unsigned char>(c)], out);
  return out;
}

Result<SplitBehavior> read_behavior(const ObjectReader& object) {
  static const std::map<std::string, SplitBehavior> kNames = {
      {"Removed", SplitBehavior::kRemoved},
      {"Isolated", SplitBehavior::kIsolated},
      {"MergedWithPrevious", SplitBehavior::kMergedWithPrevious},
      {"MergedWithNext", SplitBehavior::kMergedWithNext},
      {"Contiguous", SplitBehavior::kContiguous}};
  FQ_ASSIGN_OR_RETURN(const std::string name, object.string("behavior"));
  const auto it = kNames.find(name);
  if (it == kNames.end()) return unsupported(object.path("behavior") + ": \"" + name + "\"");
  return it->second;
}

}  // namespace

ByteAlphabet::ByteAlphabet() {
  byte.fill(-1);
  uint16_t next = 0x100;
  for (int b = 0; b < 256; ++b) {
    const bool printable = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
    const auto c = static_cast<uint16_t>(printable ? b : next++);
    character[b] = c;
    byte[c] = static_cast<int16_t>(b);
  }
}

const ByteAlphabet& ByteAlphabet::get() {
  static const ByteAlphabet alphabet;
  return alphabet;
}

std::vector<Span> apply_behavior(std::vector<Span> spans, SplitBehavior behavior) {
  if (behavior == SplitBehavior::kRemoved) return spans;
  std::vector<Span> out;
  out.reserve(spans.size());
  bool previous = false;
  const auto keep = [&](const Span& span) { out.push_back({span.begin, span.end, false}); };
  switch (behavior) {
    case SplitBehavior::kRemoved:
    case SplitBehavior::kIsolated:
      for (const Span& span : spans) keep(span);
      break;
    case SplitBehavior::kContiguous:
      for (const Span& span : spans) {
        if (span.matched == previous && !out.empty()) {
          out.back().end = span.end;
        } else {
          keep(span);
        }
        previous = span.matched;
      }
      break;
    case SplitBehavior::kMergedWithPrevious:
      for (const Span& span : spans) {
        if (span.matched && !previous && !out.empty()) {
          out.back().end = span.end;
        } else {
          keep(span);
        }
        previous = span.matched;
      }
      break;
    case SplitBehavior::kMergedWithNext:
      for (auto span = spans.rbegin(); span != spans.rend(); ++span) {
        if (span->matched && !previous && !out.empty()) {
          out.back().begin = span->begin;
        } else {
          keep(*span);
        }
        previous = span->matched;
      }
      std::reverse(out.begin(), out.end());
      break;
  }
  return out;
}

Result<PreTokenizer> PreTokenizer::read(const Json* value) {
  PreTokenizer pre_tokenizer;
  if (value != nullptr) FQ_RETURN_IF_ERROR(pre_tokenizer.add(*value, "pre_tokenizer", 0));
  return pre_tokenizer;
}

Status PreTokenizer::add(const Json& value, const std::string& where, int depth) {
  FQ_ASSIGN_OR_RETURN(const ObjectReader object, ObjectReader::of(value, where));
  FQ_ASSIGN_OR_RETURN(const std::string type, object.string("type"));
  if (steps_.size() > 32) return unsupported(where + ": more than 32 pre-tokenizers");
  if (type == "ByteLevel") return add_byte_level(object);
  if (type == "Split") return add_split(object);
  if (type == "Metaspace") return add_metaspace(object);
  if (type == "Digits") {
    FQ_RETURN_IF_ERROR(object.allow_only({"type", "individual_digits"}));
    FQ_ASSIGN_OR_RETURN(const bool individual, object.boolean("individual_digits"));
    return add_split(individual ? R"(\p{N})" : R"(\p{N}+)", SplitBehavior::kIsolated, false, where);
  }
  if (type == "Whitespace") {
    FQ_RETURN_IF_ERROR(object.allow_only({"type"}));
    return add_split(R"(\w+|[^\w\s]+)", SplitBehavior::kRemoved, true, where);
  }
  if (type == "WhitespaceSplit") {
    FQ_RETURN_IF_ERROR(object.allow_only({"type"}));
    return add_split(R"(\s)", SplitBehavior::kRemoved, false, where);
  }
  if (type == "Punctuation") {
    FQ_RETURN_IF_ERROR(object.allow_only({"type", "behavior"}));
    SplitBehavior behavior = SplitBehavior::kIsolated;
    if (object.find("behavior") != nullptr) {
      FQ_ASSIGN_OR_RETURN(behavior, read_behavior(object));
    }
    return add_split(kPunctuation, behavior, false, where);
  }
  if (type == "Sequence") {
    FQ_RETURN_IF_ERROR(object.allow_only({"type", "pretokenizers"}));
    FQ_ASSIGN_OR_RETURN(const Json* parts, object.member("pretokenizers"));
    if (!parts->is_array()) return corrupt(object.path("pretokenizers") + ": expected an array");
    if (depth >= kMaxDepth) return unsupported(where + ": sequences nested too deeply");
    size_t index = 0;
    for (const Json& part : *parts) {
      FQ_RETURN_IF_ERROR(
          add(part, object.path("pretokenizers") + "[" + std::to_string(index++) + "]", depth + 1));
    }
    return {};
  }
  return unsupported(where + ": pre-tokenizer \"" + type + "\"");
}

Status PreTokenizer::add_byte_level(const ObjectReader& object) {
  FQ_RETURN_IF_ERROR(object.allow_only({"type", "add_prefix_space", "trim_offsets", "use_regex"}));
  FQ_ASSIGN_OR_RETURN(const bool prefix, object.boolean("add_prefix_space"));
  FQ_ASSIGN_OR_RETURN(const bool use_regex, object.boolean_or("use_regex", true));
  if (prefix) steps_.emplace_back(SpacePrefix{});
  if (use_regex) {
    FQ_RETURN_IF_ERROR(
        add_split(kByteLevelPattern, SplitBehavior::kIsolated, false, object.where()));
  }
  steps_.emplace_back(ToByteAlphabet{});
  return {};
}

Status PreTokenizer::add_split(const ObjectReader& object) {
  FQ_RETURN_IF_ERROR(object.allow_only({"type", "pattern", "behavior", "invert"}));
  FQ_ASSIGN_OR_RETURN(const Json* pattern, object.member("pattern"));
  FQ_ASSIGN_OR_RETURN(Regex regex, read_pattern(*pattern, object.path("pattern")));
  FQ_ASSIGN_OR_RETURN(const SplitBehavior behavior, read_behavior(object));
  FQ_ASSIGN_OR_RETURN(const bool invert, object.boolean_or("invert", false));
  steps_.emplace_back(Split{std::move(regex), behavior, invert});
  return {};
}

Status PreTokenizer::add_split(std::string_view pattern, SplitBehavior behavior, bool invert,
                               const std::string& where) {
  FQ_ASSIGN_OR_RETURN(Regex regex, Regex::compile(pattern, where));
  steps_.emplace_back(Split{std::move(regex), behavior, invert});
  return {};
}

Status PreTokenizer::add_metaspace(const ObjectReader& object) {
  FQ_RETURN_IF_ERROR(object.allow_only(
      {"type", "replacement", "add_prefix_space", "prepend_scheme", "split", "str_rep"}));
  SpaceMark step;
  FQ_ASSIGN_OR_RETURN(step.mark, object.string("replacement"));
  if (step.mark.empty() || utf8_length(step.mark[0]) != step.mark.size()) {
    return corrupt(object.path("replacement") + ": expected one character");
  }
  FQ_ASSIGN_OR_RETURN(const bool prefix, object.boolean_or("add_prefix_space", true));
  FQ_ASSIGN_OR_RETURN(const std::string scheme,
                      object.string_or("prepend_scheme", prefix ? "always" : "never"));
  static const std::map<std::string, PrependScheme> kNames = {{"always", PrependScheme::kAlways},
                                                              {"first", PrependScheme::kFirst},
                                                              {"never", PrependScheme::kNever}};
  const auto it = kNames.find(scheme);
  if (it == kNames.end()) {
    return unsupported(object.path("prepend_scheme") + ": \"" + scheme + "\"");
  }
  step.prepend = it->second;
  if (!prefix && step.prepend != PrependScheme::kNever) {
    return corrupt(object.where() + ": add_prefix_space contradicts prepend_scheme");
  }
  FQ_ASSIGN_OR_RETURN(const bool split, object.boolean_or("split", true));
  const std::string mark = step.mark;
  steps_.emplace_back(std::move(step));
  if (split) {
    FQ_ASSIGN_OR_RETURN(Regex regex, Regex::literal(mark, object.where()));
    steps_.emplace_back(Split{std::move(regex), SplitBehavior::kMergedWithNext, false});
  }
  return {};
}

Status PreTokenizer::apply(std::vector<Word>& words) const {
  for (const Step& step : steps_) {
    if (const auto* split = std::get_if<Split>(&step)) {
      FQ_RETURN_IF_ERROR(apply_split(*split, words));
    } else if (std::holds_alternative<SpacePrefix>(step)) {
      for (Word& word : words) {
        if (!word.text.starts_with(' ')) word.text.insert(0, 1, ' ');
      }
    } else if (const auto* mark = std::get_if<SpaceMark>(&step)) {
      apply_space_mark(*mark, words);
    } else {
      for (Word& word : words) word.text = to_byte_alphabet(word.text);
    }
  }
  return {};
}

Status PreTokenizer::apply_split(const Split& split, std::vector<Word>& words) {
  size_t bytes = 0;
  for (const Word& word : words) bytes += word.text.size();
  FQ_ASSIGN_OR_RETURN(Regex::Splitter splitter, Regex::Splitter::make(split.pattern, bytes));
  std::vector<Word> out;
  out.reserve(words.size() + bytes / 4);
  std::vector<Span> spans;
  for (const Word& word : words) {
    FQ_RETURN_IF_ERROR(splitter.split(word.text, spans));
    if (split.invert) {
      for (Span& span : spans) span.matched = !span.matched;
    }
    if (split.behavior != SplitBehavior::kIsolated) {
      spans = apply_behavior(std::move(spans), split.behavior);
    }
    const bool drop = split.behavior == SplitBehavior::kRemoved;
    for (const Span& span : spans) {
      if (span.begin == span.end || (drop && span.matched)) continue;
      out.push_back(
          {word.text.substr(span.begin, span.end - span.begin), word.at_start && span.begin == 0});
    }
  }
  words = std::move(out);
  return {};
}

void PreTokenizer::apply_space_mark(const SpaceMark& step, std::vector<Word>& words) {
  for (Word& word : words) {
    std::string out;
    out.reserve(word.text.size() + 8);
    for (const char c : word.text) {
      if (c == ' ') {
        out += step.mark;
      } else {
        out += c;
      }
    }
    const bool wanted = step.prepend == PrependScheme::kAlways ||
                        (step.prepend == PrependScheme::kFirst && word.at_start);
    if (wanted && !out.starts_with(step.mark)) out.insert(0, step.mark);
    word.text = std::move(out);
  }
}

}  // namespace fq::text
