// The SAX handler that builds the document (so that limits act before memory is spent) and the
// typed reader.
#include "src/model/json_reader.h"

#include <charconv>
#include <cmath>
#include <cstdio>
#include <vector>

#include "src/core/printable.h"

namespace fq::model {
namespace {

using nlohmann::json;

const json& empty_object() {
  static const json object = json::object();
  return object;
}

const json& empty_array() {
  static const json array = json::array();
  return array;
}

// Builds a json value and refuses what the plain parser lets through. Open containers are on an
// explicit stack: the parser does not recurse, and neither does this.
class StrictBuilder {
 public:
  explicit StrictBuilder(const JsonLimits& limits) : limits_(limits) {}

  bool null() { return put(json(nullptr)) != nullptr; }
  bool boolean(bool value) { return put(json(value)) != nullptr; }
  bool number_integer(json::number_integer_t value) { return put(json(value)) != nullptr; }
  bool number_unsigned(json::number_unsigned_t value) { return put(json(value)) != nullptr; }
  bool number_float(json::number_float_t value, const std::string&) {
    return put(json(value)) != nullptr;
  }
  bool string(std::string& value) { return put(json(std::move(value))) != nullptr; }
  bool binary(json::binary_t&) { return refuse("binary data"); }
  bool start_object(size_t) { return open(json::object()); }
  bool start_array(size_t) { return open(json::array()); }
  bool end_object() { return close(); }
  bool end_array() { return close(); }

  bool key(std::string& name) {
    if (++values_ > limits_.values) return refuse_size();
    if (stack_.back()->contains(name)) return refuse("duplicate key " + printable(name));
    key_ = std::move(name);
    return true;
  }

  // nlohmann's text quotes raw input, which may not be text at all: only the position is kept.
  bool parse_error(size_t position, const std::string&, const json::exception&) {
    return refuse("not valid JSON at byte " + std::to_string(position));
  }

  json& root() { return root_; }
  const std::string& problem() const { return problem_; }

 private:
  bool refuse(std::string problem) {
    problem_ = std::move(problem);
    return false;
  }
  bool refuse_size() {
    return refuse("more than " + std::to_string(limits_.values) + " keys and values");
  }

