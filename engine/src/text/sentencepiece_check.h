// Checks a SentencePiece model file before libsentencepiece reads it. The library trusts what lies
// inside the character map (a trie that it walks without bounds). No state. Any thread.
#pragma once

#include <string_view>

#include "framequilt/status.h"

namespace fq::text {

// Errors: corrupt_model.
Status check_sentencepiece_model(std::string_view model);

}  // namespace fq::text
