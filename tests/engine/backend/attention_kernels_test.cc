// Attention, importance, encoder attention and KV append kernels of every SIMD target against the
// scalar references.
#include <algorithm>

#include "src/core/aligned.h"
#include "tests/engine/backend/kernel_testing.h"

namespace fq::backend {
namespace {

using quant::KvPageLayout;

struct Shape {
  int heads, kv_heads, head_dim;
  const char* format;
};

struct Case {
  std::string target;
  Shape shape;
};

std::string case_name(const testing::TestParamInfo<Case>& info) {
  const Shape& s = info.param.shape;
  std::string name = info.param.target + "_h" + std::to_string(s.heads) + "kv" +
                     std::to_string(s.kv_heads) + "d" + std::to_string(s.head_dim) + s.format;
  std::replace(name.begin(), name.end(), '+', '_');
  return name;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const std::string& target : simd_target_names()) {
    for (const char* format : {"kv32", "kv16", "kv8", "kv6", "kv4", "kv3", "kv2", "k8v4"}) {
      all.push_back({target, {4, 2, 32, format}});
      all.push_back({target, {7, 1, 64, format}});
      all.push_back({target, {1, 1, 7, format}});
    }
    for (const char* format : {"kv16", "kv8", "kv3"}) {
      all.push_back({target, {3, 3, 24, format}});
      all.push_back({target, {2, 1, 72, format}});
      all.push_back({target, {6, 1, 96, format}});
    }
    for (const char* format : {"kv8g16", "k6v2g16", "k4v3g16", "k16v2g16", "k3v32g16"}) {
      all.push_back({target, {2, 2, 80, format}});
      all.push_back({target, {5, 1, 64, format}});
    }
    // Few rows, by number of them.
    all.push_back({target, {2, 2, 128, "kv8"}});
    all.push_back({target, {2, 1, 64, "k4v8"}});
    all.push_back({target, {4, 1, 64, "kv8g64"}});
    all.push_back({target, {6, 1, 128, "k8v4g64"}});
    all.push_back({target, {3, 1, 20, "kv3"}});  // no whole units of rows of codes
    all.push_back({target, {2, 2, 22, "k6v2"}});
    all.push_back({target, {8, 1, 128, "kv4g64"}});
    all.push_back({target, {9, 1, 256, "kv6"}});
    all.push_back({target, {3, 1, 64, "kv4+scale32"}});
  }
  return all;
}

// Pages of one layer of one sequence, filled by the reference.
struct Cache {
  KvPageLayout layout;
  std::vector<AlignedBuffer<std::byte>> storage;
  std::vector<std::byte*> pages;
  std::vector<float> k, v;
  int64_t length;

  Cache(const Shape& s, int64_t tokens, uint32_t seed) : length(tokens) {
    auto made = KvPageLayout::make(*quant::parse_kv_format(s.format), s.kv_heads, s.head_dim);
    EXPECT_TRUE(made);
    layout = *made;
    const size_t width = static_cast<size_t>(s.kv_heads * s.head_dim);
    k = normal_values(width * static_cast<size_t>(tokens), seed);
    v = normal_values(width * static_cast<size_t>(tokens), seed + 1);
    for (size_t i = 3; i < k.size(); i += 29) k[i] *= 20.0f;  // outlier channels
    std::fill_n(v.begin(), width, 0.0f);                      // a token of zeros
    clear();
  }

  // New pages, filled with a pattern that is no number at all when read as float32 or half.
  void clear() {
    storage.clear();
    pages.clear();
    for (int64_t begin = 0; begin < length; begin += quant::kPageTokens) {
      storage.emplace_back(layout.page_bytes);
      std::memset(storage.back().data(), 0xFF, layout.page_bytes);
      pages.push_back(storage.back().data());
    }
  }

