// Scalar references of the linear op, with float32, rounded and quantized inputs. Owns nothing; any
// thread.
#include <algorithm>
#include <cmath>
#include <vector>

#include "src/ops/math.h"
#include "src/ops/ops.h"
#include "src/quant/activations.h"

namespace fq::ops {
namespace {

void finish(const LinearArgs& args, int64_t row, int o, float sum) {
  if (args.w->bias != nullptr) sum += args.w->bias[o];
  float* const y = args.y + row * args.y_stride + o;
  if (args.activation) sum = activate(*args.activation, sum);
  *y = args.accumulate ? sum + *y : args.multiply ? sum * *y : sum;
}

void integer_reference(const LinearArgs& args) {
  const quant::LinearWeights& w = *args.w;
  const size_t in = static_cast<size_t>(w.in);
  const int span = std::min(w.group, quant::kIntegerSpan);
  std::vector<int8_t> inputs(static_cast<size_t>(args.rows) * in);
  std::vector<quant::QuantizedRow> rows(static_cast<size_t>(args.rows));
  for (size_t r = 0; r < rows.size(); ++r) {
    const float* const x = args.x + static_cast<int64_t>(r) * args.x_stride;
    rows[r] = quant::quantize_row(x, w.in, args.activations, inputs.data() + r * in);
  }
  std::vector<int> codes(in);
  for (int o = 0; o < w.out; ++o) {
    for (int i = 0; i < w.in; ++i) codes[static_cast<size_t>(i)] = quant::weight_code_at(w, o, i);
    for (size_t r = 0; r < rows.size(); ++r) {
      const int8_t* const x = inputs.data() + r * in;
      float sum = 0.0f;
      for (int begin = 0; begin < w.in; begin += span) {
        int products = 0, of_inputs = 0;
        for (size_t i = static_cast<size_t>(begin);
             i < std::min(in, static_cast<size_t>(begin + span)); ++i) {
          products += codes[i] * x[i];
          of_inputs += x[i];
        }
        const int group = begin / w.group;
        const float scale = quant::group_scale(w, o, group);
        const float shift = w.offsets != nullptr
                                ? quant::group_offset(w, o, group)
                                : -static_cast<float>(quant::weight_zero(w, o, group)) * scale;
        sum = std::fma(scale, static_cast<float>(products), sum);
        sum = std::fma(shift, static_cast<float>(of_inputs), sum);
      }
      if (!args.activations.symmetric) {
        sum = std::fma(-static_cast<float>(rows[r].zero), w.row_sums[o], sum);
      }
      finish(args, static_cast<int64_t>(r), o, sum * rows[r].scale);
    }
  }
}

void rounded_reference(const LinearArgs& args) {
  const quant::LinearWeights& w = *args.w;
  const size_t in = static_cast<size_t>(w.in);
  const bool affine = w.format.kind == model::WeightFormat::Kind::kAffine;
  const int span = affine ? std::min(w.group, quant::kRoundedSpan) : quant::kRoundedSpan;
  std::vector<float> inputs(static_cast<size_t>(args.rows) * in), weights(in);
  for (int64_t r = 0; r < args.rows; ++r) {
    quant::round_row(args.x + r * args.x_stride, w.in, inputs.data() + static_cast<size_t>(r) * in);
  }
  for (int o = 0; o < w.out; ++o) {
    for (int i = 0; i < w.in; ++i) {
      float& weight = weights[static_cast<size_t>(i)];
      if (!affine) {
        weight = quant::weight_at(w, o, i);
        continue;
      }
      const int zero = w.offsets != nullptr ? 0 : quant::weight_zero(w, o, i / w.group);
      weight = static_cast<float>(quant::weight_code_at(w, o, i) - zero);
    }
    for (int64_t r = 0; r < args.rows; ++r) {
      const float* const x = inputs.data() + static_cast<size_t>(r) * in;
      float sum = 0.0f;
      for (int begin = 0; begin < w.in; begin += span) {
        float products = 0.0f, of_inputs = 0.0f;
        for (int i = begin; i < std::min(w.in, begin + span); ++i) {
          products = std::fma(x[i], weights[static_cast<size_t>(i)], products);
          of_inputs += x[i];
        }
        const int group = affine ? begin / w.group : 0;
        sum = std::fma(affine ? quant::group_scale(w, o, group) : 1.0f, products, sum);
        if (w.offsets != nullptr) sum = std::fma(quant::group_offset(w, o, group), of_inputs, sum);
      }
      finish(args, r, o, sum);
    }
  }
}

void float_reference(const LinearArgs& args) {
  const quant::LinearWeights& w = *args.w;
  std::vector<float> weight(static_cast<size_t>(w.in));
  for (int o = 0; o < w.out; ++o) {
    quant::dequantize_row(w, o, weight.data());
    for (int64_t row = 0; row < args.rows; ++row) {
      const float* const x = args.x + row * args.x_stride;
      float sum = 0.0f;
      for (int i = 0; i < w.in; ++i) sum = std::fma(x[i], weight[static_cast<size_t>(i)], sum);
      finish(args, row, o, sum);
    }
  }
}

}  // namespace

void LinearsAhead::add(const quant::LinearWeights& w) {
  const void* const shifts = w.offsets != nullptr ? w.offsets : w.zeros;
  linears[count++] = {w.data, w.scales, shifts, w.tiles};
  const int numbers = w.groups * quant::kTileRows;
  const int number = static_cast<int>(dtype_bytes(w.format.scale));
  bytes = w.bytes / w.tiles;
  data_bytes = static_cast<int>(w.data_bytes / w.tiles);
  scale_bytes = w.scales != nullptr ? numbers * number : 0;
  shift_bytes = w.offsets != nullptr ? numbers * number : w.zeros != nullptr ? numbers : 0;
}

void linear_reference(const LinearArgs& args) {
  for (const LinearArgs* one = &args; one != nullptr; one = one->next) {
    if (one->activations.quantized()) {
      integer_reference(*one);
    } else if (one->activations.bf16) {
      rounded_reference(*one);
    } else {
      float_reference(*one);
    }
  }
}

}  // namespace fq::ops
