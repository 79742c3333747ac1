#include "src/runtime/executor.h"

#include <algorithm>
#include <cassert>
#include <cstring>

namespace fq::runtime {
namespace {

constexpr int64_t kHeadRows = 16;  // rows whose logits exist at once

// Makes room in a layer for `rows` more. The pages were promised at admission, so they are there.
void append_rows(Sequence& sequence, size_t layer, int64_t rows) {
  const int64_t taken = sequence.tables[layer].append(rows);
  assert(taken >= 0);
  sequence.reserved[layer] -= taken;
}

// Frames encoded together: enough rows to keep the kernels busy, few enough to cancel quickly.
int64_t frames_per_batch(const blocks::Vision& vision, int64_t chunk_rows) {
  return std::max<int64_t>(1, 2 * chunk_rows / vision.patches());
}

// Rows of an item that logits are made of: nothing reads the others after the last layer.
constexpr auto rows_read = [](const BatchItem& item) -> int64_t {
  const Sequence& sequence = *item.sequence;
  if (sequence.phase == Phase::kDecode || sequence.request.return_prompt_logits) return item.rows;
  return sequence.prefilled + item.rows == sequence.prompt.rows() ? 1 : 0;
};

int64_t scratch_floats(const blocks::Decoder& decoder, const blocks::Vision* vision,
                       int64_t chunk_rows, int64_t max_rows) {
  int64_t floats = decoder.scratch_floats(max_rows);
  if (vision != nullptr)
    floats = std::max(floats, vision->scratch_floats(frames_per_batch(*vision, chunk_rows)));
  return floats;
}

}  // namespace

Executor::Executor(const blocks::Decoder& decoder, const blocks::Vision* vision,
                   const backend::Backend& backend, ThreadPool& pool, int chunk_rows,
                   int max_sequences)
    : decoder_(decoder),
      vision_(vision),
      backend_(backend),
      pool_(pool),
      chunk_rows_(chunk_rows),
      max_rows_(int64_t{chunk_rows} + max_sequences) {
  const int64_t hidden = decoder.spec().hidden;
  x_.reserve(static_cast<size_t>(max_rows_ * hidden));
  scratch_.reserve(static_cast<size_t>(scratch_floats(decoder, vision, chunk_rows, max_rows_)));
  head_rows_.reserve(static_cast<size_t>(2 * kHeadRows * hidden));
  logits_.reserve(static_cast<size_t>(kHeadRows * decoder.spec().vocab));
  positions_.resize(static_cast<size_t>(max_rows_));
  segments_.reserve(static_cast<size_t>(max_sequences));
  attention_items_.reserve(static_cast<size_t>(max_sequences));
}

uint64_t Executor::workspace_bytes(const blocks::Decoder& decoder, const blocks::Vision* vision,
                                   int chunk_rows, int max_sequences) {
  const int64_t hidden = decoder.spec().hidden;
  const int64_t max_rows = int64_t{chunk_rows} + max_sequences;
  const int64_t floats = max_rows * hidden + scratch_floats(decoder, vision, chunk_rows, max_rows) +
                         2 * kHeadRows * hidden + kHeadRows * decoder.spec().vocab;
  return static_cast<uint64_t>(floats) * sizeof(float);
}

void Executor::fill_row(const Sequence& sequence, int64_t prompt_row, float* out) const {
  const int32_t source = sequence.prompt.source[static_cast<size_t>(prompt_row)];
  if (source >= 0) {
    decoder_.embed(source, out);
  } else {
    const int64_t hidden = decoder_.spec().hidden;
    std::memcpy(out, sequence.media_rows.data() + int64_t{-(source + 1)} * hidden,
                static_cast<size_t>(hidden) * sizeof(float));
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Vision

void Executor::begin_vision_batch(Sequence& sequence) {
  VisionProgress& progress = sequence.vision;
  const Media& media = sequence.request.media[progress.media];
  const int64_t frame_floats = int64_t{vision_->spec().channels} * media.height * media.width;
  const float* const pixels = media.data.data();
  // A frame of a video that is the one before again has its rows. Still pictures, slides and
  // screens have many of them.
  const auto repeats = [&](int frame) {
    const float* const at = pixels + frame * frame_floats;
    return media.kind == MediaKind::kVideo && frame > progress.first_frame &&
           std::memcmp(at, at - frame_floats, static_cast<size_t>(frame_floats) * sizeof(float)) ==
               0;
  };
  const int64_t most = frames_per_batch(*vision_, chunk_rows_);
  std::vector<int>& distinct = progress.distinct;
  distinct.clear();
  int end = progress.first_frame;
  for (; end < media.frames; ++end) {
    if (repeats(end)) continue;
    if (std::ssize(distinct) == most) break;
    distinct.push_back(end);
  }
  progress.frames = end - progress.first_frame;
  sequence.usage.frames += progress.frames;
  sequence.usage.frames_encoded += static_cast<int>(distinct.size());

  const int64_t patches = vision_->patches();
  progress.x.reserve(distinct.size() * static_cast<size_t>(patches * vision_->spec().hidden));
  // An image is arranged as a whole, a video batch by batch.
  const size_t kept =
      media.kind == MediaKind::kImage ? static_cast<size_t>(media.frames) : distinct.size();
  progress.projected.reserve(kept * static_cast<size_t>(patches * vision_->output_width()));
  for (size_t i = 0, next = 0; i < distinct.size(); i = next) {
    next = i + 1;  // frames that follow each other are embedded together
    while (next < distinct.size() && distinct[next] == distinct[next - 1] + 1) ++next;
    vision_->embed(pixels + distinct[i] * frame_floats, static_cast<int64_t>(next - i),
                   progress.x.data() + static_cast<int64_t>(i) * patches * vision_->spec().hidden,
                   scratch_.data(), pool_);
  }
  progress.layer = 0;
}

void Executor::end_vision_batch(Sequence& sequence) {
  VisionProgress& progress = sequence.vision;
  const Media& media = sequence.request.media[progress.media];
  const std::vector<int>& distinct = progress.distinct;
  const int64_t frame_floats = int64_t{vision_->patches()} * vision_->output_width();
  const bool image = media.kind == MediaKind::kImage;
  float* projected = progress.projected.data() + (image ? progress.first_frame * frame_floats : 0);
  vision_->project(progress.x.data(), std::ssize(distinct), projected, scratch_.data(), pool_);
  float* out = sequence.media_rows.data() +
               sequence.prompt.spans[progress.media].media_row * int64_t{decoder_.spec().hidden};
  progress.first_frame += progress.frames;
  if (!image) {
    for (size_t i = 0; i < distinct.size(); ++i) {
      const int end = i + 1 < distinct.size() ? distinct[i + 1] : progress.first_frame;
      const float* const rows = projected + static_cast<int64_t>(i) * frame_floats;
      for (int frame = distinct[i]; frame < end; ++frame)
        vision_->arrange_video(media, frame, 1, rows, out);
    }
  }
  progress.layer = -1;
  if (progress.first_frame == media.frames) {
    if (image) vision_->arrange_image(media, progress.projected.data(), out);
    progress.first_frame = 0;
    ++progress.media;
  }
}

bool Executor::vision_unit(Sequence& sequence) {
  const auto start = Clock::now();
  VisionProgress& progress = sequence.vision;
  const auto& media = sequence.request.media;
  const int64_t hidden = decoder_.spec().hidden;
  sequence.media_rows.reserve(static_cast<size_t>(sequence.prompt.media_rows * hidden));
  // Ready-made rows cost nothing: copy them on the way.
  while (progress.media < media.size() && media[progress.media].kind == MediaKind::kEmbedding) {
    std::copy(
        media[progress.media].data.begin(), media[progress.media].data.end(),
        sequence.media_rows.data() + sequence.prompt.spans[progress.media].media_row * hidden);
    ++progress.media;
  }
  if (progress.media < media.size()) {
    if (progress.layer < 0) begin_vision_batch(sequence);
    if (progress.layer < vision_->layers()) {
      vision_->layer(progress.layer++, progress.x.data(), std::ssize(progress.distinct),
                     scratch_.data(), pool_);
    }
    if (progress.layer == vision_->layers()) end_vision_batch(sequence);
  }
  sequence.usage.timings.vision_ms += ms_between(start, Clock::now());
  if (progress.media < media.size()) return false;
  progress = VisionProgress();
  for (Media& item : sequence.request.media) item.data = {};  // the pixels are not needed any more
  return true;
}

// ---------------------------------------------------------------------------------------------------------------
// Layer-major prefill

Status Executor::begin_layer_major(Sequence& sequence) {
  LayerMajor& state = sequence.layer_major;
  const int64_t hidden = decoder_.spec().hidden;
  state.rows = sequence.prompt.rows();
  FQ_ASSIGN_OR_RETURN(state.stage, reduction::make_stage(sequence.request.reduction,
                                                         {.slots = sequence.prompt.slots,
                                                          .period = sequence.prompt.period,
                                                          .layers = decoder_.spec().layers},
                                                         backend_));
  state.x.reserve(static_cast<size_t>(state.rows * hidden));
  state.positions.resize(static_cast<size_t>(state.rows));
  state.visual.resize(static_cast<size_t>(state.rows));
  for (int64_t i = 0; i < state.rows; ++i) {
    fill_row(sequence, i, state.x.data() + i * hidden);
    state.positions[static_cast<size_t>(i)] = static_cast<int32_t>(i);
    state.visual[static_cast<size_t>(i)] = sequence.prompt.source[static_cast<size_t>(i)] < 0;
  }
  sequence.media_rows = {};
  reduce(sequence, 0, nullptr);
  state.layer = 0;
  return {};
}

void Executor::reduce(Sequence& sequence, int call, const float* importance) {
  LayerMajor& state = sequence.layer_major;
  if (state.stage->finished()) return;
  const auto start = Clock::now();
  const int64_t hidden = decoder_.spec().hidden;
  state.stage->decide({.call = call,
                       .x = state.x.data(),
                       .stride = hidden,
                       .rows = state.rows,
                       .width = hidden,
                       .importance = importance},
                      &state.plan, pool_);
  int32_t* columns[] = {state.positions.data(), state.visual.data()};
  state.rows =
      reduction::apply_plan(state.plan, state.x.data(), hidden, state.rows, hidden, columns);
  sequence.usage.timings.reduction_ms += ms_between(start, Clock::now());
}

Result<bool> Executor::layer_unit(Sequence& sequence, LogitsFn on_logits) {
  const auto start = Clock::now();
  LayerMajor& state = sequence.layer_major;
  if (state.layer < 0) FQ_RETURN_IF_ERROR(begin_layer_major(sequence));
  const int64_t hidden = decoder_.spec().hidden;
  const int layer_index = state.layer;
  const blocks::DecoderLayer& layer = decoder_.layers()[static_cast<size_t>(layer_index)];
  kv::PageTable& table = sequence.tables[static_cast<size_t>(layer_index)];

  sequence.usage.kept_per_layer.push_back(static_cast<int>(state.rows));
  sequence.usage.visual_per_layer.push_back(
      static_cast<int>(std::count(state.visual.begin(), state.visual.begin() + state.rows, 1)));

  // Queries of the last rows are needed after attention has changed x, so they are taken first.
  const int queries = static_cast<int>(
      std::min<int64_t>(state.stage->importance_queries(layer_index + 1), state.rows));
  std::vector<float> q;
  if (queries > 0) {
    q.resize(static_cast<size_t>(queries) * decoder_.spec().attention.heads *
             decoder_.spec().attention.head_dim);
    const int64_t first = state.rows - queries;
    layer.attention.queries(state.x.data() + first * hidden, queries,
                            state.positions.data() + first, q.data(), scratch_.data(), pool_);
  }

  // After the last layer only the last row is read, unless a reduction looks at the others.
  const bool last_layer = layer_index + 1 == decoder_.spec().layers;
  const bool read_all = !last_layer || !state.stage->finished();
  for (int64_t begin = 0; begin < state.rows; begin += chunk_rows_) {
    const int64_t rows = std::min(chunk_rows_, state.rows - begin);
    append_rows(sequence, static_cast<size_t>(layer_index), rows);
    const blocks::KvSegment segment{.row = 0, .rows = rows, .begin = begin, .pages = table.pages()};
    float* const x = state.x.data() + begin * hidden;
    const int32_t* const positions = state.positions.data() + begin;
    if (read_all) {
      layer.attention.forward(x, rows, positions, {&segment, 1}, scratch_.data(), &attention_items_,
                              pool_);
    } else {
      layer.attention.append(x, rows, positions, {&segment, 1}, scratch_.data(), pool_);
    }
    if (sequence.cancelled()) return false;
  }
  if (!read_all) {
    const int64_t begin = state.rows - 1;
    const blocks::KvSegment segment{.row = 0, .rows = 1, .begin = begin, .pages = table.pages()};
    layer.attention.attend(state.x.data() + begin * hidden, 1, state.positions.data() + begin,
                           {&segment, 1}, scratch_.data(), &attention_items_, pool_);
  }

  const float* importance = nullptr;
  if (queries > 0) {
    state.importance.resize(static_cast<size_t>(state.rows));
    layer.attention.importance(q.data(), queries, table.pages(), state.rows,
                               state.importance.data(), pool_);
    importance = state.importance.data();
  }
  reduce(sequence, layer_index + 1, importance);

  for (int64_t begin = last_layer ? state.rows - 1 : 0; begin < state.rows; begin += chunk_rows_) {
    const int64_t rows = std::min(chunk_rows_, state.rows - begin);
    layer.mlp.forward(state.x.data() + begin * hidden, rows, scratch_.data(), pool_);
    if (sequence.cancelled()) return false;
  }
  ++state.layer;
  if (last_layer) {
    std::memcpy(head_rows_.data(), state.x.data() + (state.rows - 1) * hidden,
                static_cast<size_t>(hidden) * sizeof(float));
    decoder_.head(head_rows_.data(), 1, logits_.data(), head_rows_.data() + kHeadRows * hidden,
                  pool_);
    sequence.usage.reduction = state.stage->report();
    sequence.prefilled = sequence.prompt.rows();
    state = LayerMajor();
  }
  sequence.usage.timings.prefill_ms += ms_between(start, Clock::now());
  if (last_layer) on_logits(sequence, {logits_.data(), static_cast<size_t>(decoder_.spec().vocab)});
  return last_layer;
}

// ---------------------------------------------------------------------------------------------------------------
// Token-major pass

int64_t Executor::compact(std::span<BatchItem> items, FunctionRef<int64_t(const BatchItem&)> keep) {
  const int64_t hidden = decoder_.spec().hidden;
  int64_t out = 0;
  for (BatchItem& item : items) {
    if (item.dropped) continue;
    const int64_t kept = keep(item);
    const int64_t from = item.row + item.live - kept;
    if (from != out) {
      std::memmove(x_.data() + out * hidden, x_.data() + from * hidden,
                   static_cast<size_t>(kept * hidden) * sizeof(float));
      std::copy_n(positions_.begin() + from, kept, positions_.begin() + out);
    }
    item.row = out;
    item.live = kept;
    out += kept;
  }
  return out;
}

int64_t Executor::drop_cancelled(std::span<BatchItem> items) {
  for (BatchItem& item : items) item.dropped = item.dropped || item.sequence->cancelled();
  return compact(items, [](const BatchItem& item) { return item.live; });
}

void Executor::set_segments(std::span<const BatchItem> items, size_t layer) {
  segments_.clear();
  for (const BatchItem& item : items) {
    if (item.dropped || item.live == 0) continue;
    const kv::PageTable& table = item.sequence->tables[layer];
    segments_.push_back({.row = item.row,
                         .rows = item.live,
                         .begin = table.length() - item.live,
                         .pages = table.pages()});
  }
}

void Executor::collect_prompt_logits(const BatchItem& item) {
  Sequence& sequence = *item.sequence;
  const int64_t hidden = decoder_.spec().hidden;
  const int64_t vocab = decoder_.spec().vocab;
  for (int64_t begin = 0; begin < item.rows; begin += kHeadRows) {
    const int64_t rows = std::min(kHeadRows, item.rows - begin);
    decoder_.head(x_.data() + (item.row + begin) * hidden, rows, logits_.data(), scratch_.data(),
                  pool_);
    sequence.prompt_logits.insert(sequence.prompt_logits.end(), logits_.data(),
                                  logits_.data() + rows * vocab);
  }
}

void Executor::token_pass(std::span<BatchItem> items, LogitsFn on_logits) {
  const auto start = Clock::now();
  const int64_t hidden = decoder_.spec().hidden;
  int64_t rows = 0;
  for (BatchItem& item : items) {
    const Sequence& sequence = *item.sequence;
    item.row = rows;
    item.live = item.rows;
    for (int64_t i = 0; i < item.rows; ++i) {
      float* out = x_.data() + (rows + i) * hidden;
      if (sequence.phase == Phase::kDecode) {
        decoder_.embed(sequence.last_token, out);
        positions_[static_cast<size_t>(rows + i)] =
            static_cast<int32_t>(sequence.prompt.rows() + sequence.generated - 1);
      } else {
        fill_row(sequence, sequence.prefilled + i, out);
        positions_[static_cast<size_t>(rows + i)] = static_cast<int32_t>(sequence.prefilled + i);
      }
    }
    rows += item.rows;
  }

  for (size_t l = 0; l < decoder_.layers().size(); ++l) {
    rows = drop_cancelled(items);
    if (rows == 0) return;
    int64_t read = 0;
    for (const BatchItem& item : items) {
      if (item.dropped) continue;
      append_rows(*item.sequence, l, item.rows);
      read += rows_read(item);
    }
    set_segments(items, l);
    const blocks::DecoderLayer& layer = decoder_.layers()[l];
    if (l + 1 < decoder_.layers().size() || read == rows) {
      layer.attention.forward(x_.data(), rows, positions_.data(), segments_, scratch_.data(),
                              &attention_items_, pool_);
    } else {
      layer.attention.append(x_.data(), rows, positions_.data(), segments_, scratch_.data(), pool_);
      rows = compact(items, rows_read);
      if (rows == 0) break;
      set_segments(items, l);
      layer.attention.attend(x_.data(), rows, positions_.data(), segments_, scratch_.data(),
                             &attention_items_, pool_);
    }
    layer.mlp.forward(x_.data(), rows, scratch_.data(), pool_);
  }

  // Logits of rows that end a prompt or decode, kHeadRows at a time.
  BatchItem* pending[kHeadRows];
  int64_t count = 0;
  const auto flush = [&] {
    if (count == 0) return;
    decoder_.head(head_rows_.data(), count, logits_.data(), head_rows_.data() + kHeadRows * hidden,
                  pool_);
    const double ms = ms_between(start, Clock::now());
    for (int64_t i = 0; i < count; ++i) {
      Sequence& sequence = *pending[i]->sequence;
      const bool decode = sequence.phase == Phase::kDecode;
      (decode ? sequence.usage.timings.decode_ms : sequence.usage.timings.prefill_ms) += ms;
      const size_t vocab = static_cast<size_t>(decoder_.spec().vocab);
      on_logits(sequence, {logits_.data() + static_cast<size_t>(i) * vocab, vocab});
    }
    count = 0;
  };
  for (BatchItem& item : items) {
    if (item.dropped) continue;
    Sequence& sequence = *item.sequence;
    if (sequence.phase == Phase::kChunks) {
      if (sequence.request.return_prompt_logits) collect_prompt_logits(item);
      sequence.prefilled += item.rows;
      if (sequence.prefilled < sequence.prompt.rows()) {
        sequence.usage.timings.prefill_ms += ms_between(start, Clock::now());
        continue;
      }
      sequence.media_rows = {};
    }
    std::memcpy(head_rows_.data() + count * hidden, x_.data() + (item.row + item.live - 1) * hidden,
                static_cast<size_t>(hidden) * sizeof(float));
    pending[count++] = &item;
    if (count == kHeadRows) flush();
  }
  flush();
}

}  // namespace fq::runtime