  ops::KvAppendArgs append_args(int64_t begin, int64_t rows) const {
    const int64_t width = int64_t{layout.kv_heads} * layout.head_dim;
    return {.k = k.data() + begin * width,
            .v = v.data() + begin * width,
            .k_stride = width,
            .v_stride = width,
            .rows = rows,
            .begin = begin,
            .kv = view()};
  }
  void fill() { ops::kv_append_reference(append_args(0, length)); }
  ops::KvView view() const { return {&layout, pages.data(), length}; }
};

class AttentionKernels : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override { backend_ = backend_of(GetParam().target); }
  const Shape& shape() const { return GetParam().shape; }
  int64_t width() const { return int64_t{shape().heads} * shape().head_dim; }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(shape().head_dim)); }

  // A score is a sum of head_dim products; without fusion two orders of rounding differ by 4
  // head_dim u sum |q k|. exp turns that into a relative error, a weighted mean of values at most
  // max |v| keeps it; 1000 units for the sums over at most 200 tokens. With codes a weight may get
  // another one, 2^-15 of the largest away.
  void expect_equal(const std::vector<float>& got, const std::vector<float>& want,
                    double most_score, double most_v) {
    if (has_fma(GetParam().target)) {
      EXPECT_SAME_BITS(got, want);
      return;
    }
    const bool codes = std::string_view(shape().format).find("32") == std::string_view::npos;
    const double bound =
        ((8.0 * shape().head_dim * most_score + 1000.0) * kUnit + (codes ? 0x1p-15 : 0)) * most_v;
    for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], want[i], bound) << "element " << i;
  }

  // Exact sums of codes. Without fusion a probability's code may be another one, by 1.
  void expect_codes_equal(const std::vector<float>& got, const std::vector<float>& want) {
    if (has_fma(GetParam().target)) {
      EXPECT_SAME_BITS(got, want);
      return;
    }
    for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], want[i], 4 * 0x1p-13) << i;
  }

  std::unique_ptr<const Backend> backend_;
  ThreadPool pool_{2};
};

double most_of(const std::vector<float>& values) {
  double most = 0;
  for (const float value : values) most = std::max(most, std::fabs(double{value}));
  return most;
}

TEST_P(AttentionKernels, EqualTheReferenceAroundPageBorders) {
  const std::pair<int64_t, int64_t> spans[] = {{0, 1},   {0, 5},   {0, 65},  {60, 9},
                                               {63, 1},  {64, 1},  {127, 2}, {50, 130},
                                               {511, 1}, {510, 4}, {530, 1}, {1030, 1}};
  for (const auto& [begin, rows] : spans) {
    SCOPED_TRACE(testing::Message() << "begin " << begin << " rows " << rows);
    Cache cache(shape(), begin + rows, 11);
    cache.fill();
    const int64_t stride = width() + 5;
    const auto q = normal_values(static_cast<size_t>(rows * stride), 12);
    std::vector<float> got(q.size(), 7.0f), want(q.size(), 7.0f);
    ops::AttentionArgs args{.q = q.data(),
                            .q_stride = stride,
                            .out = want.data(),
                            .out_stride = stride,
                            .rows = rows,
                            .begin = begin,
                            .heads = shape().heads,
                            .scale = scale(),
                            .kv = cache.view()};
    for (const bool exact : {false, true}) {
      args.exact = exact;
      args.out = want.data();
      ops::attention_reference(args);
      args.out = got.data();
      const AttentionFn kernel = *backend_->attention(cache.layout);
      on_new_thread([&] { kernel({&args, 1}, pool_); });
      const double most_score = scale() * shape().head_dim * most_of(q) * most_of(cache.k);
      expect_equal(got, want, most_score, most_of(cache.v));
      if (HasFailure()) return;
    }
  }
}

TEST_P(AttentionKernels, ValueOfARowDoesNotDependOnTheTile) {
  const int64_t rows = 150, begin = 40;
  Cache cache(shape(), begin + rows, 21);
  cache.fill();
  Cache other(shape(), 70, 23);
  other.fill();
  const auto q = normal_values(static_cast<size_t>(rows * width()), 22);
  std::vector<float> together(q.size()), pieces(q.size()), aside(static_cast<size_t>(width()));
  ops::AttentionArgs args{.q = q.data(),
                          .q_stride = width(),
                          .out = together.data(),
                          .out_stride = width(),
                          .rows = rows,
                          .begin = begin,
                          .heads = shape().heads,
                          .scale = scale(),
                          .kv = cache.view()};
  const AttentionFn kernel = *backend_->attention(cache.layout);
  kernel({&args, 1}, pool_);
  int64_t done = 0;
  for (const int64_t count : {1, 1, 2, 61, 7, 78}) {
    ops::AttentionArgs part = args;
    part.q += done * width();
    part.out = pieces.data() + done * width();
    part.rows = count;
    part.begin += done;
    part.kv.length = part.begin + count;
    // Beside another sequence, in one call.
    const ops::AttentionArgs neighbour{.q = q.data(),
                                       .q_stride = width(),
                                       .out = aside.data(),
                                       .out_stride = width(),
                                       .rows = 1,
                                       .begin = 69,
                                       .heads = shape().heads,
                                       .scale = scale(),
                                       .kv = other.view()};
    const ops::AttentionArgs both[] = {neighbour, part};
    kernel(std::span(both), pool_);
    done += count;
  }
  ASSERT_EQ(done, rows);
  EXPECT_SAME_BITS(pieces, together);
}

