// Times the CPU kernels alone on shapes of real models and prints one JSON object per line. Not a
// test: nothing is asserted. How to run and read it: tests/bench/README.md.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "src/backend/backend.h"
#include "src/core/aligned.h"
#include "src/quant/affine_weights.h"

#if defined(__linux__)
#include <ctime>
#endif

namespace fq {
namespace {

struct Options {
  std::string simd;
  std::string filter;
  int threads = 0;
  double seconds = 0.3;
};

// Bell-shaped, as weights and activations are: how much their codes add up to matters to kernels.
std::vector<float> random_values(size_t count) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// CPU time of the whole process: on a busy machine it says more than the clock on the wall.
double cpu_seconds() {
#if defined(__linux__)
  timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
#else
  return wall_seconds();
#endif
}

struct Timing {
  double best = 1e30;  // seconds of wall time per call
  double cpu = 1e30;   // least CPU seconds per call, over all threads
  double mean_cpu = 0;
};

Timing time_calls(const std::function<void()>& call, double budget) {
  call();
  Timing timing;
  const double start = wall_seconds(), cpu_start = cpu_seconds();
  int calls = 0;
  do {
    const double wall = wall_seconds(), cpu = cpu_seconds();
    call();
    timing.cpu = std::min(timing.cpu, cpu_seconds() - cpu);
    timing.best = std::min(timing.best, wall_seconds() - wall);
    ++calls;
  } while (wall_seconds() - start < budget);
  timing.mean_cpu = (cpu_seconds() - cpu_start) / calls;
  return timing;
}

void report(const std::string& name, const Options& options, const Timing& t, double flop,
            double bytes) {
  std::printf(
      "{\"name\": \"%s\", \"simd\": \"%s\", \"threads\": %d, \"ms\": %.4f, \"gflops\": %.2f, "
      "\"gbytes_per_s\": %.2f, "
      "\"gflops_per_cpu_second\": %.2f, \"mean_gflops_per_cpu_second\": %.2f}\n",
      name.c_str(), options.simd.c_str(), options.threads, 1e3 * t.best, 1e-9 * flop / t.best,
      1e-9 * bytes / t.best, 1e-9 * flop / t.cpu, 1e-9 * flop / t.mean_cpu);
  std::fflush(stdout);
}

// In memory as the engine has it: in pages of 4 KiB every row of a wide matrix is another page.
AlignedBuffer<float> aligned_random_values(size_t count) {
  const auto values = random_values(count);
  AlignedBuffer<float> aligned(count);
  std::copy(values.begin(), values.end(), aligned.data());
  return aligned;
}

// Copies of one linear, at least 512 MB together (few rows), so that weights come from memory as
// they do in a model.
void bench_linear(const backend::Backend& backend, ThreadPool& pool, const Options& options,
                  const model::WeightFormat& format, const model::ActivationFormat& activations,
                  int out, int in, int64_t rows) {
  const std::string name =
      "linear " + format.name() + " " + (activations.float32() ? "" : activations.name() + " ") +
      std::to_string(out) + "x" + std::to_string(in) + " rows " + std::to_string(rows);
  if (name.find(options.filter) == std::string::npos) return;
  const auto weights = random_values(static_cast<size_t>(out) * static_cast<size_t>(in));
  auto packed =
      quant::pack_linear(weights.data(), out, in, format, quant::AffineRange::kIncludeZero);
  const int64_t copies =
      rows > 16 ? 1 : std::max<int64_t>(1, (int64_t{512} << 20) / packed->view.bytes);
  std::vector<AlignedBuffer<std::byte>> data(static_cast<size_t>(copies));
  for (auto& buffer : data) {
    buffer.reserve(packed->data_bytes);
    std::memcpy(buffer.data(), packed->data.data(), packed->data_bytes);
  }
  auto x = aligned_random_values(static_cast<size_t>(rows * in));
  // One channel is far larger than the others, as in language models: codes with a zero lie to one
  // side of 0 then.
  if (!activations.symmetric) {
    for (int64_t r = 0; r < rows; ++r) x[static_cast<size_t>(r * in + 7)] = 8.0f;
  }
  AlignedBuffer<float> y(static_cast<size_t>(rows * out));
  // What the converter stores beside the weights; any numbers take as long.
  const auto row_sums = random_values(static_cast<size_t>(packed->view.tiles) * quant::kTileRows);
  const backend::LinearFn kernel = *backend.linear(format, activations);
  const Timing timing = time_calls(
      [&] {
        for (auto& buffer : data) {
          quant::LinearWeights view = packed->view;
          view.data = buffer.data();
          view.row_sums = row_sums.data();
          kernel({.x = x.data(),
                  .x_stride = in,
                  .rows = rows,
                  .w = &view,
                  .y = y.data(),
                  .y_stride = out,
                  .accumulate = false,
                  .activations = activations},
                 pool);
        }
      },
      options.seconds);
  const double calls = static_cast<double>(copies);
  report(name, options, timing, 2.0 * calls * out * in * static_cast<double>(rows),
         calls * static_cast<double>(packed->view.bytes));
}

struct Heads {
  int heads, kv_heads, head_dim;
};

void bench_attention(const backend::Backend& backend, ThreadPool& pool, const Options& options,
                     const Heads& h, const char* format, int64_t rows, int64_t length) {
  const std::string name = std::string("attention ") + format + " heads " +
                           std::to_string(h.heads) + "/" + std::to_string(h.kv_heads) + "x" +
                           std::to_string(h.head_dim) + " rows " + std::to_string(rows) +
                           " length " + std::to_string(length);
  if (name.find(options.filter) == std::string::npos) return;
  const quant::KvPageLayout layout =
      *quant::KvPageLayout::make(*quant::parse_kv_format(format), h.kv_heads, h.head_dim);
  const int64_t count = (length + quant::kPageTokens - 1) / quant::kPageTokens;
  const size_t bytes = static_cast<size_t>(count) * layout.page_bytes;
  // Decoding: the layers of a model, so that pages come from memory.
  const size_t copies = rows > 1 ? 1 : (size_t{512} << 20) / bytes + 1;
  AlignedBuffer<std::byte> storage(copies * bytes);
  std::vector<std::byte*> pages;
  for (size_t i = 0; i < copies * static_cast<size_t>(count); ++i)
    pages.push_back(storage.data() + i * layout.page_bytes);
  const int64_t kv_width = int64_t{h.kv_heads} * h.head_dim, width = int64_t{h.heads} * h.head_dim;
  const auto k = random_values(static_cast<size_t>(length * kv_width));
  const ops::KvView view{&layout, pages.data(), length};
  (*backend.kv_append(layout))({.k = k.data(),
                                .v = k.data(),
                                .k_stride = kv_width,
                                .v_stride = kv_width,
                                .rows = length,
                                .begin = 0,
                                .kv = view},
                               pool);
  for (size_t i = 1; i < copies; ++i)
    std::memcpy(storage.data() + i * bytes, storage.data(), bytes);
  const auto q = random_values(static_cast<size_t>(rows * width));
  std::vector<float> out(q.size());
  ops::AttentionArgs args{.q = q.data(),
                          .q_stride = width,
                          .out = out.data(),
                          .out_stride = width,
                          .rows = rows,
                          .begin = length - rows,
                          .heads = h.heads,
                          .scale = 0.1f,
                          .kv = view};
  const backend::AttentionFn kernel = *backend.attention(layout);
  Timing timing = time_calls(
      [&] {
        for (size_t i = 0; i < copies; ++i) {
          args.kv.pages = pages.data() + i * static_cast<size_t>(count);
          kernel({&args, 1}, pool);
        }
      },
      options.seconds);
  timing.best /= static_cast<double>(copies);
  timing.cpu /= static_cast<double>(copies);
  const double pairs = static_cast<double>(rows) *
                       (static_cast<double>(length) - 0.5 * static_cast<double>(rows - 1));
  report(name, options, timing, 4.0 * pairs * static_cast<double>(width),
         static_cast<double>(bytes));
}

void bench_encoder(const backend::Backend& backend, ThreadPool& pool, const Options& options,
                   const model::ActivationFormat& activations) {
  const std::string name = "encoder attention 729 tokens heads 16x72 " + activations.name();
  if (name.find(options.filter) == std::string::npos) return;
  const int64_t tokens = 729, width = 16 * 72;
  const auto x = random_values(static_cast<size_t>(tokens * width));
  std::vector<float> out(x.size());
  const ops::EncoderAttentionArgs args{.q = x.data(),
                                       .k = x.data(),
                                       .v = x.data(),
                                       .out = out.data(),
                                       .stride = width,
                                       .blocks = 1,
                                       .tokens = tokens,
                                       .heads = 16,
                                       .head_dim = 72,
                                       .scale = 0.1f};
  const backend::EncoderAttentionFn kernel = *backend.encoder_attention(72, activations);
  const Timing timing = time_calls([&] { kernel(args, pool); }, options.seconds);
  report(name, options, timing, 4.0 * static_cast<double>(tokens * tokens * width), 0);
}

void bench_rows(const backend::Backend& backend, ThreadPool& pool, const Options& options) {
  const int64_t rows = 512, width = 4864;
  const auto x = random_values(static_cast<size_t>(rows * width));
  std::vector<float> y(x.size());
  const double bytes = 8.0 * static_cast<double>(rows * width);
  const auto run = [&](const char* name, const std::function<void()>& call) {
    if (std::string_view(name).find(options.filter) == std::string_view::npos) return;
    report(name, options, time_calls(call, options.seconds), static_cast<double>(rows * width),
           bytes);
  };
  const auto norm = *backend.norm(model::NormKind::kRms);
  run("rms norm 512x4864", [&] {
    norm({.x = x.data(),
          .y = y.data(),
          .rows = rows,
          .width = width,
          .weight = x.data(),
          .bias = nullptr,
          .eps = 1e-6f},
         pool);
  });
  const std::pair<const char*, model::Activation> kinds[] = {
      {"silu 512x4864", model::Activation::kSilu},
      {"gelu 512x4864", model::Activation::kGelu},
      {"gelu tanh 512x4864", model::Activation::kGeluTanh}};
  for (const auto& [name, kind] : kinds) {
    const auto activation = *backend.activation(kind);
    run(name, [&] {
      activation(
          {.kind = kind, .x = x.data(), .gate = x.data(), .y = y.data(), .count = rows * width},
          pool);
    });
  }
}

int run(const Options& options) {
  const auto backend = backend::make_cpu_backend(options.simd);
  if (!backend) {
    std::fprintf(stderr, "%s\n", backend.error().to_string().c_str());
    return 1;
  }
  Options shown = options;
  shown.simd = (*backend)->name();
  ThreadPool pool(options.threads);
  shown.threads = pool.threads();
  using Kind = model::WeightFormat::Kind;
  std::vector<std::pair<model::WeightFormat, model::ActivationFormat>> formats;
  for (const int bits : {4, 8, 2, 3, 5, 6}) {
    const model::WeightFormat format{.kind = Kind::kAffine, .bits = bits, .group = 128};
    formats.push_back({format, {.bits = 8}});
    if (bits == 4 || bits == 8) formats.push_back({format, {.bits = 8, .symmetric = false}});
    formats.push_back({format, {.bf16 = true}});
    formats.push_back({format, {}});
  }
  // GGUF's Q4_K and Q6_K.
  model::WeightFormat k4{.kind = Kind::kAffine, .bits = 4, .group = 32, .scale = DType::kI8};
  model::WeightFormat k6{.kind = Kind::kAffine, .bits = 6, .group = 16, .scale = DType::kI8};
  k4.offset = k6.symmetric = true;
  for (const model::WeightFormat& format : {k4, k6}) {
    formats.push_back({format, {.bits = 8}});
    formats.push_back({format, {}});
  }
  formats.push_back({{.kind = Kind::kBF16}, {.bf16 = true}});
  formats.push_back({{.kind = Kind::kBF16}, {}});
  formats.push_back({{.kind = Kind::kF32}, {}});
  for (const auto& [format, activations] : formats) {
    for (const auto& [out, in] :
         {std::pair{4864, 896}, std::pair{896, 4864}, std::pair{3584, 18944}}) {
      for (const int64_t rows : {1, 2, 4, 8, 16, 32, 512}) {
        bench_linear(**backend, pool, shown, format, activations, out, in, rows);
      }
    }
  }
  for (const Heads& heads : {Heads{14, 2, 64}, Heads{28, 4, 128}, Heads{8, 8, 64}}) {
    for (const char* format : {"kv32", "kv16", "kv8", "kv6", "kv4", "k8v4", "kv3", "kv2"}) {
      bench_attention(**backend, pool, shown, heads, format, 1, 4096);
      bench_attention(**backend, pool, shown, heads, format, 512, 2048);
    }
  }
  bench_encoder(**backend, pool, shown, {});
  bench_encoder(**backend, pool, shown, {.bits = 8});
  bench_rows(**backend, pool, shown);
  return 0;
}

}  // namespace
}  // namespace fq

int main(int argc, char** argv) {
  fq::Options options;
  for (int i = 1; i < argc; i += 2) {
    const std::string_view flag = i + 1 < argc ? argv[i] : "";
    if (flag == "--simd") {
      options.simd = argv[i + 1];
    } else if (flag == "--threads") {
      options.threads = std::atoi(argv[i + 1]);
    } else if (flag == "--seconds") {
      options.seconds = std::atof(argv[i + 1]);
    } else if (flag == "--filter") {
      options.filter = argv[i + 1];
    } else {
      std::fprintf(
          stderr,
          "usage: bench_kernels [--simd TARGET] [--threads N] [--seconds S] [--filter TEXT]\n");
      return 2;
    }
  }
  return fq::run(options);
}
