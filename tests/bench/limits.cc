// What this machine can do at most: memory read bandwidth, and multiply-add peaks in float32 and
// int8 from registers, with the clock at which they were reached and the distance between two
// cores. Prints one JSON object. Compiled for the machine that builds it (-march=native), unlike
// everything else here. main() owns the buffer; every measurement has threads of its own.
//
//     limits [THREADS] [RUNS] [small-pages]
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// Vectors as wide as the target has them, and independent accumulators in groups of four: as many
// as its registers hold beside the operands. That is more than latency times throughput of any
// processor known, so that only throughput counts.
#if defined(__AVX512BW__)
constexpr int kBytes = 64;
constexpr int kGroups = 6;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
constexpr int kGroups = 3;
#elif defined(__aarch64__)
constexpr int kBytes = 16;
constexpr int kGroups = 6;
#else
constexpr int kBytes = 16;
constexpr int kGroups = 3;
#endif
typedef uint32_t Words __attribute__((vector_size(kBytes)));
typedef float Floats __attribute__((vector_size(kBytes)));

volatile uint64_t sink;

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Wall time of `work` on all threads at once, from when the last of them is there.
double on_all_threads(int threads, const std::function<void(int)>& work) {
  std::atomic<int> waiting{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) {
    helpers.emplace_back([&, i] {
      ++waiting;
      while (!go) std::this_thread::yield();
      work(i);
    });
  }
  while (waiting < threads - 1) std::this_thread::yield();
  const double start = seconds();
  go = true;
  work(0);
  for (std::thread& helper : helpers) helper.join();
  return seconds() - start;
}

// Memory -----------------------------------------------------------------------------------------

// 256 bits at a time even where there are 512: on Zen 4 that is faster by a few percent.
constexpr int kLoad = kBytes < 32 ? kBytes : 32;
typedef uint64_t Load __attribute__((vector_size(kLoad)));

// Reads `bytes` in so many streams side by side. `kAhead`: so many bytes ahead are asked for, past
// the caches where the machine can do that.
template <int kStreams, int kAhead>
uint64_t read_all(const std::byte* data, size_t bytes) {
  constexpr size_t kLine = 64, kStep = 4 * kLine, kSums = 4;
  // Not a power of two apart: streams that are 128 MiB apart met in the same banks of the memory
  // and were a quarter slower.
  const size_t part = bytes / kStreams / kStep * kStep - (kStreams > 1 ? 10 * kStep : 0);
  Load sums[kSums] = {};
  for (size_t i = 0; i < part; i += kStep) {
#pragma GCC unroll 4
    for (size_t stream = 0; stream < kStreams; ++stream) {
      const std::byte* here = data + stream * part + i;
#pragma GCC unroll 4
      for (size_t at = 0; kAhead > 0 && at < kStep; at += kLine) {
        __builtin_prefetch(here + kAhead + at, 0, 0);
      }
#pragma GCC unroll 16
      for (size_t j = 0; j < kStep / kLoad; ++j) {
        sums[j % kSums] ^= reinterpret_cast<const Load*>(here)[j];
      }
    }
  }
  for (size_t j = 1; j < kSums; ++j) sums[0] ^= sums[j];
  return sums[0][0] ^ sums[0][1];
}

struct Method {
  const char* name;
  uint64_t (*read)(const std::byte*, size_t);
};
// What was best in one mood of one machine or another; a limit is the best of them.
constexpr Method kMethods[] = {{"one stream", read_all<1, 0>},
                               {"4 streams, prefetched", read_all<4, 1024>}};

