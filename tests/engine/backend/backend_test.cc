// Choice of a CPU backend and its refusals.
#include <algorithm>

#include "tests/engine/backend/linear_problem.h"

namespace fq::backend {
namespace {

TEST(CpuBackend, EveryTargetIsNamedAndCanBeMade) {
  const std::vector<std::string> targets = cpu_targets();
  ASSERT_FALSE(targets.empty());
  EXPECT_EQ(targets.back(), "scalar");
  for (const std::string& target : targets) {
    EXPECT_EQ(backend_of(target)->name(), "cpu " + target);
  }
  EXPECT_EQ(backend_of("")->name(), "cpu " + targets.front());
}

TEST(CpuBackend, UnknownTargetIsAnErrorThatNamesTheTargets) {
  const auto backend = make_cpu_backend("quantum");
  ASSERT_FALSE(backend);
  EXPECT_EQ(backend.error().code, Code::kInvalidArgument);
  EXPECT_NE(backend.error().message.find("quantum"), std::string::npos);
  EXPECT_NE(backend.error().hint.find("scalar"), std::string::npos);
}

TEST(CpuBackend, TargetsLiveSideBySide) {
  // A later backend must not change what an earlier one runs.
  std::vector<std::unique_ptr<const Backend>> backends;
  const model::WeightFormat weights{model::WeightFormat::Kind::kAffine, 4, 32};
  // A target of one extension has all other kernels of the target below it.
  const auto kernel = [&](const Backend& backend) {
    return std::pair(*backend.linear(weights, {.bits = 8}),
                     *backend.linear(weights, {.bf16 = true}));
  };
  std::vector<std::pair<LinearFn, LinearFn>> before;
  for (const std::string& target : cpu_targets()) {
    backends.push_back(backend_of(target));
    before.push_back(kernel(*backends.back()));
  }
  for (size_t i = 0; i < backends.size(); ++i) {
    EXPECT_EQ(kernel(*backends[i]), before[i]);
    for (size_t j = 0; j < i; ++j) EXPECT_NE(before[i], before[j]);
    // A target that few kernels are compiled for gets the next best of the others.
    EXPECT_NE(*backends[i]->rope(), nullptr);
  }
}

TEST(CpuBackend, ExtensionsAttendWithKernelsOfTheirOwn) {
  const quant::KvPageLayout layout = *quant::KvPageLayout::make({.k_bits = 8, .v_bits = 8}, 1, 64);
  const std::vector<std::string> targets = cpu_targets();
  const auto has = [&](const char* target) {
    return std::find(targets.begin(), targets.end(), target) != targets.end();
  };
  struct Extension {
    const char *name, *of;
    bool pages;  // attention over codes of pages too, not only over those of a frame
  };
  for (const Extension& extension : {Extension{"avx2_vnni", "avx2", true},
                                     {"avx3_amx", "avx3_dl", true},
                                     {"avx3_zen4", "avx3_dl", false},
                                     {"neon_dot", "neon", false},
                                     {"neon_i8mm", "neon_dot", false}}) {
    if (!has(extension.name)) continue;
    const auto backend = backend_of(extension.name), below = backend_of(extension.of);
    EXPECT_NE(*backend->encoder_attention(64, {.bits = 8}),
              *below->encoder_attention(64, {.bits = 8}))
        << extension.name;
    EXPECT_EQ(*backend->attention(layout) != *below->attention(layout), extension.pages)
        << extension.name;
  }
}

#if FRAMEQUILT_AVX2_VNNI
// Here only where the compiler can name the extensions; machines with AVX-VNNI alone have no check.
TEST(CpuBackend, Avx2WithDotProductsComesBeforeAvx2) {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512vnni"))
    GTEST_SKIP() << "needs AVX-512 with VNNI";
  const std::vector<std::string> targets = cpu_targets();
  const auto at = std::find(targets.begin(), targets.end(), "avx2_vnni");
  ASSERT_NE(at, targets.end());
  EXPECT_EQ(*(at + 1), "avx2");
}
#endif

#if defined(__x86_64__) && defined(__linux__)
// Whether registers of a thread hold tiles (the system's name for them: component 18).
bool holds_tiles() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
  return (low >> 18 & 1) != 0;
}

// A thread may go on with other code that uses them, and the system saves what they hold.
TEST(CpuBackend, KernelsLeaveNoTilesBehind) {
  const std::vector<std::string> targets = cpu_targets();
  if (std::find(targets.begin(), targets.end(), "avx3_amx") == targets.end())
    GTEST_SKIP() << "needs AMX";
  EXPECT_EQ(targets.front(), "avx3_amx");
  const model::WeightFormat w4{model::WeightFormat::Kind::kAffine, 4, 64};
  for (const model::ActivationFormat& inputs :
       {model::ActivationFormat{.bits = 8}, model::ActivationFormat{.bf16 = true}}) {
    Problem problem(w4, 64, 128, 40, false, false, inputs);
    const auto backend = backend_of("avx3_amx");
    problem.run(*backend->linear(w4, inputs), 1);
    EXPECT_FALSE(holds_tiles()) << inputs.name();
  }
  alignas(64) uint8_t config[64] = {1};  // palette 1; of tile 0: bytes of a row, rows
  config[16] = 64;
  config[48] = 16;
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
  __asm__ volatile("tilezero %tmm0");
  EXPECT_TRUE(holds_tiles());  // they are seen
  __asm__ volatile("tilerelease");
}
#endif

TEST(CpuBackend, UnsupportedFormatsAreRefusedByName) {
  const auto backend = backend_of("");
  model::WeightFormat odd{.kind = model::WeightFormat::Kind::kAffine, .bits = 7};
  const auto linear = backend->linear(odd, {});
  ASSERT_FALSE(linear);
  EXPECT_EQ(linear.error().code, Code::kUnsupported);
  EXPECT_NE(linear.error().hint.find("2 to 6 and 8"), std::string::npos);
  const auto inputs = backend->linear({.kind = model::WeightFormat::Kind::kBF16}, {.bits = 8});
  ASSERT_FALSE(inputs);
  EXPECT_EQ(inputs.error().code, Code::kUnsupported);
  const auto rounded = backend->linear({.kind = model::WeightFormat::Kind::kF32}, {.bf16 = true});
  ASSERT_FALSE(rounded);
  EXPECT_EQ(rounded.error().code, Code::kUnsupported);
  EXPECT_NE(rounded.error().message.find("abf16 inputs and f32 weights"), std::string::npos);
  EXPECT_NE(rounded.error().hint.find("bf16"), std::string::npos);
  quant::KvPageLayout layout = *quant::KvPageLayout::make({.k_bits = 8, .v_bits = 4}, 1, 64);
  layout.v.bits = 5;
  EXPECT_EQ(backend->attention(layout).error().code, Code::kUnsupported);
  EXPECT_EQ(backend->kv_append(layout).error().code, Code::kUnsupported);
  EXPECT_EQ(backend->importance(layout).error().code, Code::kUnsupported);
  EXPECT_EQ(backend->encoder_attention(4096, {}).error().code, Code::kUnsupported);
}

}  // namespace
}  // namespace fq::backend
