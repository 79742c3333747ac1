// Bounded file and JSON reading with errors that name the place. No state. Any thread.
#include "src/text/json_file.h"

#include <cstdint>
#include <fstream>
#include <system_error>
#include <utility>

namespace fq::text {
namespace {

constexpr int kMaxDepth = 64;
// A parsed value takes up to about 100 bytes, so a hostile file can ask for less than 1 GB.
constexpr size_t kMaxValues = size_t{1} << 23;

// Counts nesting and values without building anything. Malformed text is left to the parser.
Status check_bounds(std::string_view text, const std::string& name) {
  int depth = 0;
  size_t values = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') {
        ++i;
      } else if (c == '"') {
        in_string = false;
      }
      continue;
    }
    switch (c) {
      case '"':
        in_string = true;
        break;
      case '[':
      case '{':
        ++values;
        if (++depth > kMaxDepth) {
          return corrupt(name + ": nested deeper than " + std::to_string(kMaxDepth));
        }
        break;
      case ']':
      case '}':
        --depth;
        break;
      case ',':
        ++values;
        break;
      default:
        break;
    }
  }
  if (values > kMaxValues) {
    return corrupt(name + ": more than " + std::to_string(kMaxValues) + " values");
  }
  return {};
}

std::string type_of(const Json& value) { return value.type_name(); }

}  // namespace

Error corrupt(std::string message) {
  return {Code::kCorruptModel, std::move(message), "convert the model again, or download it again"};
}

Error unsupported(std::string message) {
  return {Code::kUnsupported, std::move(message),
          "this tokenizer needs a newer Framequilt; please report the model"};
}

Result<std::string> read_file(const std::filesystem::path& path, size_t max_bytes) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status)) {
    return Error{Code::kNotFound, "no file " + path.string(),
                 "name a model directory made by framequilt convert"};
  }
  if (!std::filesystem::is_regular_file(status)) {
    return Error{Code::kIo, path.string() + " is not a regular file", ""};
  }
  const uintmax_t size = std::filesystem::file_size(path, error);
  if (error) return Error{Code::kIo, path.string() + ": " + error.message(), ""};
  if (size > max_bytes) {
    return corrupt(path.string() + ": " + std::to_string(size) + " bytes, more than the limit of " +
                   std::to_string(max_bytes));
  }
  std::ifstream file(path, std::ios::binary);
  std::string text(static_cast<size_t>(size), '\0');
  if (!file || !file.read(text.data(), static_cast<std::streamsize>(text.size()))) {
    return Error{Code::kIo, "cannot read " + path.string(), "check its permissions"};
  }
  return text;
}

Result<Json> parse_json(std::string_view text, const std::string& name) {
  FQ_RETURN_IF_ERROR(check_bounds(text, name));
  Json value = Json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  if (value.is_discarded()) return corrupt(name + " is not valid JSON (truncated or damaged)");
  return value;
}

Result<ObjectReader> ObjectReader::of(const Json& value, std::string where) {
  if (!value.is_object()) {
    return corrupt(where + ": expected an object, found " + type_of(value));
  }
  return ObjectReader(&value, std::move(where));
}

Status ObjectReader::allow_only(std::initializer_list<std::string_view> keys) const {
  for (const auto& [key, value] : object_->items()) {
    bool known = false;
    for (const std::string_view allowed : keys) known = known || key == allowed;
    if (!known) return unsupported(where_ + ": unknown key \"" + key + "\"");
  }
  return {};
}

const Json* ObjectReader::find(const char* key) const {
  const auto it = object_->find(key);
  return it == object_->end() || it->is_null() ? nullptr : &*it;
}

Result<const Json*> ObjectReader::member(const char* key) const {
  const Json* value = find(key);
  if (value == nullptr) return corrupt(path(key) + " is missing");
  return value;
}

Result<std::string> ObjectReader::string(const char* key) const {
  FQ_ASSIGN_OR_RETURN(const Json* value, member(key));
  if (!value->is_string()) {
    return corrupt(path(key) + ": expected a string, found " + type_of(*value));
  }
  return value->get<std::string>();
}

Result<bool> ObjectReader::boolean(const char* key) const {
  FQ_ASSIGN_OR_RETURN(const Json* value, member(key));
  if (!value->is_boolean()) {
    return corrupt(path(key) + ": expected true or false, found " + type_of(*value));
  }
  return value->get<bool>();
}

Result<int> ObjectReader::integer(const char* key, int low, int high) const {
  FQ_ASSIGN_OR_RETURN(const Json* value, member(key));
  return json_integer(*value, low, high, path(key));
}

Result<std::string> ObjectReader::string_or(const char* key, std::string fallback) const {
  return find(key) == nullptr ? Result<std::string>(std::move(fallback)) : string(key);
}

Result<bool> ObjectReader::boolean_or(const char* key, bool fallback) const {
  return find(key) == nullptr ? Result<bool>(fallback) : boolean(key);
}

std::optional<int> integer_in(const Json& value, int low, int high) {
  const bool small =
      value.is_number_unsigned() ? value.get<uint64_t>() <= INT64_MAX : value.is_number_integer();
  if (!small) return std::nullopt;
  const auto number = value.get<int64_t>();
  return number < low || number > high ? std::nullopt : std::optional(static_cast<int>(number));
}

Result<int> json_integer(const Json& value, int low, int high, const std::string& where) {
  if (const auto number = integer_in(value, low, high)) return *number;
  return corrupt(where + ": expected an integer from " + std::to_string(low) + " to " +
                 std::to_string(high) + ", found " +
                 (value.is_primitive() && !value.is_string() ? value.dump() : type_of(value)));
}

}  // namespace fq::text