// Nanoseconds for a cache line to get from one core to another: tens inside a group of cores that
// share a cache, more than a hundred between two such groups. A virtual machine's cores may be
// either, now one and now the other, and two groups have two links to memory.
double core_to_core_ns() {
  constexpr double kSeconds = 0.005;
  constexpr int kExchanges = 64;
  alignas(128) std::atomic<int> turn{0};
  alignas(128) std::atomic<bool> stop{false};
  double least = kSeconds;  // of so many exchanges: in others a thread may not have run at all
  on_all_threads(2, [&](int me) {
    double last = seconds();
    const double end = last + kSeconds;
    for (int count = 1; !stop; ++count) {
      // On one core, only giving it away lets the other go on.
      for (int spins = 0; turn.load(std::memory_order_acquire) != me && !stop; ++spins) {
        if (spins > 100'000) std::this_thread::yield();
      }
      turn.store(1 - me, std::memory_order_release);
      if (me == 0 && count % kExchanges == 0) {
        const double now = seconds();
        least = std::min(least, now - last);
        last = now;
        if (now > end) stop = true;
      }
    }
  });
  return 1e9 * least / (2 * kExchanges);
}

// Peaks ------------------------------------------------------------------------------------------

// `rounds` times one step of every group. Sums are indexed by constants from the start: GCC 12 left
// those of a loop over an array in memory, although it unrolled the loop, and what was measured was
// the latency of a store and a load.
template <class V, class Step, size_t... kGroup>
V chained(int64_t rounds, Step step, std::index_sequence<kGroup...>) {
  V sums[4 * sizeof...(kGroup)] = {};
  for (int64_t i = 0; i < rounds; ++i) {
    (step(sums[4 * kGroup], sums[4 * kGroup + 1], sums[4 * kGroup + 2], sums[4 * kGroup + 3]), ...);
  }
  return ((sums[4 * kGroup] + sums[4 * kGroup + 1] + sums[4 * kGroup + 2] + sums[4 * kGroup + 3]) +
          ...);
}

// Instructions are written out, so that no compiler can fold, split or hoist them.
#if defined(__FMA__)
#define MULTIPLY_ADD(sum, x, y) \
  __asm__ volatile("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y))
#elif defined(__x86_64__)
#define MULTIPLY_ADD(sum, x, y) \
  __asm__ volatile("mulps %1, %0\n\taddps %2, %0" : "+x"(sum) : "x"(x), "x"(y))
#elif defined(__aarch64__)
#define MULTIPLY_ADD(sum, x, y) \
  __asm__ volatile("fmla %0.4s, %1.4s, %2.4s" : "+w"(sum) : "w"(x), "w"(y))
#else  // not a peak, but something for a processor that this program does not know
#define MULTIPLY_ADD(sum, x, y) sum = sum * x + y
#endif

uint64_t float_work(int64_t rounds) {
  const Floats x = Floats{} + 0.5f, y = Floats{} + 0.25f;
  const auto step = [x, y](Floats& a, Floats& b, Floats& c, Floats& d) {
    MULTIPLY_ADD(a, x, y);
    MULTIPLY_ADD(b, x, y);
    MULTIPLY_ADD(c, x, y);
    MULTIPLY_ADD(d, x, y);
  };
  return static_cast<uint64_t>(
      chained<Floats>(rounds, step, std::make_index_sequence<kGroups>())[0]);
}

// Products of bytes and their sums. Without a dot product instruction, what is counted is what our
// kernels do: sums of pairs in int16. Widening them now and then is left out, as a limit may.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr const char* kDotName = "avx512 vpdpbusd";
#define DOT(sum, x, y) __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y))
#elif defined(__AVXVNNI__) && !defined(__AVX512BW__)
constexpr const char* kDotName = "avx-vnni vpdpbusd";
#define DOT(sum, x, y) __asm__ volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(y))
#elif defined(__AVX2__)
#define FRAMEQUILT_LIMITS_PAIRS 1
constexpr const char* kDotName =
    kBytes == 64 ? "avx512 vpmaddubsw + vpaddw" : "avx2 vpmaddubsw + vpaddw";
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr const char* kDotName = "neon sdot";
#define DOT(sum, x, y) __asm__ volatile("sdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(x), "w"(y))
#else
constexpr const char* kDotName = "";
#define DOT(sum, x, y) static_cast<void>(sum)
#endif

#if FRAMEQUILT_LIMITS_PAIRS
// The products need four registers more.
constexpr int kDotGroups = kBytes == 64 ? kGroups : 2;
#else
constexpr int kDotGroups = kGroups;
#endif

uint64_t int8_work(int64_t rounds) {
  const Words x = Words{} + 0x01020304u, y = Words{} + 0x04030201u;
  const auto step = [x, y](Words& a, Words& b, Words& c, Words& d) {
#if FRAMEQUILT_LIMITS_PAIRS
    // Four products before the sums: with each sum right behind its product, Zen 4 gives some of
    // them the units that multiply, and is a tenth slower.
    Words p[4];
    __asm__ volatile("vpmaddubsw %2, %1, %0" : "=v"(p[0]) : "v"(x), "v"(y));
    __asm__ volatile("vpmaddubsw %2, %1, %0" : "=v"(p[1]) : "v"(x), "v"(y));
    __asm__ volatile("vpmaddubsw %2, %1, %0" : "=v"(p[2]) : "v"(x), "v"(y));
    __asm__ volatile("vpmaddubsw %2, %1, %0" : "=v"(p[3]) : "v"(x), "v"(y));
    __asm__ volatile("vpaddw %1, %0, %0" : "+v"(a) : "v"(p[0]));
    __asm__ volatile("vpaddw %1, %0, %0" : "+v"(b) : "v"(p[1]));
    __asm__ volatile("vpaddw %1, %0, %0" : "+v"(c) : "v"(p[2]));
    __asm__ volatile("vpaddw %1, %0, %0" : "+v"(d) : "v"(p[3]));
#else
    DOT(a, x, y);
    DOT(b, x, y);
    DOT(c, x, y);
    DOT(d, x, y);
#endif
  };
  return chained<Words>(rounds, step, std::make_index_sequence<kDotGroups>())[0];
}

// The same in matrix registers, where the processor has them and the system gives them: a product
// of two tiles is 16 x 16 x 64 of bytes.
#if defined(__AMX_INT8__) && defined(__linux__)
bool has_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
uint64_t tile_work(int64_t rounds) {
  alignas(64) struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
  for (int64_t i = 0; i < rounds; ++i) {
    __asm__ volatile("tdpbssd %tmm6, %tmm4, %tmm0");
    __asm__ volatile("tdpbssd %tmm7, %tmm4, %tmm1");
    __asm__ volatile("tdpbssd %tmm6, %tmm5, %tmm2");
    __asm__ volatile("tdpbssd %tmm7, %tmm5, %tmm3");
  }
  __asm__ volatile("tilerelease");
  return 0;
}
#else
bool has_tiles() { return false; }
uint64_t tile_work(int64_t) { return 0; }
#endif
constexpr double kTileOps = 2.0 * 16 * 16 * 64;

// A chain of additions, one per cycle: cycles. Of two registers, because some processors add
// constants without executing anything.
constexpr int kAdditions = 16;
uint64_t clock_work(int64_t rounds) {
  uint64_t sum = 1, one = 1;
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kAdditions; ++j) {
#if defined(__x86_64__)
      __asm__ volatile("add %1, %0" : "+r"(sum) : "r"(one) : "cc");
#elif defined(__aarch64__)
      __asm__ volatile("add %0, %0, %1" : "+r"(sum) : "r"(one));
#endif
    }
  }
  return sum;
}
#if defined(__x86_64__) || defined(__aarch64__)
constexpr bool kHasClock = true;
#else
constexpr bool kHasClock = false;
#endif

