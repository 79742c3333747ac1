// The "decoder" of a tokenizer.json: token strings in, text out. Owns its parts; immutable. Any
// thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "framequilt/status.h"
#include "src/text/json_file.h"

namespace fq::text {

class Decoder {
 public:
  // Errors: corrupt_model, unsupported (also for a tokenizer without a decoder).
  static Result<Decoder> read(const Json* value);

  // The text of a whole sequence; valid UTF-8.
  std::string decode(std::vector<std::string> tokens) const;
  // The bytes one token stands for inside a sequence. Steps that look at the whole text (Strip
  // after Fuse, the first space of Metaspace) do not apply, so decode() may drop a space that this
  // has.
  std::string token_bytes(std::string_view token) const;

 private:
  struct ByteLevel {};
  struct ByteFallback {};
  struct Fuse {};
  struct Replace {
    std::string pattern, content;
  };
  struct Strip {
    std::string content;  // one character
    int start = 0, stop = 0;
  };
  struct Metaspace {
    std::string mark;
    bool drop_first = true;
  };
  using Step = std::variant<ByteLevel, ByteFallback, Fuse, Replace, Strip, Metaspace>;

  Status add(const Json& value, const std::string& where, int depth);

  std::vector<Step> steps_;
};

}  // namespace fq::text
