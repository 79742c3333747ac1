// Kernels of the ops that are cheap per row: norms, rotary embedding, activations, similarity. Same
// operations and order as the references. Scratch is per thread. Called by the engine thread, runs
// on the pool.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "src/backend/cpu/disabled_targets.h"
#include "src/backend/cpu/kernels.h"
#include "src/ops/rope.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/backend/cpu/rows.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/backend/cpu/math-inl.h"

#ifndef FRAMEQUILT_CPU_ROWS_ONCE
#define FRAMEQUILT_CPU_ROWS_ONCE
namespace fq::backend::cpu {

// Elements that are worth handing to another thread.
inline constexpr int64_t kItemElements = 16384;

// Calls body(begin, end) on consecutive runs of rows; neighbours go to the same thread, as in the
// linears.
template <class Body>
void for_row_blocks(int64_t rows, int64_t width, ThreadPool& pool, const Body& body) {
  if (rows == 0) return;
  const int64_t block = std::max<int64_t>(1, kItemElements / std::max<int64_t>(1, width));
  const int64_t blocks = (rows + block - 1) / block;
  pool.parallel_streams(blocks,
                        [&](int64_t i, int) { body(i * block, std::min(rows, (i + 1) * block)); });
}

// Cosines and sines by position, direct-mapped: the same positions come back for q, for k and in
// every layer.
class RopeCache {
 public:
  // cos [dims/2], then sin [dims/2].
  const float* row(const ops::RopeTable& table, int32_t position) {
    const size_t half = static_cast<size_t>(table.dims / 2);
    if (inv_freq_.size() != half ||
        !std::equal(inv_freq_.begin(), inv_freq_.end(), table.inv_freq)) {
      inv_freq_.assign(table.inv_freq, table.inv_freq + half);
      positions_.assign(kEntries, kEmpty);
      values_.resize(kEntries * 2 * half);
    }
    const size_t entry = static_cast<uint32_t>(position) % kEntries;
    float* const values = values_.data() + entry * 2 * half;
    if (positions_[entry] != position) {
      ops::rope_row(table, position, values, values + half);
      positions_[entry] = position;
    }
    return values;
  }

 private:
  static constexpr size_t kEntries = 2048;
  static constexpr int64_t kEmpty = INT64_MIN;
  std::vector<float> inv_freq_, values_;
  std::vector<int64_t> positions_;
};

inline RopeCache& thread_rope_cache() {
  static thread_local RopeCache cache;
  return cache;
}

}  // namespace fq::backend::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

// Sums f over a row: whole blocks of 16 by vectors, the rest lane by lane.
template <class Vector, class Scalar>
HWY_INLINE float SumRow(int64_t width, const Vector& vector, const Scalar& scalar) {
  LaneSums sums;
  int64_t i = 0;
  for (; i + kSumLanes <= width; i += kSumLanes) {
    Unrolled<LaneSums::kParts>([&](auto part) FRAMEQUILT_INLINE {
      sums.parts[part] = vector(i + part * kLanes, sums.parts[part]);
    });
  }
  HWY_ALIGN float lanes[kSumLanes];
  sums.Store(lanes);
  for (; i < width; ++i) lanes[i % kSumLanes] = scalar(i, lanes[i % kSumLanes]);
  return ops::add_lanes(lanes);
}

// y[i] = vector(i) by vectors, then scalar(i).
template <class Vector, class Scalar>
HWY_INLINE void MapRow(int64_t width, float* y, const Vector& vector, const Scalar& scalar) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) hn::StoreU(vector(i), DF(), y + i);
  for (; i < width; ++i) y[i] = scalar(i);
}

HWY_INLINE float SumSquares(const float* x, float minus, int64_t width) {
  const DF df;
  const VF m = hn::Set(df, minus);
  return SumRow(
      width,
      [&](int64_t i, VF sum) FRAMEQUILT_INLINE {
        const VF d = hn::Sub(hn::LoadU(df, x + i), m);
        return hn::MulAdd(d, d, sum);
      },
      [&](int64_t i, float sum)
          FRAMEQUILT_INLINE { return std::fma(x[i] - minus, x[i] - minus, sum); });
}