// Output -----------------------------------------------------------------------------------------

void print(const char* name, std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  std::printf(", \"%s\": {\"median\": %.2f, \"min\": %.2f, \"max\": %.2f}", name,
              samples[samples.size() / 2], samples.front(), samples.back());
}

}  // namespace

int main(int argc, char** argv) {
  const int threads =
      argc > 1 ? std::atoi(argv[1]) : static_cast<int>(std::thread::hardware_concurrency());
  const int runs = argc > 2 ? std::atoi(argv[2]) : 5;
  const bool small = argc > 3 && std::string_view(argv[3]) == "small-pages";
  if (threads < 1 || runs < 1 || argc > (small ? 4 : 3)) {
    std::fprintf(stderr, "usage: limits [THREADS] [RUNS] [small-pages]\n");
    return 2;
  }
  const auto each = static_cast<size_t>(threads);
  // Far larger than any cache, written once so that every page exists. In huge pages, as weights
  // are where the system has them: otherwise the limit would be that of page tables.
  constexpr size_t kHuge = size_t{2} << 20, kMargin = 4096;
  const size_t bytes = size_t{1} << 30, part = bytes / each / kMargin * kMargin;
  std::byte* data = static_cast<std::byte*>(std::aligned_alloc(kHuge, bytes + kHuge));
  if (data == nullptr) return 1;
#if defined(__linux__)
  // A refusal costs speed only.
  madvise(data, bytes + kHuge, small ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
#endif
  on_all_threads(threads, [&](int i) {
    std::fill_n(data + static_cast<size_t>(i) * part, part, std::byte{1});
  });

  std::vector<uint64_t> results(each);
  const auto timed = [&](const std::function<uint64_t(size_t)>& work) {
    const double wall = on_all_threads(threads, [&](int i) {
      const auto at = static_cast<size_t>(i);
      results[at] = work(at);
    });
    for (uint64_t result : results) sink = sink + result;
    return wall;
  };
  constexpr double kSteps = 2e8;  // of each thread: tens of milliseconds
  const auto float_rounds = static_cast<int64_t>(kSteps / (4 * kGroups));
  const auto dot_rounds = static_cast<int64_t>(kSteps / (4 * kDotGroups));
  constexpr double kTileSteps = kSteps / 16;  // one takes so many cycles
  const auto tile_rounds = static_cast<int64_t>(kTileSteps / 4);
  const bool tiles = has_tiles();
  const auto clock_rounds = static_cast<int64_t>(kSteps / kAdditions);
  const double steps = 1e-9 * kSteps * threads;
  timed([&](size_t) { return float_work(float_rounds); });  // the clock rises
  std::vector<double> read, distance, floats, ints, clock, float_cycle, int_cycle;
  int won[std::size(kMethods)] = {};
  for (int run = 0; run < runs; ++run) {
    if (threads > 1) distance.push_back(core_to_core_ns());
    double best = 0;
    size_t winner = 0;
    for (size_t method = 0; method < std::size(kMethods); ++method) {
      const double wall =
          timed([&](size_t i) { return kMethods[method].read(data + i * part, part); });
      const double rate = 1e-9 * static_cast<double>(part) * threads / wall;
      if (rate > best) best = rate, winner = method;
    }
    ++won[winner];
    read.push_back(best);
    floats.push_back(2.0 * (kBytes / 4.0) * steps /
                     timed([&](size_t) { return float_work(float_rounds); }));
    if (tiles) {
      const double wall = timed([&](size_t) { return tile_work(tile_rounds); });
      ints.push_back(1e-9 * kTileOps * kTileSteps * threads / wall);
    } else {
      ints.push_back(kDotName[0] == '\0' ? 0.0 : 2.0 * kBytes * steps / timed([&](size_t) {
                                                   return int8_work(dot_rounds);
                                                 }));
    }
    if (!kHasClock) continue;
    clock.push_back(1e-9 * kSteps / timed([&](size_t) { return clock_work(clock_rounds); }));
    float_cycle.push_back(floats.back() / (threads * clock.back()));
    int_cycle.push_back(ints.back() / (threads * clock.back()));
  }
  std::free(data);
  const auto method = static_cast<size_t>(std::max_element(std::begin(won), std::end(won)) - won);
  std::printf("{\"threads\": %d", threads);
  print("read_gbytes_per_s", read);
  std::printf(", \"read_method\": \"%s, %s pages\"", kMethods[method].name,
              small ? "small" : "huge");
  if (!distance.empty()) print("core_to_core_ns", distance);
  print("float_gflops", floats);
  print("int8_gops", ints);
  std::printf(", \"int8_instruction\": \"%s\"", tiles ? "amx tdpbssd" : kDotName);
  if (kHasClock) {
    print("clock_ghz", clock);
    print("float_flop_per_cycle", float_cycle);
    print("int8_op_per_cycle", int_cycle);
  }
  std::printf("}\n");
  return 0;
}
