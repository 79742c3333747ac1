// How the work of linears is cut into pieces and shared by threads, what a piece asks memory for
// ahead of time, and how its results are written: common to the float32, the integer and the
// bfloat16 linears. Included once per SIMD target.
#if defined(FRAMEQUILT_CPU_PIECES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_PIECES_INL_H_
#undef FRAMEQUILT_CPU_PIECES_INL_H_
#else
#define FRAMEQUILT_CPU_PIECES_INL_H_
#endif

#include <algorithm>
#include <optional>

#include "hwy/highway.h"
#include "src/backend/cpu/stream_cut.h"
#include "src/backend/cpu/tiles-inl.h"
#include "src/core/thread_pool.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

// --- What is needed next -------------------------------------------------------------------------

// The packed weights and group numbers of the panel after this one: a piece of each of some tiles
// of some tables. They are asked for a few lines at a time while this panel is multiplied. The
// pieces are too short for a hardware prefetcher, and without this unpacking waits for memory. Into
// the first cache level, full as it is: what is pushed out is still in the second, where the second
// alone took 1 % longer (vision tower, Zen 5).
class WeightsAhead {
 public:
  // Nothing where `tiles` is 0.
  explicit WeightsAhead(int64_t tiles) : tiles_(tiles) {}
  // `bytes` of each tile from `first` on, which is in the first of them.
  void Add(const void* first, int64_t tile_stride, int64_t bytes) {
    if (tiles_ <= 0 || bytes <= 0) return;
    tables_[count_++] = {static_cast<const std::byte*>(first), tile_stride, bytes};
    lines_ += tiles_ * ((bytes + kLine - 1) / kLine);
    if (count_ == 1) Enter();
  }

