// The "normalizer" of a tokenizer.json: text in, text out. Owns its parts; immutable. Any thread.
#pragma once

#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "framequilt/status.h"
#include "src/text/json_file.h"
#include "src/text/regex.h"
#include "src/text/unicode.h"

namespace fq::text {

class Normalizer {
 public:
  // `value` may be null: nothing is changed. Errors: corrupt_model, unsupported.
  static Result<Normalizer> read(const Json* value);

  // `text` is valid UTF-8, and so is the result. Errors: invalid_argument, out_of_memory.
  Result<std::string> apply(std::string text) const;
  bool empty() const { return steps_.empty(); }

 private:
  struct Prepend {
    std::string text;  // only before text that is not empty
  };
  struct Replace {
    Regex pattern;
    std::string content;
  };
  using Step = std::variant<NormalForm, Prepend, Replace>;

  Status add(const Json& value, const std::string& where, int depth);

  std::vector<Step> steps_;
};

// {"String": s} or {"Regex": r}, as several parts of a tokenizer.json write it.
Result<Regex> read_pattern(const Json& value, const std::string& where);

}  // namespace fq::text
