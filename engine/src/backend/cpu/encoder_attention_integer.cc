// Encoder attention with 8-bit queries and keys: ops/integer_attention.cc, head by head, a tile of
// query rows at once. How codes lie in memory, and the products, are the target's: words of vectors
// (word_encoder-inl.h) or tiles of AMX (amx_encoder-inl.h). Called by the engine thread, runs on
// the pool.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#define FRAMEQUILT_WANT_VNNI 1
#include "src/backend/cpu/attention_scratch.h"
#include "src/backend/cpu/disabled_targets.h"
#include "src/backend/cpu/kernels.h"
#include "src/ops/integer_attention.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/backend/cpu/encoder_attention_integer.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/backend/cpu/amx_encoder-inl.h"
#include "src/backend/cpu/integer_inputs-inl.h"
#include "src/backend/cpu/pages-inl.h"
#include "src/backend/cpu/word_encoder-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
inline namespace FRAMEQUILT_DOT_NAMESPACE {
#if FRAMEQUILT_HAVE_DOT

#if FRAMEQUILT_HAVE_AMX
using EncoderCodes = EncoderTiles;
#else
using EncoderCodes = EncoderWords;
#endif

constexpr int64_t kTileQueries = EncoderCodes::kQueries;
constexpr int64_t kValueTokens = 4;  // tokens whose values are stored together
constexpr int64_t kRowsAhead = 16;
constexpr int64_t kLineFloats = 16;
constexpr int kCodeBits = 8;  // of queries and keys, symmetric

// One head of one frame: its codes, then a tile of queries after the other.
struct Head {
  const ops::EncoderAttentionArgs& args;
  EncoderAttentionScratch& s;
  int64_t base;  // of its first row in q, k, v and out
  int64_t tokens, dims;
  int64_t stride;  // dims in whole vectors
  EncoderCodes codes;

  Head(const ops::EncoderAttentionArgs& a, EncoderAttentionScratch& scratch, int64_t item)
      : args(a),
        s(scratch),
        base(item / a.heads * a.tokens * a.stride + item % a.heads * a.head_dim),
        tokens(a.tokens),
        dims(a.head_dim),
        stride(RoundUp(a.head_dim, kLanes)),
        codes(scratch, a.tokens, a.head_dim) {}

  void Reserve() const {
    const auto reserve = [](auto& buffer, int64_t count) {
      buffer.reserve(static_cast<size_t>(count));
    };
    reserve(s.rows, (tokens + kValueTokens - 1) * stride);
    reserve(s.codes, stride);
    reserve(s.v_scales, stride);
    codes.Reserve();
  }

  // A vector of a row of the head from channel d on, with zeros behind the last one.
  HWY_INLINE VF LoadPart(const float* row, int64_t d) const {
    const DF df;
    if (d + kLanes <= dims) return hn::LoadU(df, row + d);
#if HWY_TARGET <= HWY_AVX3
    // Not a whole vector that would reach into a line of the next head, which nobody asked for.
    const hn::Half<DF> half;
    if (d + kLanes / 2 >= dims) {
      const auto some = hn::FirstN(half, static_cast<size_t>(dims - d));
      return hn::ZeroExtendVector(df, hn::MaskedLoad(some, half, row + d));
    }
#endif
#if HWY_TARGET <= HWY_AVX2
    return hn::MaskedLoad(hn::FirstN(df, static_cast<size_t>(dims - d)), df, row + d);
#else  // reads whole vectors there
    HWY_ALIGN float lanes[kLanes] = {};
    std::memcpy(lanes, row + d, static_cast<size_t>(dims - d) * sizeof(float));
    return hn::Load(df, lanes);
#endif
  }

  // A row of q, k or v, whose rows of one head are pages apart: none would be there in time. So a
  // later row is asked for as well.
  HWY_INLINE const float* Row(const float* from, int64_t row) const {
    const float* const at = from + base + row * args.stride;
    if (row + kRowsAhead < tokens) {
      for (int64_t d = 0; d < dims; d += kLineFloats)
        __builtin_prefetch(at + kRowsAhead * args.stride + d);
    }
    return at;
  }

  // Writes the codes of a row, less `mean` if there is one, and returns their scale, NaN of values
  // that are not finite. QuantizeRow would need the row copied first, and asks what is known here.
  template <bool kMean>
  HWY_INLINE float Quantize(const float* from, const float* mean, int32_t* sum) const {
    const DF df;
    VF largest = hn::Zero(df), odd = hn::Zero(df);
    float* const row = s.rows.data();
    for (int64_t d = 0; d < stride; d += kLanes) {
      VF v = LoadPart(from, d);
      if constexpr (kMean) v = hn::Sub(v, hn::Load(df, mean + d));
      largest = hn::Max(largest, hn::Abs(v));
      odd = hn::Add(odd, hn::Sub(v, v));
      hn::Store(v, df, row + d);
    }
    if (!hn::AllTrue(df, hn::Eq(odd, hn::Zero(df)))) {
      std::memset(s.codes.data(), 0, static_cast<size_t>(stride));
      *sum = 0;
      return std::numeric_limits<float>::quiet_NaN();
    }
    constexpr float kMost = (1 << (kCodeBits - 1)) - 1;
    const float scale = std::max(hn::GetLane(hn::MaxOfLanes(df, largest)), 1e-5f) / kMost;
    *sum = RowCodes(kCodeBits, scale, 0, 0).OfSpan(row, stride, s.codes.data());
    return scale;
  }

  // --- Keys and values ---------------------------------------------------------------------------

  // False where a value is not finite.
  bool ReadKeys() const {
    const DF df;
    float* const mean = s.out.data();
    std::fill(mean, mean + stride, 0.0f);
    for (int64_t t = 0; t < tokens; ++t) {
      const float* const row = Row(args.k, t);
      for (int64_t d = 0; d < stride; d += kLanes)
        hn::Store(hn::Add(hn::Load(df, mean + d), LoadPart(row, d)), df, mean + d);
    }
    for (int64_t d = 0; d < stride; ++d) mean[d] /= static_cast<float>(tokens);
    codes.StartKeys();
    bool finite = true;
    for (int64_t t = 0; t < tokens; ++t) {
      int32_t sum = 0;
      const float scale = Quantize<true>(Row(args.k, t), mean, &sum);
      s.k_scales[static_cast<size_t>(t)] = scale;
      finite = finite && std::isfinite(scale);
      codes.AddKey(t, s.codes.data(), sum);
    }
    return finite;
  }

  bool ReadValues() const {
    const DF df;
    VF odd = hn::Zero(df);
    float* const scales = s.v_scales.data();
    std::fill(scales, scales + stride, 0.0f);
    for (int64_t t = 0; t < tokens; ++t) {
      float* const row = s.rows.data() + t * stride;
      const float* const from = Row(args.v, t);
      for (int64_t d = 0; d < stride; d += kLanes) {
        const VF v = LoadPart(from, d);
        hn::Store(v, df, row + d);
        odd = hn::Add(odd, hn::Sub(v, v));
        hn::Store(hn::Max(hn::Load(df, scales + d), hn::Abs(v)), df, scales + d);
      }
    }
    if (!hn::AllTrue(df, hn::Eq(odd, hn::Zero(df)))) return false;
    // What is stored together with the last token.
    std::fill_n(s.rows.data() + tokens * stride, (kValueTokens - 1) * stride, 0.0f);
    const VF most = hn::Set(df, static_cast<float>(ops::IntegerAttention::kValueMost));
    for (int64_t d = 0; d < stride; d += kLanes) {
      const VF scale = hn::Div(hn::Max(hn::Load(df, scales + d), hn::Set(df, 1e-5f)), most);
      hn::Store(scale, df, scales + d);
    }
    codes.StartValues();
    for (int64_t t = 0; t < tokens; t += kValueTokens) {
      codes.AddValues(t, [&](int64_t i, int64_t d) FRAMEQUILT_INLINE {
        const float* const row = s.rows.data() + (t + i) * stride;
        const VF quotient = hn::Div(hn::Load(df, row + d), hn::Load(df, scales + d));
        return hn::ConvertTo(DI(), hn::Min(hn::Max(hn::Round(quotient), hn::Neg(most)), most));
      });
    }
    codes.EndValues();
    return true;
  }

  // --- A tile of queries -------------------------------------------------------------------------

  // factors: what turns the difference of two scores of a row into the exponent of 2. Rows behind
  // the last one repeat it, and nobody uses them.
  void ReadQueries(int64_t row, int64_t rows, float* factors) const {
    int32_t sum = 0;
    float scale = 0;
    for (int64_t r = 0; r < kTileQueries; ++r) {
      if (r < rows) scale = Quantize<false>(Row(args.q, row + r), nullptr, &sum);
      factors[r] = scale * args.scale * Constants::kLog2E;
      codes.AddQuery(r, s.codes.data());
    }
    codes.EndQueries();
  }

  void Run() const {
    if (!ReadKeys() || !ReadValues()) {
      for (int64_t t = 0; t < tokens; ++t) {
        std::fill_n(args.out + base + t * args.stride, dims,
                    std::numeric_limits<float>::quiet_NaN());
      }
      return;
    }
#if FRAMEQUILT_HAVE_AMX
    const Tiles registers;
#endif
    HWY_ALIGN float most[kTileQueries];
    HWY_ALIGN float factors[kTileQueries];
    HWY_ALIGN float totals[kTileQueries];
    for (int64_t row = 0; row < tokens; row += kTileQueries) {
      const int64_t rows = std::min(kTileQueries, tokens - row);
      ReadQueries(row, rows, factors);
      codes.Scores(most);
      codes.Probabilities(most, factors, totals);
      codes.Values();
      // NaN where the query is not finite.
      for (int64_t r = 0; r < kTileQueries; ++r)
        totals[r] = 1.0f / totals[r] + (factors[r] - factors[r]);
      codes.Finish(rows, totals, args.out + base + row * args.stride, args.stride);
    }
  }
};

void IntegerEncoderAttention(const ops::EncoderAttentionArgs& args, ThreadPool& pool) {
  std::vector<EncoderAttentionScratch>& scratch = encoder_attention_scratch(pool.threads());
  for (EncoderAttentionScratch& s : scratch) Head(args, s, 0).Reserve();
  pool.parallel_for(args.blocks * args.heads, [&](int64_t item, int thread) {
    Head(args, scratch[static_cast<size_t>(thread)], item).Run();
  });
}

#else  // targets without the dot product

void IntegerEncoderAttention(const ops::EncoderAttentionArgs& args, ThreadPool& pool) {
  scalar_kernels().integer_encoder_attention(args, pool);
}

#endif
}  // namespace FRAMEQUILT_DOT_NAMESPACE
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fq::backend::cpu {

HWY_EXPORT(IntegerEncoderAttention);

void FRAMEQUILT_DOT_NAMESPACE::fill_integer_encoder_attention_kernels(Kernels& kernels) {
  kernels.integer_encoder_attention = &HWY_DYNAMIC_DISPATCH(IntegerEncoderAttention);
}

}  // namespace fq::backend::cpu
#endif  // HWY_ONCE
