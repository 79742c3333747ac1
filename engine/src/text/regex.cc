// PCRE2 behind Regex: compiled once, matched with bounded steps and heap.
// Compiled code is shared read-only; match data belongs to a Splitter, so to one thread.
#include "src/text/regex.h"

#ifndef PCRE2_CODE_UNIT_WIDTH
#define PCRE2_CODE_UNIT_WIDTH 8
#endif
#include <pcre2.h>

#include <array>
#include <cctype>
#include <utility>

#include "src/text/json_file.h"
#include "src/text/unicode.h"

namespace fq::text {
namespace {

// Bounds on backtracking, so that a hostile pattern ends with an error instead of running for ever:
// the work on a text grows no faster than its length. An ordinary match takes a few steps. One that
// needs more than kCheapSteps is repeated with larger limits, which are paid from a budget: a run
// of a million spaces rightly takes some million steps.
constexpr uint32_t kCheapSteps = 1000;
constexpr uint64_t kDearGrowth = 8;
constexpr uint64_t kBudget = 1'000'000;
constexpr uint64_t kBudgetPerByte = 64;
constexpr uint32_t kHeapKilobytes = 512 * 1024;

}  // namespace

struct Regex::Compiled {
  std::unique_ptr<pcre2_code, decltype(&pcre2_code_free)> code{nullptr, &pcre2_code_free};
};

Regex::Regex(std::unique_ptr<Compiled> compiled) : compiled_(std::move(compiled)) {}
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;
Regex::~Regex() = default;

Result<Regex> Regex::compile(std::string_view pattern, const std::string& where) {
  FQ_ASSIGN_OR_RETURN(const std::string translated, translate_pattern(pattern, where));
  const std::unique_ptr<pcre2_compile_context, decltype(&pcre2_compile_context_free)> context(
      pcre2_compile_context_create(nullptr), &pcre2_compile_context_free);
  if (context == nullptr) return Error{Code::kOutOfMemory, "regular expression", ""};
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  pcre2_set_parens_nest_limit(context.get(), 50);
  int code = 0;
  PCRE2_SIZE offset = 0;
  auto compiled = std::make_unique<Compiled>();
  compiled->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()),
                                     translated.size(), PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE,
                                     &code, &offset, context.get()));
  if (compiled->code == nullptr) {
    std::array<PCRE2_UCHAR, 128> text{};
    pcre2_get_error_message(code, text.data(), text.size());
    return unsupported(where + ": regular expression \"" + std::string(pattern) +
                       "\": " + reinterpret_cast<const char*>(text.data()));
  }
  return Regex(std::move(compiled));
}

Result<Regex> Regex::literal(std::string_view text, const std::string& where) {
  if (text.empty()) return unsupported(where + ": an empty pattern");
  std::string pattern;
  for (const char c : text) {
    if (static_cast<unsigned char>(c) < 0x80 && std::isalnum(static_cast<unsigned char>(c)) == 0) {
      // A code point in hexadecimal cannot be mistaken for an operator.
      static constexpr std::string_view kHex = "0123456789ABCDEF";
      pattern += "\\x";
      pattern += kHex[static_cast<unsigned char>(c) >> 4];
      pattern += kHex[c & 15];
    } else {
      pattern += c;
    }
  }
  return compile(pattern, where);
}

struct Regex::Splitter::State {
  const pcre2_code* code = nullptr;
  std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match{nullptr,
                                                                            &pcre2_match_data_free};
  std::unique_ptr<pcre2_match_context, decltype(&pcre2_match_context_free)> context{
      nullptr, &pcre2_match_context_free};
  uint64_t budget = 0;

  int run(std::string_view text, size_t start) {
    int result = attempt(text, start, 0, kCheapSteps);
    if (result != PCRE2_ERROR_MATCHLIMIT) return result;
    // The limit is one of each starting place; find the place that needs more.
    for (size_t place = start; place <= text.size();) {
      result = attempt(text, place, PCRE2_ANCHORED, kCheapSteps);
      for (uint64_t steps = kCheapSteps * kDearGrowth; result == PCRE2_ERROR_MATCHLIMIT;
           steps *= kDearGrowth) {
        if (steps > budget || steps > UINT32_MAX) return result;
        budget -= steps;
        result = attempt(text, place, PCRE2_ANCHORED, static_cast<uint32_t>(steps));
      }
      if (result != PCRE2_ERROR_NOMATCH) return result;
      place += place < text.size() ? utf8_length(text[place]) : 1;
    }
    return PCRE2_ERROR_NOMATCH;
  }

  int attempt(std::string_view text, size_t start, uint32_t options, uint32_t steps) {
    pcre2_set_match_limit(context.get(), steps);
    return pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), start,
                       PCRE2_NO_UTF_CHECK | options, match.get(), context.get());
  }
};

Regex::Splitter::Splitter(std::unique_ptr<State> state) : state_(std::move(state)) {}
Regex::Splitter::Splitter(Splitter&&) noexcept = default;
Regex::Splitter::~Splitter() = default;

Result<Regex::Splitter> Regex::Splitter::make(const Regex& regex, size_t total_bytes) {
  auto state = std::make_unique<State>();
  state->code = regex.compiled_->code.get();
  state->match.reset(pcre2_match_data_create(1, nullptr));
  state->context.reset(pcre2_match_context_create(nullptr));
  if (state->match == nullptr || state->context == nullptr) {
    return Error{Code::kOutOfMemory, "regular expression", ""};
  }
  pcre2_set_heap_limit(state->context.get(), kHeapKilobytes);
  state->budget = kBudget + kBudgetPerByte * total_bytes;
  return Splitter(std::move(state));
}

Status Regex::Splitter::split(std::string_view text, std::vector<Span>& spans) {
  spans.clear();
  size_t covered = 0;          // everything before is in spans
  size_t search = 0;           // where the next search starts
  size_t last_end = SIZE_MAX;  // an empty match right after a match does not count
  while (search <= text.size()) {
    const int result = state_->run(text, search);
    if (result == PCRE2_ERROR_NOMATCH) break;
    if (result == PCRE2_ERROR_MATCHLIMIT || result == PCRE2_ERROR_HEAPLIMIT) {
      return Error{Code::kInvalidArgument,
                   "the tokenizer's regular expression needs too much work on this text",
                   "shorten the text; if it is ordinary text, please report the model"};
    }
    if (result < 0) {
      return Error{Code::kInternal, "PCRE2 error " + std::to_string(result), ""};
    }
    const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(state_->match.get());
    const size_t begin = bounds[0], end = bounds[1];
    if (begin == end) {
      search = end < text.size() ? end + utf8_length(text[end]) : end + 1;
      if (end == last_end) continue;
    } else {
      search = end;
    }
    last_end = end;
    if (covered < begin) spans.push_back({covered, begin, false});
    spans.push_back({begin, end, true});
    covered = end;
  }
  if (covered < text.size()) spans.push_back({covered, text.size(), false});
  return {};
}

}  // namespace fq::text
