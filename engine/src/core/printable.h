// Text from a file that nobody trusts, made fit for an error message.
#pragma once

#include <string>
#include <string_view>

namespace fq {

// `text` in double quotes, printable ASCII only (other bytes as \xNN), cut to `limit` bytes of
// input.
std::string printable(std::string_view text, size_t limit = 96);

}  // namespace fq
