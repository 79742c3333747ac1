// Strict reading of JSON that nobody trusts: duplicate keys, deep nesting and oversized documents
// are refused while parsing; every key must be asked for, have the right type and lie in its range.
// Errors carry the path of the value
// ("decoder.attention.heads: expected integer in [1, 65536], got -3"). Single-threaded values, no
// shared state.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>

#include "framequilt/status.h"

namespace fq::model {

struct JsonLimits {
  int depth = 16;            // nested objects and arrays
  int64_t values = 1 << 20;  // keys and values of the whole document, which bounds memory
};

// Parses one JSON object. Errors: corrupt_model, with `where` in front. May throw std::bad_alloc.
Result<nlohmann::json> parse_json_object(std::string_view text, std::string_view where,
                                         const JsonLimits& limits);

// Collects the first error of a read, so that reading code needs no branches.
class ReadErrors {
 public:
  explicit ReadErrors(std::string_view where) : where_(where) {}
  void add(std::string_view path, std::string_view problem);
  bool any() const { return first_.has_value(); }
  const Error& first() const { return *first_; }

 private:
  std::string where_;
  std::optional<Error> first_;
};

// Reads one JSON object key by key. After an error every read returns a harmless default. Refers to
// the document and to the errors, which outlive it. finish() must be called last: it reports the
// keys nobody asked for.
class ObjectReader {
 public:
  ObjectReader(const nlohmann::json& value, std::string path, ReadErrors& errors);

  int64_t integer(std::string_view key, int64_t low, int64_t high);
  double number(std::string_view key, double low, double high);
  bool boolean(std::string_view key);
  std::string text(std::string_view key, size_t max_bytes);
  ObjectReader object(std::string_view key);
  const nlohmann::json& array(std::string_view key, size_t max_items);
  // Whether an optional key is there. It must still be read.
  bool has(std::string_view key) const;
  // True (and the key is done with) when the value is null.
  bool null(std::string_view key);
  // One of the named values.
  template <class Value>
  Value choice(std::string_view key,
               std::initializer_list<std::pair<std::string_view, Value>> values);
  // Marks every key as asked for and returns the object, to be walked by the caller (maps with free
  // keys).
  const nlohmann::json& all();
  void finish();

  std::string path_of(std::string_view key) const;
  ReadErrors& errors() { return errors_; }

 private:
  const nlohmann::json* find(std::string_view key);
  void mismatch(std::string_view key, std::string_view expected, const nlohmann::json& got);

  const nlohmann::json* object_;  // an empty object when the value was not one
  std::string path_;
  ReadErrors& errors_;
  std::set<std::string, std::less<>> asked_;
};

// A short rendering of any value for messages: scalars as written (cut), containers by kind.
std::string describe(const nlohmann::json& value);

template <class Value>
Value ObjectReader::choice(std::string_view key,
                           std::initializer_list<std::pair<std::string_view, Value>> values) {
  const nlohmann::json* found = find(key);
  if (found == nullptr) return values.begin()->second;
  const auto* text = found->get_ptr<const std::string*>();
  std::string names;
  for (const auto& [name, value] : values) {
    if (text != nullptr && *text == name) return value;
    names += names.empty() ? "" : ", ";
    names += '"';
    names += name;
    names += '"';
  }
  mismatch(key, "one of " + names, *found);
  return values.begin()->second;
}

}  // namespace fq::model