  int64_t lines() const { return lines_; }
  HWY_INLINE void Ask(int64_t lines) {
    for (; lines > 0 && table_ < count_; --lines) {
      __builtin_prefetch(at_);
      at_ += kLine;
      if (at_ < end_) continue;
      if (++tile_ == tiles_) {
        tile_ = 0;
        ++table_;
      }
      Enter();
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr int kMostTables = 4;  // codes, scales, zeros, offsets
  struct Table {
    const std::byte* first = nullptr;
    int64_t tile_stride = 0, bytes = 0;
  };
  void Enter() {
    const Table& t = tables_[std::min(table_, kMostTables - 1)];
    at_ = t.first + tile_ * t.tile_stride;
    end_ = at_ + t.bytes;
  }

  Table tables_[kMostTables];
  int64_t tiles_, lines_ = 0, tile_ = 0;
  int count_ = 0, table_ = 0;
  const std::byte *at_ = nullptr, *end_ = nullptr;
};

// Inputs [begin, end) of the tiles of `columns` columns from `column` on. Nothing behind the last
// column.
inline WeightsAhead AskFor(const LinearWeights& w, int64_t tile_stride, int64_t bytes_per_32,
                           int64_t column, int64_t columns, int64_t begin, int64_t end) {
  const int64_t tile = column / kTileRows;
  WeightsAhead ahead(std::clamp<int64_t>(w.tiles - tile, 0, columns / kTileRows));
  if (w.format.kind == model::WeightFormat::Kind::kAffine) {
    const int64_t group = begin / w.group, groups = (end - 1) / w.group + 1 - group;
    const auto size = static_cast<int64_t>(dtype_bytes(w.format.scale));
    const auto numbers = [&](const void* table, int64_t bytes) {
      if (table == nullptr) return;
      const int64_t stride = w.groups * kTileRows * bytes;
      ahead.Add(static_cast<const std::byte*>(table) + tile * stride + group * kTileRows * bytes,
                stride, groups * kTileRows * bytes);
    };
    numbers(w.scales, size);
    numbers(w.offsets, size);
    numbers(w.zeros, 1);
  }
  ahead.Add(static_cast<const std::byte*>(w.data) + tile * tile_stride + begin / 32 * bytes_per_32,
            tile_stride, (end - begin + 31) / 32 * bytes_per_32);
  return ahead;
}

// What a thread does that waits in a call of few rows (core/meanwhile.h): asks for the beginning of
// what it will read in the next one. Between two calls lie norms, attention and the handing out of
// work, in which memory would rest.
template <int64_t kLeast>
bool AskAhead(const ops::LinearsAhead& next, int thread, int threads, int64_t n) {
  const BytesAhead ahead = bytes_ahead(next, kLanes, kLeast, thread, threads, n);
  for (const BytesAhead::Part& part : ahead.parts) {
    for (int64_t i = 0; i < part.bytes; i += 64) __builtin_prefetch(part.begin + i, 0, 2);
  }
  return ahead.more;
}

// --- Results ---------------------------------------------------------------------------------

// Rows of a panel's results are far apart, and each begins with a miss: they are asked for while
// the sums are still growing.
HWY_INLINE void AskForOutputs(const ops::LinearArgs& args, int64_t row, int64_t rows,
                              int64_t column_begin, int64_t column_end) {
  const float* y = args.y + row * args.y_stride;
  for (; rows > 0; --rows, y += args.y_stride) {
    for (int64_t column = column_begin; column < column_end; column += 16)
      __builtin_prefetch(y + column, 0, 2);
  }
}

// Calls f with the activation as a function of a vector.
template <class F>
HWY_INLINE void WithActivation(const std::optional<model::Activation>& kind, const F& f) {
  if (!kind) return f([](VF x) FRAMEQUILT_INLINE { return x; });
  switch (*kind) {
    case model::Activation::kRelu:
      return f([](VF x) FRAMEQUILT_INLINE { return Relu(x); });
    case model::Activation::kGelu:
      return f([](VF x) FRAMEQUILT_INLINE { return Gelu(x); });
    case model::Activation::kGeluTanh:
      return f([](VF x) FRAMEQUILT_INLINE { return GeluTanh(x); });
    case model::Activation::kSilu:
      return f([](VF x) FRAMEQUILT_INLINE { return Silu(x); });
  }
}

// y[row, row + rows)[column, column + count) = act(sum + bias) and so on (ops::LinearArgs), where
// load(r, i) is the vector of sums of the r-th row from the i-th column on.
template <class Load>
HWY_INLINE void FinishRowsOf(const ops::LinearArgs& args, int64_t row, int64_t rows, int64_t column,
                             int64_t count, const Load& load) {
  const DF df;
  const float* const bias = args.w->bias != nullptr ? args.w->bias + column : nullptr;
  const bool accumulate = args.accumulate, multiply = args.multiply;
  WithActivation(args.activation, [&](const auto& act) FRAMEQUILT_INLINE {
    float* y = args.y + row * args.y_stride + column;
    for (int64_t r = 0; r < rows; ++r, y += args.y_stride) {
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) {
        VF sum = load(r, i);
        if (bias != nullptr) sum = hn::Add(sum, hn::LoadU(df, bias + i));
        sum = act(sum);
        if (accumulate) sum = hn::Add(sum, hn::LoadU(df, y + i));
        if (multiply) sum = hn::Mul(sum, hn::LoadU(df, y + i));
        hn::StoreU(sum, df, y + i);
      }
      if (i == count) continue;
      HWY_ALIGN float lanes[kLanes];
      hn::Store(load(r, i), df, lanes);
      for (int64_t k = 0; i + k < count && bias != nullptr; ++k) lanes[k] += bias[i + k];
      hn::Store(act(hn::Load(df, lanes)), df, lanes);
      for (int64_t k = 0; i + k < count; ++k) {
        float& to = y[i + k];
        to = accumulate ? lanes[k] + to : multiply ? lanes[k] * to : lanes[k];
      }
    }
  });
}

// Of whole vectors of sums, [rows][sum_stride]. Out of line: every kernel ends with this.
inline HWY_NOINLINE void FinishRows(const ops::LinearArgs& args, int64_t row, int64_t rows,
                                    int64_t column, int64_t count, const float* sums,
                                    int64_t sum_stride) {
  FinishRowsOf(args, row, rows, column, count, [&](int64_t r, int64_t i) FRAMEQUILT_INLINE {
    return hn::Load(DF(), sums + r * sum_stride + i);
  });
}

// The same of the first `count` of kUnits vectors of sums from unit `unit` on, for the lanes that
// are real outputs.
template <int kUnits>
HWY_INLINE void FinishUnits(const ops::LinearArgs& args, int64_t row, int64_t unit, int64_t count,
                            const VF* sums) {
  HWY_ALIGN float columns[kUnits * kLanes];
  Unrolled<kUnits>([&](auto u)
                       FRAMEQUILT_INLINE { hn::Store(sums[u], DF(), columns + u * kLanes); });
  FinishRows(args, row, 1, unit * kLanes,
             std::min<int64_t>(count * kLanes, args.w->out - unit * kLanes), columns, 0);
}

// --- Sharing the work ----------------------------------------------------------------------------

// Where the linears of a call (ops::LinearArgs::next) that are computed together end: `first` and
// those that multiply what it has written.
inline const ops::LinearArgs* EndOfRun(const ops::LinearArgs* first) {
  do first = first->next;
  while (first != nullptr && first->multiply);
  return first;
}

// For each of `blocks`, calls body(first, linear, block, piece) for the pieces [0, pieces(linear))
// of all linears of a call; `first` is of the linear's run. Neighbours go to the same thread; the
// linears of a run have the same pieces, and one follows the other.
template <class Pieces, class Body>
void ForPieces(const ops::LinearArgs& args, ThreadPool& pool, int64_t blocks, const Pieces& pieces,
               const Body& body, const ThreadPool::StreamOptions& options = {}) {
  int64_t total = 0;
  for (const ops::LinearArgs* run = &args; run != nullptr; run = EndOfRun(run))
    total += pieces(*run);
  const auto run_item = [&](int64_t item, int) {
    int64_t piece = item % total;
    const ops::LinearArgs* run = &args;
    for (int64_t n = pieces(*run); piece >= n; n = pieces(*run)) {
      piece -= n;
      run = EndOfRun(run);
    }
    const ops::LinearArgs* const end = EndOfRun(run);
    for (const ops::LinearArgs* one = run; one != end; one = one->next)
      body(*run, *one, item / total, piece);
  };
  pool.parallel_streams(blocks * total, run_item, options);
}

// Calls run(linear, unit, count) for all units of all linears of a call, in steps: few rows, where
// weights are read once. Each thread reads consecutive columns. `at_once`: units that `run`
// computes together, whether there are as many or not. The linears of a run take the steps of its
// first.
template <class Run>
void StreamSteps(const ops::LinearArgs& args, ThreadPool& pool, int64_t at_once, const Run& run) {
  ThreadPool::StreamOptions options{.short_items = true};
  if (args.ahead != nullptr) {
    options.meanwhile = at_once == 1 ? Meanwhile::of<AskAhead<1>>(*args.ahead)
                                     : Meanwhile::of<AskAhead<kStreamStep>>(*args.ahead);
  }
  ForPieces(
      args, pool, 1,
      [&](const ops::LinearArgs& one) { return StreamCut(*one.w, kLanes, at_once).steps; },
      [&](const ops::LinearArgs& first, const ops::LinearArgs& one, int64_t, int64_t piece) {
        const StreamCut cut(*first.w, kLanes, at_once);
        const int64_t unit = piece * cut.step;
        run(one, unit, std::min(cut.step, cut.units - unit));
      },
      options);
}

// One item of work on panels: some rows times some columns. `next` and `next_column`: where this
// thread is likely to go on.
struct PanelPiece {
  const ops::LinearArgs& args;
  int64_t row_begin, row_end, column_begin, column_end;
  const ops::LinearArgs& next;
  int64_t next_column;
};

constexpr int64_t kWorthUnpacking = 128;  // rows of a thread

// Calls run(piece) for all rows and columns of all linears of a call: many rows. A thread keeps to
// its rows as long as there are `least_rows` of them: other ops share rows in the same way, and
// what one has written is then in the cache of the core that reads it. Pieces begin at multiples of
// `row_unit` rows.
template <class Run>
void PanelPieces(const ops::LinearArgs& args, ThreadPool& pool, int64_t least_rows,
                 int64_t most_rows, int64_t most_columns, int64_t least_columns, int64_t row_unit,
                 const Run& run) {
  const int64_t own = std::clamp<int64_t>(args.rows / least_rows, 1, pool.threads());
  const int64_t blocks = own * ((args.rows + own * most_rows - 1) / (own * most_rows));
  const auto columns = [](const ops::LinearArgs& one) { return int64_t{one.w->tiles} * kTileRows; };
  // Narrow linears on many threads: smaller pieces.
  const auto width = [&](const ops::LinearArgs& one) {
    int64_t w = most_columns;
    while (w > least_columns && (columns(one) + w - 1) / w * blocks < 4 * pool.threads()) w /= 2;
    return w;
  };
  const auto groups = [&](const ops::LinearArgs& one) {
    const int64_t w = width(one);
    return (columns(one) + w - 1) / w;
  };
  const int64_t units = (args.rows + row_unit - 1) / row_unit;
  const auto first_row = [&](int64_t block) {
    return std::min(args.rows, units * block / blocks * row_unit);
  };
  ForPieces(
      args, pool, blocks, groups,
      [&](const ops::LinearArgs& first, const ops::LinearArgs& one, int64_t block, int64_t group) {
        const int64_t w = width(one), column = group * w;
        const bool in_run = one.next != nullptr && one.next->multiply;
        run(PanelPiece{.args = one,
                       .row_begin = first_row(block),
                       .row_end = first_row(block + 1),
                       .column_begin = column,
                       .column_end = std::min(columns(one), column + w),
                       .next = in_run ? *one.next : first,
                       .next_column = in_run ? column : (group + 1) % groups(one) * w});
      });
}

// Inputs of a panel: whole spans, at least one, as many as `most` inputs have, or fewer where that
// makes panels of even size.
inline int64_t EvenPanelInputs(int64_t inputs, int64_t span, int64_t most) {
  const int64_t spans = (inputs + span - 1) / span, at_once = std::max<int64_t>(1, most / span);
  const int64_t panels = (spans + at_once - 1) / at_once;
  return span * ((spans + panels - 1) / panels);
}

// The panels of one item: blocks of `inputs_at_once` of `inputs` inputs times `columns_at_once`
// columns. For each calls unpack(begin, end, column) and multiply(begin, end, column, before,
// after), which has to call before(first, count) and after(first, count) around the products of
// rows [first, first + count) of the item. finish(first, count, columns) writes the outputs of that
// many columns of these rows. ask_for(weights, column, begin): those of a panel.
template <class AskFor, class Unpack, class Multiply, class FinishRow>
HWY_INLINE void ForPanels(const PanelPiece& item, int64_t inputs, int64_t inputs_at_once,
                          int64_t columns_at_once, const AskFor& ask_for, const Unpack& unpack,
                          const Multiply& multiply, const FinishRow& finish) {
  const int64_t rows = item.row_end - item.row_begin;
  const LinearWeights& w = *item.args.w;
  const int64_t out_end = std::min<int64_t>(item.column_end, w.out);
  for (int64_t begin = 0; begin < inputs; begin += inputs_at_once) {
    const int64_t end = std::min(begin + inputs_at_once, inputs);
    for (int64_t column = item.column_begin; column < item.column_end; column += columns_at_once) {
      unpack(begin, end, column);
      const bool more_columns = column + columns_at_once < item.column_end;
      WeightsAhead ahead = more_columns   ? ask_for(w, column + columns_at_once, begin)
                           : end < inputs ? ask_for(w, item.column_begin, end)
                                          : ask_for(*item.next.w, item.next_column, 0);
      // As a fixed-point number: no division for every tile. Rounded up, so that most tiles ask for
      // equally many.
      const int64_t lines_per_row = ((ahead.lines() << 16) + rows - 1) / rows;
      const bool last = !more_columns && end == inputs;
      // With the last products, a tile's outputs are asked for before it and written after it, so
      // that the writing of one goes on while the next one is multiplied.
      const auto before = [&](int64_t first, int64_t count) {
        ahead.Ask((count * lines_per_row + 0xFFFF) >> 16);
        if (last)
          AskForOutputs(item.args, item.row_begin + first, count, item.column_begin, out_end);
      };
      const auto after = [&](int64_t first, int64_t count) {
        if (last) finish(first, count, out_end - item.column_begin);
      };
      multiply(begin, end, column, before, after);
    }
  }
}

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
