// Typed errors that cross the library border: a code, a cause and a hint (architecture, rule 6).
// Values own their text. Any thread. Nothing here throws, aborts or allocates on the success path.
#pragma once

#include <cassert>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

namespace fq {

enum class Code {
  kInvalidArgument,  // the caller asked for something that cannot be
  kNotFound,         // a file, tensor or model that is not there
  kCorruptModel,     // a model file that breaks its own format
  kUnsupported,      // well formed, but nothing here can run it
  kVersionMismatch,  // written by a newer (or older) Framequilt
  kContextOverflow,  // prompt + max_tokens do not fit the model's context
  kOutOfPages,       // the KV pool can never hold this request
  kOutOfMemory,      // the operating system refused memory
  kCancelled,        // the caller cancelled
  kClosed,           // the engine was closed
  kIo,               // the operating system refused a file operation
  kInternal,         // a broken invariant of ours: please report
};

// Stable lower-case name ("corrupt_model"), used by Python, JSON and logs.
std::string_view code_name(Code code);

struct Error {
  Code code = Code::kInternal;
  std::string message;  // what happened, with the offending value
  std::string hint;     // what to do next; may be empty

  // "corrupt_model: ... (hint: ...)"
  std::string to_string() const;
};

// Success, or an Error. Contextually true on success.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Error error)
      : error_(std::move(error)), failed_(true) {}  // NOLINT(google-explicit-constructor)

  bool ok() const { return !failed_; }
  explicit operator bool() const { return ok(); }
  const Error& error() const {
    assert(failed_);
    return error_;
  }

 private:
  Error error_;
  bool failed_ = false;
};

// A value of T, or an Error. Contextually true when it holds a value.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value)
      : state_(std::in_place_index<0>, std::move(value)) {}  // NOLINT(google-explicit-constructor)
  Result(Error error)
      : state_(std::in_place_index<1>, std::move(error)) {}  // NOLINT(google-explicit-constructor)

  bool ok() const { return state_.index() == 0; }
  explicit operator bool() const { return ok(); }
  T& operator*() & { return *value_ptr(); }
  const T& operator*() const& { return *value_ptr(); }
  T&& operator*() && { return std::move(*value_ptr()); }
  T* operator->() { return value_ptr(); }
  const T* operator->() const { return value_ptr(); }
  const Error& error() const {
    assert(!ok());
    return *std::get_if<1>(&state_);
  }
  Status status() const { return ok() ? Status() : Status(error()); }

 private:
  T* value_ptr() {
    assert(ok());
    return std::get_if<0>(&state_);
  }
  const T* value_ptr() const {
    assert(ok());
    return std::get_if<0>(&state_);
  }
  std::variant<T, Error> state_;
};

}  // namespace fq

// Returns the error of `expr` (a Status) to the caller.
#define FQ_RETURN_IF_ERROR(expr)                         \
  do {                                                   \
    if (::fq::Status fq_status_ = (expr); !fq_status_) { \
      return fq_status_.error();                         \
    }                                                    \
  } while (0)

#define FQ_CONCAT_INNER(a, b) a##b
#define FQ_CONCAT(a, b) FQ_CONCAT_INNER(a, b)
// Declares or assigns `lhs` from the Result `expr`, or returns its error to the caller.
#define FQ_ASSIGN_OR_RETURN(lhs, expr)              \
  auto FQ_CONCAT(fq_result_, __LINE__) = (expr);    \
  if (!FQ_CONCAT(fq_result_, __LINE__)) {           \
    return FQ_CONCAT(fq_result_, __LINE__).error(); \
  }                                                 \
  lhs = std::move(*FQ_CONCAT(fq_result_, __LINE__))
