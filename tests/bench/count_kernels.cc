// One call of one kernel, for counting its instructions: tests/bench/instructions.py runs this
// program under callgrind, which collects inside fq_counted_call() only. One thread, fixed input,
// so that the count repeats.
//
//     count_kernels TARGET CASE        count_kernels --list
#include <cstdio>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "src/backend/backend.h"
#include "src/core/aligned.h"
#include "src/quant/affine_weights.h"

// The name that callgrind looks for; never inlined, never merged.
extern "C" __attribute__((noinline)) void fq_counted_call(const std::function<void()>& call) {
  call();
  __asm__ volatile("" ::: "memory");
}

namespace fq {
namespace {

// Repeatable values in [-2, 2), cheaper under an emulator than a good generator. Sums of four, so
// that they are spread like real ones: how often integer kernels widen their sums depends on it.
std::vector<float> values(int64_t count) {
  std::vector<float> out(static_cast<size_t>(count));
  uint32_t state = 1;
  for (float& x : out) {
    x = -2.0f;
    for (int i = 0; i < 4; ++i) {
      state = state * 1664525u + 1013904223u;
      x += static_cast<float>(state >> 8) * (1.0f / 16777216.0f);
    }
  }
  return out;
}

struct Bench {
  const backend::Backend& backend;
  ThreadPool& pool;

  void linear(const model::WeightFormat& format, int64_t rows,
              const model::ActivationFormat& activations = {}) {
    const int out = 256, in = 896;
    const auto weights = values(int64_t{out} * in);
    auto packed =
        quant::pack_linear(weights.data(), out, in, format, quant::AffineRange::kIncludeZero);
    auto x = values(rows * in);
    std::vector<float> row_sums;
    if (!activations.symmetric) {  // and a channel that leaves the zero at an end of the codes
      for (int64_t r = 0; r < rows; ++r) x[static_cast<size_t>(r * in + 7)] = 8.0f;
      row_sums = values(out);  // any take as long
      packed->view.row_sums = row_sums.data();
    }
    std::vector<float> y(static_cast<size_t>(rows * out));
    const backend::LinearFn kernel = *backend.linear(format, activations);
    fq_counted_call([&] {
      kernel({.x = x.data(),
              .x_stride = in,
              .rows = rows,
              .w = &packed->view,
              .y = y.data(),
              .y_stride = out,
              .accumulate = false,
              .activations = activations},
             pool);
    });
  }

  void attention(int bits, int64_t rows, int64_t length, bool append) {
    const int heads = 14, kv_heads = 2, head_dim = 64;
    const quant::KvPageLayout layout =
        *quant::KvPageLayout::make({.k_bits = bits, .v_bits = bits}, kv_heads, head_dim);
    const int64_t count = (length + quant::kPageTokens - 1) / quant::kPageTokens;
    AlignedBuffer<std::byte> storage(static_cast<size_t>(count) * layout.page_bytes);
    std::vector<std::byte*> pages;
    for (int64_t i = 0; i < count; ++i)
      pages.push_back(storage.data() + static_cast<size_t>(i) * layout.page_bytes);
    const int64_t kv_width = kv_heads * head_dim, width = heads * head_dim;
    const auto k = values(length * kv_width), q = values(rows * width);
    std::vector<float> out(q.size());
    const ops::KvView view{&layout, pages.data(), length};
    const auto fill = [&] {
      (*backend.kv_append(layout))({.k = k.data(),
                                    .v = k.data(),
                                    .k_stride = kv_width,
                                    .v_stride = kv_width,
                                    .rows = length,
                                    .begin = 0,
                                    .kv = view},
                                   pool);
    };
    if (append) return fq_counted_call(fill);
    fill();
    const ops::AttentionArgs args{.q = q.data(),
                                  .q_stride = width,
                                  .out = out.data(),
                                  .out_stride = width,
                                  .rows = rows,
                                  .begin = length - rows,
                                  .heads = heads,
                                  .scale = 0.125f,
                                  .kv = view};
    const backend::AttentionFn kernel = *backend.attention(layout);
    fq_counted_call([&] { kernel({&args, 1}, pool); });
  }

  void encoder(const model::ActivationFormat& activations) {
    const int64_t tokens = 81, width = 4 * 72;
    const auto x = values(tokens * width);
    std::vector<float> out(x.size());
    const ops::EncoderAttentionArgs args{.q = x.data(),
                                         .k = x.data(),
                                         .v = x.data(),
                                         .out = out.data(),
                                         .stride = width,
                                         .blocks = 1,
                                         .tokens = tokens,
                                         .heads = 4,
                                         .head_dim = 72,
                                         .scale = 0.1f};
    const backend::EncoderAttentionFn kernel = *backend.encoder_attention(72, activations);
    fq_counted_call([&] { kernel(args, pool); });
  }

