// From a request's tokens and media to the rows of its prompt: what each row is, its slot for token
// reduction, and the checks that need no engine state. Runs on the thread that submits.
#pragma once

#include <cstdint>
#include <vector>

#include "framequilt/request.h"
#include "framequilt/status.h"
#include "src/blocks/vision.h"
#include "src/model/spec.h"

namespace fq::runtime {

// Where the rows of one media item stand in the prompt and among all media rows.
struct MediaSpan {
  int64_t prompt_row = 0;
  int64_t media_row = 0;
  int64_t rows = 0;
};

struct PromptRows {
  // Per row: a token id, or -(i + 1) for media row i.
  std::vector<int32_t> source;
  // Per row: -1 text, else the slot (disjoint between media items).
  std::vector<int32_t> slots;
  int period = 0;
  int64_t media_rows = 0;        // rows that come from media, separators included
  std::vector<MediaSpan> spans;  // one per media item

  int64_t rows() const { return static_cast<int64_t>(source.size()); }
};

// `vision` may be null (text model). Errors: invalid_argument, context_overflow.
Result<PromptRows> lay_out_prompt(const Request& request, const model::ModelSpec& spec,
                                  const blocks::Vision* vision, int max_context);

}  // namespace fq::runtime