void RmsNorm(const ops::NormArgs& args, ThreadPool& pool) {
  for_row_blocks(args.rows, args.width, pool, [&](int64_t begin, int64_t end) {
    const DF df;
    for (int64_t row = begin; row < end; ++row) {
      const float* const x = args.x + row * args.width;
      const float mean = SumSquares(x, 0.0f, args.width) / static_cast<float>(args.width);
      const float scale = 1.0f / std::sqrt(mean + args.eps);
      MapRow(
          args.width, args.y + row * args.width,
          [&](int64_t i) FRAMEQUILT_INLINE {
            return hn::Mul(hn::Mul(hn::LoadU(df, x + i), hn::Set(df, scale)),
                           hn::LoadU(df, args.weight + i));
          },
          [&](int64_t i) FRAMEQUILT_INLINE { return x[i] * scale * args.weight[i]; });
    }
  });
}

void LayerNorm(const ops::NormArgs& args, ThreadPool& pool) {
  for_row_blocks(args.rows, args.width, pool, [&](int64_t begin, int64_t end) {
    const DF df;
    for (int64_t row = begin; row < end; ++row) {
      const float* const x = args.x + row * args.width;
      const float sum = SumRow(
          args.width,
          [&](int64_t i, VF s) FRAMEQUILT_INLINE { return hn::Add(s, hn::LoadU(df, x + i)); },
          [&](int64_t i, float s) FRAMEQUILT_INLINE { return s + x[i]; });
      const float mean = sum / static_cast<float>(args.width);
      const float variance = SumSquares(x, mean, args.width) / static_cast<float>(args.width);
      const float scale = 1.0f / std::sqrt(variance + args.eps);
      MapRow(
          args.width, args.y + row * args.width,
          [&](int64_t i) FRAMEQUILT_INLINE {
            const VF centred = hn::Sub(hn::LoadU(df, x + i), hn::Set(df, mean));
            const VF y =
                hn::Mul(hn::Mul(centred, hn::Set(df, scale)), hn::LoadU(df, args.weight + i));
            return args.bias != nullptr ? hn::Add(y, hn::LoadU(df, args.bias + i)) : y;
          },
          [&](int64_t i) FRAMEQUILT_INLINE {
            const float y = (x[i] - mean) * scale * args.weight[i];
            return args.bias != nullptr ? y + args.bias[i] : y;
          });
    }
  });
}

void Rope(const ops::RopeArgs& args, ThreadPool& pool) {
  const int64_t half = args.table.dims / 2;
  for_row_blocks(args.rows, int64_t{args.heads} * args.head_dim, pool,
                 [&](int64_t begin, int64_t end) {
                   const DF df;
                   RopeCache& cache = thread_rope_cache();
                   for (int64_t row = begin; row < end; ++row) {
                     const float* const cos = cache.row(args.table, args.positions[row]);
                     const float* const sin = cos + half;
                     for (int head = 0; head < args.heads; ++head) {
                       float* const x = args.x + row * args.stride + int64_t{head} * args.head_dim;
                       int64_t i = 0;
                       for (; i + kLanes <= half; i += kLanes) {
                         const VF a = hn::LoadU(df, x + i), b = hn::LoadU(df, x + i + half);
                         const VF c = hn::LoadU(df, cos + i), s = hn::LoadU(df, sin + i);
                         hn::StoreU(hn::Sub(hn::Mul(a, c), hn::Mul(b, s)), df, x + i);
                         hn::StoreU(hn::Add(hn::Mul(b, c), hn::Mul(a, s)), df, x + i + half);
                       }
                       for (; i < half; ++i) {
                         const float a = x[i], b = x[i + half];
                         x[i] = a * cos[i] - b * sin[i];
                         x[i + half] = b * cos[i] + a * sin[i];
                       }
                     }
                   }
                 });
}

template <class Function>
HWY_INLINE void Activate(const ops::ActivationArgs& args, ThreadPool& pool,
                         const Function& function) {
  for_row_blocks(args.count, 1, pool, [&](int64_t begin, int64_t end) {
    const DF df;
    const auto at = [&](const float* x, const float* gate) FRAMEQUILT_INLINE {
      const VF y = function(hn::LoadU(df, x));
      return args.gate != nullptr ? hn::Mul(y, hn::LoadU(df, gate)) : y;
    };
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      hn::StoreU(at(args.x + i, args.gate == nullptr ? nullptr : args.gate + i), df, args.y + i);
    }
    if (i < end) {
      float x[kLanes] = {}, gate[kLanes] = {}, y[kLanes];
      const size_t bytes = static_cast<size_t>(end - i) * sizeof(float);
      std::memcpy(x, args.x + i, bytes);
      if (args.gate != nullptr) std::memcpy(gate, args.gate + i, bytes);
      hn::StoreU(at(x, gate), df, y);
      std::memcpy(args.y + i, y, bytes);
    }
  });
}