  void norm() {
    const int64_t rows = 16, width = 896;
    const auto x = values(rows * width);
    std::vector<float> y(x.size());
    const auto kernel = *backend.norm(model::NormKind::kRms);
    fq_counted_call([&] {
      kernel({.x = x.data(),
              .y = y.data(),
              .rows = rows,
              .width = width,
              .weight = x.data(),
              .bias = nullptr,
              .eps = 1e-6f},
             pool);
    });
  }

  void silu() {
    const int64_t count = 16 * 896;
    const auto x = values(count);
    std::vector<float> y(x.size());
    const auto kind = model::Activation::kSilu;
    const auto kernel = *backend.activation(kind);
    fq_counted_call([&] {
      kernel({.kind = kind, .x = x.data(), .gate = x.data(), .y = y.data(), .count = count}, pool);
    });
  }
};

struct Case {
  const char* name;
  std::function<void(Bench&)> run;
};

std::vector<Case> cases() {
  using Kind = model::WeightFormat::Kind;
  const model::WeightFormat w4{.kind = Kind::kAffine, .bits = 4, .group = 128};
  const model::WeightFormat w8{.kind = Kind::kAffine, .bits = 8, .group = 128};
  const model::WeightFormat bf16{.kind = Kind::kBF16};
  // GGUF's Q4_K.
  const model::WeightFormat k4{
      .kind = Kind::kAffine, .bits = 4, .group = 32, .scale = DType::kI8, .offset = true};
  const model::ActivationFormat a8{.bits = 8}, a8_asym{.bits = 8, .symmetric = false};
  return {{"linear w4g128 rows 1", [=](Bench& b) { b.linear(w4, 1); }},
          {"linear w4g128 rows 64", [=](Bench& b) { b.linear(w4, 64); }},
          {"linear w8g128 rows 1", [=](Bench& b) { b.linear(w8, 1); }},
          {"linear w8g128 rows 64", [=](Bench& b) { b.linear(w8, 64); }},
          {"linear w4g128 a8 rows 1", [=](Bench& b) { b.linear(w4, 1, a8); }},
          {"linear w4g128 a8 rows 8", [=](Bench& b) { b.linear(w4, 8, a8); }},
          {"linear w4g128 a8 rows 64", [=](Bench& b) { b.linear(w4, 64, a8); }},
          {"linear w4g128 a8-asym rows 64", [=](Bench& b) { b.linear(w4, 64, a8_asym); }},
          {"linear w8g128 a8 rows 64", [=](Bench& b) { b.linear(w8, 64, a8); }},
          {"linear w4g32-offset-i8scale rows 1", [=](Bench& b) { b.linear(k4, 1); }},
          {"linear w4g32-offset-i8scale a8 rows 1", [=](Bench& b) { b.linear(k4, 1, a8); }},
          {"linear bf16 rows 1", [=](Bench& b) { b.linear(bf16, 1); }},
          {"attention kv16 rows 1 length 512", [](Bench& b) { b.attention(16, 1, 512, false); }},
          {"attention kv8 rows 1 length 512", [](Bench& b) { b.attention(8, 1, 512, false); }},
          {"attention kv4 rows 1 length 512", [](Bench& b) { b.attention(4, 1, 512, false); }},
          {"attention kv8 rows 64 length 256", [](Bench& b) { b.attention(8, 64, 256, false); }},
          {"kv append kv8 rows 64", [](Bench& b) { b.attention(8, 1, 64, true); }},
          {"kv append kv4 rows 64", [](Bench& b) { b.attention(4, 1, 64, true); }},
          {"encoder attention 81 tokens", [](Bench& b) { b.encoder({}); }},
          {"encoder attention 81 tokens a8", [](Bench& b) { b.encoder({.bits = 8}); }},
          {"rms norm 16x896", [](Bench& b) { b.norm(); }},
          {"silu 16x896", [](Bench& b) { b.silu(); }}};
}

int run(const std::string& target, const std::string_view name) {
  const auto backend = backend::make_cpu_backend(target);
  if (!backend) {
    std::fprintf(stderr, "count_kernels: %s\n", backend.error().to_string().c_str());
    return 1;
  }
  ThreadPool pool(1);
  for (const Case& c : cases()) {
    if (c.name != name) continue;
    Bench bench{**backend, pool};
    c.run(bench);
    return 0;
  }
  std::fprintf(stderr, "count_kernels: there is no case '%s'\n", std::string(name).c_str());
  return 2;
}

}  // namespace
}  // namespace fq

int main(int argc, char** argv) {
  if (argc == 2 && std::string_view(argv[1]) == "--list") {
    for (const fq::Case& c : fq::cases()) std::printf("%s\n", c.name);
    return 0;
  }
  if (argc != 3) {
    std::fprintf(stderr, "usage: count_kernels TARGET CASE | count_kernels --list\n");
    return 2;
  }
  return fq::run(argv[1], argv[2]);
}
