#include "src/runtime/prompt_rows.h"

#include <algorithm>

namespace fq::runtime {
namespace {

Error invalid(std::string message, std::string hint) {
  return Error{Code::kInvalidArgument, std::move(message), std::move(hint)};
}

// Rows given directly in the decoder's input space.
Result<blocks::MediaRows> lay_out_embedding(const Media& media, int hidden) {
  if (media.rows < 1 || static_cast<int64_t>(media.data.size()) != int64_t{media.rows} * hidden) {
    return invalid("an embedding item has " + std::to_string(media.data.size()) + " values for " +
                       std::to_string(media.rows) + " rows of width " + std::to_string(hidden),
                   "layout is [rows, hidden]");
  }
  blocks::MediaRows out;
  out.rows = media.rows;
  out.slots.assign(static_cast<size_t>(media.rows), -1);
  if (!media.slots.empty()) {
    if (static_cast<int64_t>(media.slots.size()) != media.rows) {
      return invalid("an embedding item has " + std::to_string(media.slots.size()) + " slots for " +
                         std::to_string(media.rows) + " rows",
                     "give one slot per row, -1 for text-like rows");
    }
    for (int32_t slot : media.slots) {
      if (slot < -1 || slot >= media.rows) {
        return invalid(
            "slot " + std::to_string(slot) + " of an embedding item is outside [-1, rows)", "");
      }
      out.period = std::max(out.period, slot + 1);
    }
    out.slots = media.slots;
  }
  return out;
}

}  // namespace

Result<PromptRows> lay_out_prompt(const Request& request, const model::ModelSpec& spec,
                                  const blocks::Vision* vision, int max_context) {
  const auto placeholders = std::count(request.prompt.begin(), request.prompt.end(), kMediaToken);
  if (placeholders != static_cast<int64_t>(request.media.size())) {
    return invalid("the prompt has " + std::to_string(placeholders) + " media placeholders for " +
                       std::to_string(request.media.size()) + " media items",
                   "put fq::kMediaToken (-1) where each item goes");
  }
  if (request.prompt.empty()) return invalid("the prompt is empty", "give at least one token");

  const bool merge_separators =
      !request.reduction.framefusion || request.reduction.framefusion->merge_separators;
  PromptRows out;
  size_t next_media = 0;
  for (TokenId token : request.prompt) {
    if (token != kMediaToken) {
      if (token < 0 || token >= spec.decoder.vocab) {
        return invalid("token id " + std::to_string(token) + " is outside the vocabulary of " +
                           std::to_string(spec.decoder.vocab),
                       "use the model's own tokenizer");
      }
      out.source.push_back(token);
      out.slots.push_back(-1);
      continue;
    }
    const Media& media = request.media[next_media++];
    blocks::MediaRows rows;
    if (media.kind == MediaKind::kEmbedding) {
      FQ_ASSIGN_OR_RETURN(rows, lay_out_embedding(media, spec.decoder.hidden));
    } else if (vision == nullptr) {
      return invalid("this model has no vision tower",
                     "ask a vision-language model about images and videos");
    } else {
      FQ_ASSIGN_OR_RETURN(rows, vision->layout(media, merge_separators));
    }
    out.spans.push_back({.prompt_row = out.rows(), .media_row = out.media_rows, .rows = rows.rows});
    for (int64_t i = 0; i < rows.rows; ++i) {
      out.source.push_back(static_cast<int32_t>(-(out.media_rows + i) - 1));
      const int32_t slot = rows.slots[static_cast<size_t>(i)];
      out.slots.push_back(slot < 0 ? -1 : slot + out.period);
    }
    out.media_rows += rows.rows;
    out.period += rows.period;
    if (out.rows() > max_context) break;  // refused below; do not build absurd lists
  }
  if (out.rows() >= max_context) {
    return Error{Code::kContextOverflow,
                 "the prompt has " + std::to_string(out.rows()) + " rows, the context holds " +
                     std::to_string(max_context) + " including the answer",
                 "use fewer frames or a shorter prompt"};
  }
  return out;
}

}  // namespace fq::runtime
