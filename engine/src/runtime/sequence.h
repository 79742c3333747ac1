// One request while the engine works on it. Owned and touched by the engine thread only, except
// `stream`.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <vector>

#include "framequilt/request.h"
#include "src/core/aligned.h"
#include "src/kv/page_pool.h"
#include "src/reduction/stage.h"
#include "src/runtime/prompt_rows.h"
#include "src/runtime/sampler.h"
#include "src/runtime/stop_matcher.h"
#include "src/runtime/stream_state.h"

namespace fq::runtime {

using Clock = std::chrono::steady_clock;

inline double ms_between(Clock::time_point a, Clock::time_point b) {
  return std::chrono::duration<double, std::milli>(b - a).count();
}

enum class Phase : uint8_t {
  kWaiting,     // not admitted
  kVision,      // encoding media, a tower layer of one frame batch at a time
  kLayerMajor,  // reduced prefill, a decoder layer at a time
  kChunks,      // token-major prefill
  kDecode,
  kDone,
};

// Progress of the vision phase.
struct VisionProgress {
  size_t media = 0;                // item being encoded
  int first_frame = 0;             // of the batch
  int frames = 0;                  // in the batch
  std::vector<int> distinct;       // those of them that are encoded, ascending
  int layer = -1;                  // next layer; -1: the batch is not embedded yet
  AlignedBuffer<float> x;          // [distinct * patches, vision hidden]
  AlignedBuffer<float> projected;  // a video's batch, or all frames of an image
};

// Progress of a layer-major prefill.
struct LayerMajor {
  int layer = -1;  // next layer; -1: rows are not built yet
  int64_t rows = 0;
  AlignedBuffer<float> x;  // [rows, hidden]
  std::vector<int32_t> positions;
  std::vector<int32_t> visual;  // 1 where the row came from media
  std::unique_ptr<reduction::Stage> stage;
  reduction::RowPlan plan;
  std::vector<float> importance;
};

struct Sequence {
  Request request;
  PromptRows prompt;
  std::shared_ptr<Stream::Impl> stream;
  Phase phase = Phase::kWaiting;

  std::vector<kv::PageTable> tables;  // one per layer, made at admission
  std::vector<int64_t> reserved;      // per layer: pages promised and not taken yet
  AlignedBuffer<float> media_rows;    // [prompt.media_rows, hidden]; freed once consumed
  VisionProgress vision;
  LayerMajor layer_major;
  int64_t prefilled = 0;  // token-major: prompt rows done

  std::optional<Sampler> sampler;
  std::optional<StopMatcher> stop;
  int max_tokens = 0;  // request's, clamped to the context
  int generated = 0;
  TokenId last_token = 0;  // input of the next decode row
  std::vector<float> prompt_logits;

  Usage usage;
  Clock::time_point submitted = Clock::now();
  Clock::time_point admitted, prefill_started, decode_started;

  bool cancelled() const { return stream->cancel.load(std::memory_order_relaxed); }
  bool reduced() const {
    return request.reduction.framefusion.has_value() && prompt.media_rows > 0;
  }
};

}  // namespace fq::runtime
