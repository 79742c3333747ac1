// The regular expressions of tokenizer.json (Oniguruma's dialect, as Hugging Face tokenizers runs
// them), carried out by PCRE2 with bounded work. A Regex owns its compiled code and is immutable; a
// Splitter belongs to one thread and must not outlive its Regex.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "framequilt/status.h"

namespace fq::text {

// A part of a text, and whether the pattern matched it.
struct Span {
  size_t begin = 0, end = 0;
  bool matched = false;
};

class Regex {
 public:
  // `where` names the pattern in errors. Errors: unsupported (a construct that the two dialects
  // read differently, or that PCRE2 refuses), out_of_memory.
  static Result<Regex> compile(std::string_view pattern, const std::string& where);
  // A pattern that matches exactly this text.
  static Result<Regex> literal(std::string_view text, const std::string& where);

  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;
  ~Regex();

  class Splitter {
   public:
    // `total_bytes` of text will be split; the work allowed grows with it.
    static Result<Splitter> make(const Regex& regex, size_t total_bytes);
    Splitter(Splitter&&) noexcept;
    ~Splitter();
    // Covers valid UTF-8 `text` with spans, matches and what lies between them; an empty match
    // makes an empty span. Errors: invalid_argument when the pattern needs too much work on this
    // text.
    Status split(std::string_view text, std::vector<Span>& spans);

   private:
    struct State;
    explicit Splitter(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
  };

 private:
  struct Compiled;
  explicit Regex(std::unique_ptr<Compiled> compiled);
  std::unique_ptr<Compiled> compiled_;
};

// The pattern in PCRE2's dialect. Errors: unsupported. Exposed for tests.
Result<std::string> translate_pattern(std::string_view pattern, const std::string& where);

}  // namespace fq::text