TEST_P(AttentionKernels, ThreadsShareTheChunksOfASequenceWithoutAChange) {
  // 2100 tokens are five chunks; three rows at once, as one sequence's and beside a short one.
  const int64_t rows = 3, begin = 2097;
  Cache cache(shape(), begin + rows, 61);
  cache.fill();
  Cache other(shape(), 5, 63);
  other.fill();
  const auto q = normal_values(static_cast<size_t>(rows * width()), 62);
  const AttentionFn kernel = *backend_->attention(cache.layout);
  const auto run = [&](int threads, int64_t first, int64_t count, bool neighbour) {
    ThreadPool pool(threads);
    std::vector<float> out(static_cast<size_t>(count * width()));
    std::vector<float> aside(static_cast<size_t>(width()));
    ops::AttentionArgs args{.q = q.data() + first * width(),
                            .q_stride = width(),
                            .out = out.data(),
                            .out_stride = width(),
                            .rows = count,
                            .begin = begin + first,
                            .heads = shape().heads,
                            .scale = scale(),
                            .kv = cache.view()};
    ops::AttentionArgs near = args;
    near.out = aside.data();
    near.rows = 1;
    near.begin = 4;
    near.kv = other.view();
    const ops::AttentionArgs both[] = {near, args};
    const std::span<const ops::AttentionArgs> one(&args, 1);
    on_new_thread([&] { kernel(neighbour ? std::span(both) : one, pool); });
    return out;
  };
  const std::vector<float> alone = run(1, 0, rows, false);
  for (const int threads : {2, 3, 9}) {
    EXPECT_SAME_BITS(run(threads, 0, rows, false), alone);
    EXPECT_SAME_BITS(run(threads, 0, rows, true), alone);
  }
  const std::vector<float> last(alone.end() - width(), alone.end());
  EXPECT_SAME_BITS(run(1, rows - 1, 1, false), last);
  EXPECT_SAME_BITS(run(9, rows - 1, 1, true), last);
}

TEST_P(AttentionKernels, ImportanceEqualsTheReference) {
  for (const int64_t length : {4, 64, 65, 200}) {
    for (const int queries : {1, 4}) {
      SCOPED_TRACE(testing::Message() << "length " << length << " queries " << queries);
      Cache cache(shape(), length, 31);
      cache.fill();
      const auto q = normal_values(static_cast<size_t>(queries * width()), 32);
      std::vector<float> got(static_cast<size_t>(length)), want(got.size());
      ops::ImportanceArgs args{.q = q.data(),
                               .q_stride = width(),
                               .queries = queries,
                               .heads = shape().heads,
                               .scale = scale(),
                               .kv = cache.view(),
                               .out = want.data()};
      for (const bool exact : {false, true}) {
        args.exact = exact;
        args.out = want.data();
        ops::importance_reference(args);
        args.out = got.data();
        const ImportanceFn kernel = *backend_->importance(cache.layout);
        on_new_thread([&] { kernel(args, pool_); });
        const double most_score = scale() * shape().head_dim * most_of(q) * most_of(cache.k);
        expect_equal(got, want, most_score, 1.0);
        double sum = 0;
        for (const float value : got) sum += value;
        EXPECT_NEAR(sum, 1.0, 1e-4);  // probabilities: 200 roundings of 6e-8, summed in double
      }
    }
  }
}

TEST_P(AttentionKernels, AppendWritesTheBytesOfTheReference) {
  for (const int64_t length : {1, 63, 64, 130}) {
    Cache cache(shape(), length, 41);
    cache.fill();
    const std::vector<AlignedBuffer<std::byte>> want = std::move(cache.storage);
    cache.clear();
    const KvAppendFn kernel = *backend_->kv_append(cache.layout);
    int64_t done = 0;  // in uneven pieces, as chunks come
    for (int64_t count = 1; done < length; count = std::min(2 * count + 1, length - done)) {
      on_new_thread([&] { kernel(cache.append_args(done, count), pool_); });
      done += count;
    }
    for (size_t page = 0; page < want.size(); ++page) {
      const auto* const got = cache.pages[page];
      for (size_t i = 0; i < cache.layout.page_bytes; ++i) {
        ASSERT_EQ(got[i], want[page][i])
            << "length " << length << " page " << page << " byte " << i;
      }
    }
  }
}

