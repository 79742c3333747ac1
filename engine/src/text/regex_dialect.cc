// Rewrites a pattern from Oniguruma's dialect to PCRE2's. Only constructs with one meaning, or one
// that can be written down, are let through: a pattern that two engines read differently would give
// wrong token ids without a word. No state. Any thread.
#include <array>
#include <cctype>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "src/text/json_file.h"
#include "src/text/regex.h"
#include "src/text/unicode.h"

namespace fq::text {
namespace {

// Members of a class. Oniguruma's \s is the property White_Space (PCRE2 adds U+180E), its \w has
// marks, letter numbers and connectors (PCRE2's has not), its \d is Nd in both.
constexpr std::string_view kSpace = R"(\t-\r\x{85}\p{Z})";
constexpr std::string_view kWord =
    R"(\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\x{24B6}-\x{24E9}\x{1F130}-\x{1F149}\x{1F150}-\x{1F169}\x{1F170}-\x{1F189})";

class Translator {
 public:
  Translator(std::string_view pattern, const std::string& where)
      : pattern_(pattern), where_(where) {}

  Result<std::string> run() {
    while (position_ < pattern_.size()) FQ_RETURN_IF_ERROR(next());
    if (in_class_ || !group_starts_.empty()) return refuse("unbalanced brackets");
    return std::move(out_);
  }

 private:
  // What may follow an atom: a{2}+ is greedy repetition of a{2} in one dialect, possessive in the
  // other.
  enum class Quantified { kNoAtom, kNot, kSimple, kInterval, kFixedInterval, kDone };

  Error refuse(std::string_view what) const {
    return unsupported(where_ + ": regular expression \"" + std::string(pattern_) +
                       "\": " + std::string(what));
  }
  char peek(size_t ahead = 0) const {
    return position_ + ahead < pattern_.size() ? pattern_[position_ + ahead] : '\0';
  }
  bool take(std::string_view text) {
    if (!pattern_.substr(position_).starts_with(text)) return false;
    position_ += text.size();
    return true;
  }
  void copy_character() {
    const size_t length = utf8_length(peek());
    out_ += pattern_.substr(position_, length);
    position_ += length;
  }
  // Outside a class, each thing that can be repeated starts here.
  void begin_atom() {
    if (in_class_) return;
    atom_start_ = out_.size();
    quantified_ = Quantified::kNot;
  }

  Status next() {
    const char c = peek();
    if (c == '\\') return escape();
    if (in_class_) return class_member();
    switch (c) {
      case '[':
        begin_atom();
        in_class_ = true;
        copy_character();
        if (peek() == '^') copy_character();
        return peek() == ']' ? refuse("a set that starts with ']'") : Status();
      case '(':
        return open_group();
      case ')':
        if (group_starts_.empty()) return refuse("unbalanced brackets");
        atom_start_ = group_starts_.back();
        group_starts_.pop_back();
        quantified_ = Quantified::kNot;
        copy_character();
        return {};
      case '{':
        return brace();
      case '*':
      case '+':
      case '?':
        return quantifier();
      case '|':
        quantified_ = Quantified::kNoAtom;
        copy_character();
        return {};
      default:
        begin_atom();
        copy_character();
        return {};
    }
  }

  Status class_member() {
    const char c = peek();
    if (c == '[') return refuse("a set inside a set");
    if (c == '&' && peek(1) == '&') return refuse("an intersection of sets");
    if (c == ']') in_class_ = false;
    copy_character();
    return {};
  }

  Status open_group() {
    static constexpr std::array<std::string_view, 7> kKinds = {
        "(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:"};
    const size_t start = out_.size();
    bool known = false;
    for (const std::string_view kind : kKinds) {
      if (take(kind)) {
        out_ += kind;
        known = true;
        break;
      }
    }
    if (!known) {
      if (peek(1) == '?' || peek(1) == '*') return refuse("an unknown kind of group");
      // Nothing reads what a group captured, and back references are refused.
      out_ += "(?:";
      ++position_;
    }
    group_starts_.push_back(start);
    quantified_ = Quantified::kNoAtom;
    return {};
  }

  Status brace() {
    const size_t close = pattern_.find('}', position_);
    std::string low, high;
    bool comma = false;
    bool interval = close != std::string_view::npos;
    for (size_t i = position_ + 1; interval && i < close; ++i) {
      const char c = pattern_[i];
      if (c == ',' && !comma) {
        comma = true;
      } else if (c >= '0' && c <= '9') {
        (comma ? high : low) += c;
      } else {
        interval = false;
      }
    }
    interval = interval && !(low.empty() && high.empty());
    if (!interval) {
      begin_atom();
      out_ += "\\{";
      ++position_;
      return {};
    }
    if (quantified_ != Quantified::kNot) return refuse("a repetition of a repetition");
    if (low.empty()) low = "0";
    out_ += "{" + low + (comma ? "," + high : "") + "}";
    position_ = close + 1;
    quantified_ = comma ? Quantified::kInterval : Quantified::kFixedInterval;
    return {};
  }

