// Strict, bounded reading of JSON files for the tokenizers: what is not understood is an error that
// names it. ObjectReader is a view of a Json value that must outlive it. Any thread.
#pragma once

#include <cstddef>
#include <filesystem>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "framequilt/status.h"

namespace fq::text {

using Json = nlohmann::json;

// Larger files are refused before they are read. The largest published tokenizer.json files have
// about 35 MB.
inline constexpr size_t kMaxFileBytes = size_t{64} << 20;
// Token ids stay below this (engine contract, section 1.1).
inline constexpr int kMaxVocab = 1 << 22;

Error corrupt(std::string message);
Error unsupported(std::string message);

// Errors: not_found, io, corrupt_model (larger than `max_bytes`).
Result<std::string> read_file(const std::filesystem::path& path, size_t max_bytes);
// Errors: corrupt_model for text that is not JSON, is nested deeper than 64, or has more than 2^23
// values.
Result<Json> parse_json(std::string_view text, const std::string& name);

// Typed access to the members of one JSON object; `where` is its place in the file ("decoder[1]").
class ObjectReader {
 public:
  static Result<ObjectReader> of(const Json& value, std::string where);

  // Fails when the object has a key that is not listed.
  Status allow_only(std::initializer_list<std::string_view> keys) const;
  // The member, or nullptr when it is absent or null.
  const Json* find(const char* key) const;
  // Required members. Errors: corrupt_model.
  Result<const Json*> member(const char* key) const;
  Result<std::string> string(const char* key) const;
  Result<bool> boolean(const char* key) const;
  Result<int> integer(const char* key, int low, int high) const;
  // The same for members that may be absent or null.
  Result<std::string> string_or(const char* key, std::string fallback) const;
  Result<bool> boolean_or(const char* key, bool fallback) const;

  const std::string& where() const { return where_; }
  std::string path(const char* key) const { return where_ + "." + key; }

 private:
  ObjectReader(const Json* object, std::string where) : object_(object), where_(std::move(where)) {}
  const Json* object_;
  std::string where_;
};

// `value` as an integer in [low, high]; `where` names it in the error.
std::optional<int> integer_in(const Json& value, int low, int high);
Result<int> json_integer(const Json& value, int low, int high, const std::string& where);

}  // namespace fq::text