  json* put(json value) {
    if (++values_ > limits_.values) {
      refuse_size();
      return nullptr;
    }
    if (stack_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    json& parent = *stack_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    return &(parent[key_] = std::move(value));
  }
  bool open(json container) {
    if (stack_.size() >= static_cast<size_t>(limits_.depth)) {
      return refuse("nested deeper than " + std::to_string(limits_.depth) + " levels");
    }
    // Pointers on the stack stay valid: a container grows only while none of its children is open.
    json* added = put(std::move(container));
    if (added != nullptr) stack_.push_back(added);
    return added != nullptr;
  }
  bool close() {
    stack_.pop_back();
    return true;
  }

  JsonLimits limits_;
  int64_t values_ = 0;
  json root_;
  std::vector<json*> stack_;
  std::string key_;
  std::string problem_;
};

std::string number_text(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.10g", value);
  return text;
}

}  // namespace

Result<json> parse_json_object(std::string_view text, std::string_view where,
                               const JsonLimits& limits) {
  StrictBuilder builder(limits);
  std::string problem;
  if (!json::sax_parse(text.begin(), text.end(), &builder)) {
    problem = builder.problem().empty() ? "not valid JSON" : builder.problem();
  } else if (!builder.root().is_object()) {
    problem = "expected an object, got " + describe(builder.root());
  } else {
    return std::move(builder.root());
  }
  return Error{Code::kCorruptModel, std::string(where) + ": " + problem, ""};
}

void ReadErrors::add(std::string_view path, std::string_view problem) {
  if (first_) return;
  std::string message = where_ + ": ";
  if (!path.empty()) {
    message += path;
    message += ": ";
  }
  message += problem;
  first_ = Error{Code::kCorruptModel, std::move(message), ""};
}

std::string describe(const json& value) {
  switch (value.type()) {
    case json::value_t::object:
      return "an object";
    case json::value_t::array:
      return "an array";
    case json::value_t::string:
      return printable(value.get_ref<const std::string&>(), 48);
    case json::value_t::boolean:
      return value.get<bool>() ? "true" : "false";
    case json::value_t::number_integer:
      return std::to_string(value.get<int64_t>());
    case json::value_t::number_unsigned:
      return std::to_string(value.get<uint64_t>());
    case json::value_t::number_float:
      return number_text(value.get<double>()) + " (not an integer)";
    default:
      return "null";
  }
}

ObjectReader::ObjectReader(const json& value, std::string path, ReadErrors& errors)
    : object_(&value), path_(std::move(path)), errors_(errors) {
  if (!value.is_object()) {
    errors_.add(path_, "expected an object, got " + describe(value));
    object_ = &empty_object();
  }
}

std::string ObjectReader::path_of(std::string_view key) const {
  std::string path = path_;
  if (!path.empty()) path += '.';
  path += key;
  return path;
}

const json* ObjectReader::find(std::string_view key) {
  asked_.emplace(key);
  const auto it = object_->find(key);
  if (it != object_->end()) return &*it;
  errors_.add(path_of(key), "missing");
  return nullptr;
}

void ObjectReader::mismatch(std::string_view key, std::string_view expected, const json& got) {
  errors_.add(path_of(key), "expected " + std::string(expected) + ", got " + describe(got));
}

int64_t ObjectReader::integer(std::string_view key, int64_t low, int64_t high) {
  const json* value = find(key);
  if (value == nullptr) return low;
  bool fits = value->is_number_integer();  // true for unsigned values too
  if (fits && value->is_number_unsigned()) fits = value->get<uint64_t>() <= uint64_t{INT64_MAX};
  const int64_t result = fits ? value->get<int64_t>() : low;
  if (fits && result >= low && result <= high) return result;
  mismatch(key, "integer in [" + std::to_string(low) + ", " + std::to_string(high) + "]", *value);
  return low;
}

double ObjectReader::number(std::string_view key, double low, double high) {
  const json* value = find(key);
  if (value == nullptr) return low;
  const double result = value->is_number() ? value->get<double>() : NAN;
  if (result >= low && result <= high) return result;
  std::string got = value->is_number() ? number_text(result) : describe(*value);
  errors_.add(path_of(key), "expected number in [" + number_text(low) + ", " + number_text(high) +
                                "], got " + got);
  return low;
}

bool ObjectReader::boolean(std::string_view key) {
  const json* value = find(key);
  if (value == nullptr) return false;
  if (!value->is_boolean()) mismatch(key, "true or false", *value);
  return value->is_boolean() && value->get<bool>();
}

std::string ObjectReader::text(std::string_view key, size_t max_bytes) {
  const json* value = find(key);
  if (value == nullptr) return "";
  const auto* text = value->get_ptr<const std::string*>();
  if (text != nullptr && text->size() <= max_bytes) return *text;
  mismatch(key, "a string of at most " + std::to_string(max_bytes) + " bytes", *value);
  return "";
}

ObjectReader ObjectReader::object(std::string_view key) {
  const json* value = find(key);
  return ObjectReader(value == nullptr ? empty_object() : *value, path_of(key), errors_);
}

const json& ObjectReader::array(std::string_view key, size_t max_items) {
  const json* value = find(key);
  if (value == nullptr) return empty_array();
  if (value->is_array() && value->size() <= max_items) return *value;
  mismatch(key, "an array of at most " + std::to_string(max_items) + " items", *value);
  return empty_array();
}

bool ObjectReader::has(std::string_view key) const { return object_->find(key) != object_->end(); }

bool ObjectReader::null(std::string_view key) {
  const auto it = object_->find(key);
  if (it == object_->end() || !it->is_null()) return false;
  asked_.emplace(key);
  return true;
}

const json& ObjectReader::all() {
  for (const auto& item : object_->items()) asked_.insert(item.key());
  return *object_;
}

void ObjectReader::finish() {
  if (errors_.any()) return;
  for (const auto& item : object_->items()) {
    if (!asked_.contains(item.key())) {
      errors_.add(path_, "unknown key " + printable(item.key()));
      return;
    }
  }
}

}  // namespace fq::model
