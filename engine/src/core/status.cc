#include "framequilt/status.h"

namespace fq {

std::string_view code_name(Code code) {
  switch (code) {
    case Code::kInvalidArgument:
      return "invalid_argument";
    case Code::kNotFound:
      return "not_found";
    case Code::kCorruptModel:
      return "corrupt_model";
    case Code::kUnsupported:
      return "unsupported";
    case Code::kVersionMismatch:
      return "version_mismatch";
    case Code::kContextOverflow:
      return "context_overflow";
    case Code::kOutOfPages:
      return "out_of_pages";
    case Code::kOutOfMemory:
      return "out_of_memory";
    case Code::kCancelled:
      return "cancelled";
    case Code::kClosed:
      return "closed";
    case Code::kIo:
      return "io";
    case Code::kInternal:
      return "internal";
  }
  return "internal";
}

std::string Error::to_string() const {
  std::string text(code_name(code));
  text += ": ";
  text += message;
  if (!hint.empty()) {
    text += " (hint: ";
    text += hint;
    text += ")";
  }
  return text;
}

}  // namespace fq