void ActivateRelu(const ops::ActivationArgs& args, ThreadPool& pool) {
  Activate(args, pool, [](VF x) FRAMEQUILT_INLINE { return Relu(x); });
}
void ActivateGelu(const ops::ActivationArgs& args, ThreadPool& pool) {
  Activate(args, pool, [](VF x) FRAMEQUILT_INLINE { return Gelu(x); });
}
void ActivateGeluTanh(const ops::ActivationArgs& args, ThreadPool& pool) {
  Activate(args, pool, [](VF x) FRAMEQUILT_INLINE { return GeluTanh(x); });
}
void ActivateSilu(const ops::ActivationArgs& args, ThreadPool& pool) {
  Activate(args, pool, [](VF x) FRAMEQUILT_INLINE { return Silu(x); });
}

HWY_INLINE float Dot(const float* a, const float* b, int64_t width) {
  const DF df;
  return SumRow(
      width,
      [&](int64_t i, VF sum)
          FRAMEQUILT_INLINE { return hn::MulAdd(hn::LoadU(df, a + i), hn::LoadU(df, b + i), sum); },
      [&](int64_t i, float sum) FRAMEQUILT_INLINE { return std::fma(a[i], b[i], sum); });
}

void Similarity(const ops::SimilarityArgs& args, ThreadPool& pool) {
  for_row_blocks(args.rows, args.width, pool, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (args.prev[row] < 0) {
        args.out[row] = ops::kNoSimilarity;
        continue;
      }
      const float* const a = args.x + row * args.stride;
      const float* const b = args.x + args.prev[row] * args.stride;
      args.out[row] =
          ops::cosine(Dot(a, b, args.width), Dot(a, a, args.width), Dot(b, b, args.width));
    }
  });
}

#else  // one-lane targets: never chosen, see simd_targets()

void RmsNorm(const ops::NormArgs& args, ThreadPool& pool) { scalar_kernels().rms_norm(args, pool); }
void LayerNorm(const ops::NormArgs& args, ThreadPool& pool) {
  scalar_kernels().layer_norm(args, pool);
}
void Rope(const ops::RopeArgs& args, ThreadPool& pool) { scalar_kernels().rope(args, pool); }
void ActivateRelu(const ops::ActivationArgs& args, ThreadPool& pool) {
  scalar_kernels().activation[0](args, pool);
}
void ActivateGelu(const ops::ActivationArgs& args, ThreadPool& pool) {
  scalar_kernels().activation[1](args, pool);
}
void ActivateGeluTanh(const ops::ActivationArgs& args, ThreadPool& pool) {
  scalar_kernels().activation[2](args, pool);
}
void ActivateSilu(const ops::ActivationArgs& args, ThreadPool& pool) {
  scalar_kernels().activation[3](args, pool);
}
void Similarity(const ops::SimilarityArgs& args, ThreadPool& pool) {
  scalar_kernels().similarity(args, pool);
}

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fq::backend::cpu {

HWY_EXPORT(RmsNorm);
HWY_EXPORT(LayerNorm);
HWY_EXPORT(Rope);
HWY_EXPORT(ActivateRelu);
HWY_EXPORT(ActivateGelu);
HWY_EXPORT(ActivateGeluTanh);
HWY_EXPORT(ActivateSilu);
HWY_EXPORT(Similarity);

void fill_row_kernels(Kernels& kernels) {
  using model::Activation;
  kernels.rms_norm = &HWY_DYNAMIC_DISPATCH(RmsNorm);
  kernels.layer_norm = &HWY_DYNAMIC_DISPATCH(LayerNorm);
  kernels.rope = &HWY_DYNAMIC_DISPATCH(Rope);
  const auto set = [&](Activation kind, ActivationFn fn) {
    kernels.activation[static_cast<size_t>(kind)] = fn;
  };
  set(Activation::kRelu, &HWY_DYNAMIC_DISPATCH(ActivateRelu));
  set(Activation::kGelu, &HWY_DYNAMIC_DISPATCH(ActivateGelu));
  set(Activation::kGeluTanh, &HWY_DYNAMIC_DISPATCH(ActivateGeluTanh));
  set(Activation::kSilu, &HWY_DYNAMIC_DISPATCH(ActivateSilu));
  kernels.similarity = &HWY_DYNAMIC_DISPATCH(Similarity);
}

}  // namespace fq::backend::cpu
#endif  // HWY_ONCE