  Status quantifier() {
    const char c = peek();
    switch (quantified_) {
      case Quantified::kNoAtom:
        return refuse("a repetition of nothing");
      case Quantified::kNot:
        quantified_ = Quantified::kSimple;
        break;
      case Quantified::kSimple:  // lazy or possessive
        if (c == '*') return refuse("a repetition of a repetition");
        quantified_ = Quantified::kDone;
        break;
      case Quantified::kInterval:
      case Quantified::kFixedInterval:
        if (c == '+') {
          out_.insert(atom_start_, "(?:");
          out_ += ')';
        } else if (c == '*' || quantified_ == Quantified::kFixedInterval) {
          return refuse("a repetition of a repetition");
        }
        quantified_ = Quantified::kDone;
        break;
      case Quantified::kDone:
        return refuse("a repetition of a repetition");
    }
    copy_character();
    return {};
  }

  // A set of characters: its members inside a class, a class of its own outside.
  Status members(std::string_view set, bool negated) {
    if (in_class_) {
      if (negated) return refuse("a negated set inside a set");
      out_ += set;
    } else {
      out_ += negated ? "[^" : "[";
      out_ += set;
      out_ += ']';
    }
    return {};
  }

  Status escape() {
    begin_atom();
    if (position_ + 1 >= pattern_.size()) return refuse("a trailing backslash");
    const char c = pattern_[position_ + 1];
    position_ += 2;
    switch (c) {
      case 's':
        return members(kSpace, false);
      case 'w':
        return members(kWord, false);
      case 'd':
        return members("\\p{Nd}", false);
      // These two have the same meaning inside a class and outside.
      case 'D':
        out_ += "\\P{Nd}";
        return {};
      case 'S':
        if (!in_class_) return members(kSpace, true);
        return refuse("\\S inside a set");
      case 'W':
        return members(kWord, true);
      case 'p':
      case 'P':
        return property(c);
      case 'n':
        out_ += "\\n";
        return {};
      case 'r':
        out_ += "\\r";
        return {};
      case 't':
        out_ += "\\t";
        return {};
      case 'f':
        out_ += "\\f";
        return {};
      case 'v':
        out_ += "\\x{0B}";
        return {};
      case 'a':
        out_ += "\\a";
        return {};
      case 'e':
        out_ += "\\e";
        return {};
      case 'u':
        return code_point(4);
      case 'x':
        return peek() == '{' ? code_point(0) : code_point(2);
      case 'A':
      case 'z':
      case 'Z':
        if (in_class_) break;
        out_ += '\\';
        out_ += c;
        return {};
      default:
        if (std::isalnum(static_cast<unsigned char>(c)) == 0) {
          if (static_cast<unsigned char>(c) < 0x80) {
            out_ += '\\';
            out_ += c;
          } else {
            --position_;
            copy_character();
          }
          return {};
        }
        break;
    }
    return refuse(std::string("escape \\") + c);
  }

  // \p{L}, \P{Lu}, \p{^N}, \p{Han}. A script is asked for by its own name: PCRE2 would add the
  // characters that are merely used with it.
  Status property(char letter) {
    const size_t close = pattern_.find('}', position_);
    if (peek() != '{' || close == std::string_view::npos) return refuse("a property without {}");
    std::string_view name = pattern_.substr(position_ + 1, close - position_ - 1);
    position_ = close + 1;
    bool negated = letter == 'P';
    if (name.starts_with('^')) {
      negated = !negated;
      name.remove_prefix(1);
    }
    for (const char c : name) {
      if (std::isalpha(static_cast<unsigned char>(c)) == 0 && c != '_') {
        return refuse("property " + std::string(name));
      }
    }
    if (name.empty()) return refuse("an empty property");
    out_ += negated ? "\\P{" : "\\p{";
    out_ += name.size() > 2 ? "sc:" : "";
    out_ += name;
    out_ += '}';
    return {};
  }

  // `digits` hexadecimal digits, or {digits} when that is 0.
  Status code_point(size_t digits) {
    std::string_view hex;
    if (digits == 0) {
      const size_t close = pattern_.find('}', position_);
      if (close == std::string_view::npos) return refuse("\\x{ without }");
      hex = pattern_.substr(position_ + 1, close - position_ - 1);
      position_ = close + 1;
    } else {
      hex = pattern_.substr(position_, digits);
      position_ += hex.size();
      // \xHH above 7F is a byte of a character in one dialect and a character in the other.
      if (hex.size() != digits || (digits == 2 && hex[0] > '7')) return refuse("a code point");
    }
    bool valid = !hex.empty() && hex.size() <= 6;
    for (const char c : hex) valid = valid && std::isxdigit(static_cast<unsigned char>(c)) != 0;
    if (!valid) return refuse("a code point");
    out_ += "\\x{";
    out_ += hex;
    out_ += '}';
    return {};
  }

  std::string_view pattern_;
  const std::string& where_;
  std::string out_;
  std::vector<size_t> group_starts_;  // places in out_
  size_t position_ = 0;
  size_t atom_start_ = 0;  // place in out_
  Quantified quantified_ = Quantified::kNoAtom;
  bool in_class_ = false;
};

}  // namespace

Result<std::string> translate_pattern(std::string_view pattern, const std::string& where) {
  if (pattern.size() > 4096) return unsupported(where + ": a pattern longer than 4096 bytes");
  return Translator(pattern, where).run();
}

}  // namespace fq::text
