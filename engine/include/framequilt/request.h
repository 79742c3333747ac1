// One generation request, the events it produces, and what it cost. Plain data, owned by the
// caller.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "framequilt/media.h"
#include "framequilt/status.h"
#include "framequilt/types.h"

namespace fq {

// How the next token is chosen. Filters apply in this order: logit bias, repetition, presence and
// frequency penalties, temperature, top-k, top-p, min-p. temperature == 0 is greedy (lowest id wins
// ties).
struct Sampling {
  int max_tokens = 256;
  float temperature = 1.0f;
  int top_k = 0;       // 0: off
  float top_p = 1.0f;  // 1: off
  float min_p = 0.0f;  // 0: off
  float repetition_penalty =
      1.0f;  // divides positive, multiplies negative logits of seen tokens (prompt and output)
  float presence_penalty = 0.0f;   // subtracted once from logits of generated tokens
  float frequency_penalty = 0.0f;  // subtracted per occurrence
  uint64_t seed = 0;
  bool ignore_eos = false;
  int min_tokens = 0;                     // eos and stop tokens are masked before this many tokens
  std::vector<TokenId> stop_tokens;       // beside the model's own end-of-sequence ids
  std::vector<std::string> stop_strings;  // the match and what follows it are not in the text
  std::vector<std::pair<TokenId, float>> logit_bias;
  int top_logprobs =
      -1;  // -1: no logprobs; 0: the chosen token's; n: and the n most likely (natural log)
};

// FrameFusion parameters (arXiv 2501.01986; specs of the stage in engine/CONTRACT.md).
struct FrameFusionOptions {
  double cost = 0.3;  // average share of visual tokens present over the layers, (0, 1]
  double similarity_lower_bound = 0.6;  // cosine at or above which a pair merges
  double ratio_lower_bound = 0.1;  // merging ends after the first call whose merged share is below
  int budget_layers = 0;           // depth in the budget formula; 0: the model's real depth
  int importance_queries = 1;      // last queries whose attention ranks the tokens
  bool prune_text = true;          // text between visual rows may be pruned, as in the reference
  bool merge_separators = true;    // newline rows carry slots, as in the reference
};

// Which token-reduction stage a request uses.
struct Reduction {
  std::optional<FrameFusionOptions> framefusion;  // empty: no reduction
};

struct Request {
  std::vector<TokenId> prompt;  // kMediaToken marks where media[i] goes, in order
  std::vector<Media> media;
  Sampling sampling;
  Reduction reduction;
  // For evaluation and tests: keep float32 logits of every generated token (and of all prompt rows;
  // refused together with a reduction, whose dropped rows have none).
  bool return_logits = false;
  bool return_prompt_logits = false;
};

enum class FinishReason : uint8_t { kNone, kStop, kLength, kCancelled, kError };
// "stop", "length", "cancelled", "error"; "" for kNone.
std::string_view finish_reason_name(FinishReason reason);

struct TokenLogprob {
  TokenId token = 0;
  float logprob = 0.0f;
};

// One call of the reduction stage.
struct ReductionCall {
  int call = 0;  // 0: before attention of layer 0; l+1: after attention of layer l
  int rows_in = 0;
  int rows_out = 0;
  int visual_in = 0;
  int merged = 0;
  double share = 0.0;  // merged / visual_in
  double bound = 0.0;  // share that would meet the budget at once
  std::string
      branch;  // merge_continue | merge_and_stop | budget_topk | prune | noop | budget_missed
};

struct ReductionReport {
  std::string stage;  // "none", "framefusion"
  std::vector<ReductionCall> calls;
  double median_first_similarity =
      0.0;  // median cosine at call 0 over rows that have a predecessor
  double mean_kept_share =
      1.0;  // average over layers of visual rows present / visual rows at the start
  bool budget_missed = false;
};

struct Timings {
  double queue_ms = 0, vision_ms = 0, prefill_ms = 0, decode_ms = 0, reduction_ms = 0, total_ms = 0;
};

struct Usage {
  int prompt_tokens = 0;  // text tokens + visual rows before reduction
  int completion_tokens = 0;
  int visual_tokens = 0;              // visual rows before reduction
  int frames = 0;                     // frames and tiles of images and videos
  int frames_encoded = 0;             // those that went through the tower: no repeats in a video
  std::vector<int> kept_per_layer;    // rows that entered attention of each layer in prefill
  std::vector<int> visual_per_layer;  // visual rows among them
  int64_t kv_bytes = 0;               // bytes of KV pages held at the end
  int64_t kv_bytes_unreduced = 0;     // what they would be with every row kept
  Timings timings;
  ReductionReport reduction;
};

struct Event {
  TokenId token = -1;  // -1 in an event that only finishes
  std::string text;    // complete UTF-8; bytes of an unfinished character are held back
  std::optional<TokenLogprob> logprob;
  std::vector<TokenLogprob> top_logprobs;
  std::vector<float> logits;  // [vocab], if asked
  FinishReason finish = FinishReason::kNone;
  std::shared_ptr<const Usage> usage;  // with the finishing event
  std::shared_ptr<const std::vector<float>>
      prompt_logits;           // with the finishing event, if asked: [rows, vocab]
  std::optional<Error> error;  // with FinishReason::kError
};

}  // namespace fq