TEST_P(AttentionKernels, EncoderAttentionEqualsTheReference) {
  if (std::string_view(shape().format) != "kv32") return;  // no pages in it: one is enough
  for (const int64_t tokens : {1, 16, 63, 64, 100, 195}) {
    SCOPED_TRACE(tokens);
    const int64_t blocks = 2, stride = width() + 3;
    const size_t size = static_cast<size_t>(blocks * tokens * stride);
    const auto q = normal_values(size, 51), k = normal_values(size, 52),
               v = normal_values(size, 53);
    std::vector<float> got(size, 3.0f), want(size, 3.0f);
    ops::EncoderAttentionArgs args{.q = q.data(),
                                   .k = k.data(),
                                   .v = v.data(),
                                   .out = want.data(),
                                   .stride = stride,
                                   .blocks = blocks,
                                   .tokens = tokens,
                                   .heads = shape().heads,
                                   .head_dim = shape().head_dim,
                                   .scale = scale()};
    ops::encoder_attention_reference(args);
    args.out = got.data();
    const EncoderAttentionFn kernel = *backend_->encoder_attention(shape().head_dim, {});
    on_new_thread([&] { kernel(args, pool_); });
    expect_equal(got, want, scale() * shape().head_dim * most_of(q) * most_of(k), most_of(v));
  }
}

TEST_P(AttentionKernels, IntegerEncoderAttentionEqualsTheReferenceBitForBit) {
  if (std::string_view(shape().format) != "kv32") return;
  for (const int64_t tokens : {1, 2, 13, 64, 100, 255, 256, 257, 515}) {
    SCOPED_TRACE(tokens);
    const int64_t blocks = 2, stride = width() + 3;
    const size_t size = static_cast<size_t>(blocks * tokens * stride);
    const auto q = normal_values(size, 51), k = normal_values(size, 52),
               v = normal_values(size, 53);
    std::vector<float> got(size, 3.0f), want(size, 3.0f);
    ops::EncoderAttentionArgs args{.q = q.data(),
                                   .k = k.data(),
                                   .v = v.data(),
                                   .out = want.data(),
                                   .stride = stride,
                                   .blocks = blocks,
                                   .tokens = tokens,
                                   .heads = shape().heads,
                                   .head_dim = shape().head_dim,
                                   .scale = scale()};
    ops::integer_encoder_attention_reference(args);
    args.out = got.data();
    const EncoderAttentionFn kernel = *backend_->encoder_attention(shape().head_dim, {.bits = 8});
    on_new_thread([&] { kernel(args, pool_); });
    expect_codes_equal(got, want);
  }
}

TEST_P(AttentionKernels, IntegerEncoderAttentionKeepsWhatIsNotFiniteInItsPlace) {
  if (std::string_view(shape().format) != "kv32") return;
  const int64_t blocks = 2, tokens = 40, stride = width();
  const size_t size = static_cast<size_t>(blocks * tokens * stride);
  for (const int where : {0, 1, 2}) {
    std::vector<float> x[] = {normal_values(size, 51), normal_values(size, 52),
                              normal_values(size, 53)};
    x[where][static_cast<size_t>(7 * stride + shape().head_dim / 2)] = where == 1 ? NAN : INFINITY;
    std::vector<float> got(size), want(size);
    ops::EncoderAttentionArgs args{.q = x[0].data(),
                                   .k = x[1].data(),
                                   .v = x[2].data(),
                                   .out = want.data(),
                                   .stride = stride,
                                   .blocks = blocks,
                                   .tokens = tokens,
                                   .heads = shape().heads,
                                   .head_dim = shape().head_dim,
                                   .scale = scale()};
    ops::integer_encoder_attention_reference(args);
    args.out = got.data();
    const EncoderAttentionFn kernel = *backend_->encoder_attention(shape().head_dim, {.bits = 8});
    on_new_thread([&] { kernel(args, pool_); });
    for (size_t i = 0; i < size; ++i)
      ASSERT_EQ(std::isnan(got[i]), std::isnan(want[i])) << where << " element " << i;
  }
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(AttentionKernels);  // a machine without SIMD
INSTANTIATE_TEST_SUITE_P(Targets, AttentionKernels, testing::ValuesIn(cases()), case_name);

}  // namespace
}  // namespace fq::backend
