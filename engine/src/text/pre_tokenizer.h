// The "pre_tokenizer" of a tokenizer.json: cuts text into the words that BPE then merges within.
// Owns its parts; immutable. Any thread.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "framequilt/status.h"
#include "src/text/json_file.h"
#include "src/text/regex.h"

namespace fq::text {

// A word on its way through the steps. ByteLevel rewrites its text in the byte alphabet.
struct Word {
  std::string text;
  bool at_start = false;  // begins where the whole input begins
};

// Byte <-> character of the byte-level alphabet: printable Latin-1 stands for itself, the other
// bytes for U+0100 onward (the rule of GPT-2's published vocabulary).
struct ByteAlphabet {
  std::array<uint16_t, 256> character{};  // of a byte
  std::array<int16_t, 0x144> byte{};      // of a character; -1: not in the alphabet
  ByteAlphabet();
  static const ByteAlphabet& get();
};

enum class SplitBehavior : uint8_t {
  kRemoved,
  kIsolated,
  kMergedWithPrevious,
  kMergedWithNext,
  kContiguous
};

class PreTokenizer {
 public:
  // `value` may be null: a text is one word. Errors: corrupt_model, unsupported.
  static Result<PreTokenizer> read(const Json* value);

  // Replaces `words` by the words they are made of; none is empty. Errors: invalid_argument.
  Status apply(std::vector<Word>& words) const;

 private:
  enum class PrependScheme : uint8_t { kAlways, kFirst, kNever };
  struct Split {
    Regex pattern;
    SplitBehavior behavior = SplitBehavior::kIsolated;
    bool invert = false;
  };
  struct SpacePrefix {};  // ByteLevel's add_prefix_space
  struct ToByteAlphabet {};
  struct SpaceMark {  // Metaspace: spaces become the mark, and one is put in front
    std::string mark;
    PrependScheme prepend = PrependScheme::kAlways;
  };
  using Step = std::variant<Split, SpacePrefix, ToByteAlphabet, SpaceMark>;

  Status add(const Json& value, const std::string& where, int depth);
  Status add_byte_level(const ObjectReader& object);
  Status add_split(const ObjectReader& object);
  Status add_metaspace(const ObjectReader& object);
  Status add_split(std::string_view pattern, SplitBehavior behavior, bool invert,
                   const std::string& where);
  static Status apply_split(const Split& split, std::vector<Word>& words);
  static void apply_space_mark(const SpaceMark& step, std::vector<Word>& words);

  std::vector<Step> steps_;
};

// The spans of `spans` as `behavior` keeps them; a span with `matched` set is dropped.
std::vector<Span> apply_behavior(std::vector<Span> spans, SplitBehavior behavior);

}  // namespace fq::text
