// An answer depends on its request alone: not on page order, chunk size, threads, KV neighbours or
// what ran before.
#include "tests/engine/runtime/engine_fixture.h"

namespace fq::testing {
namespace {

using EngineDeterminism = EngineTest;

std::vector<Request> mixed_requests(const std::function<Request(int, uint32_t)>& text,
                                    const std::function<Request(int, uint32_t, bool)>& video) {
  std::vector<Request> requests;
  requests.push_back(text(70, 1));
  requests.push_back(video(5, 2, true));
  requests.push_back(text(1, 3));
  requests.push_back(video(4, 4, false));
  requests.push_back(video(9, 5, true));
  return requests;
}

TEST_F(EngineDeterminism, AnswersDoNotDependOnPagesChunksThreadsOrNeighbours) {
  const auto requests =
      mixed_requests([&](int n, uint32_t s) { return text_request(n, s); },
                     [&](int f, uint32_t s, bool r) { return video_request(f, s, r); });
  for (const char* kv : {"kv32", "kv16", "kv8", "k8v4", "kv3g16", "kv2+rotate", "kv6+ends16"}) {
    SCOPED_TRACE(kv);
    EngineOptions base = manual();
    base.kv = kv;
    std::vector<Answer> alone;
    {
      auto engine = make(base);
      for (const Request& request : requests) alone.push_back(run(*engine, request));
      for (const Answer& answer : alone) ASSERT_EQ(answer.finish, FinishReason::kLength);
      expect_nothing_leaked(*engine);
    }
    struct Variant {
      const char* name;
      int chunk, threads;
      uint32_t shuffle;
    };
    for (const Variant& v : {Variant{"shuffled pages", 256, 1, 7}, Variant{"chunk 1", 1, 1, 0},
                             Variant{"chunk 17", 17, 1, 3}, Variant{"two threads", 256, 2, 0},
                             Variant{"three threads, chunk 5", 5, 3, 11}}) {
      SCOPED_TRACE(v.name);
      EngineOptions options = base;
      options.chunk_rows = v.chunk;
      options.threads = v.threads;
      options.page_shuffle_seed = v.shuffle;
      auto engine = make(options);
      // All at once: they share every pass.
      std::vector<Stream> streams;
      for (const Request& request : requests) streams.push_back(engine->submit(request));
      engine->run();
      for (size_t i = 0; i < streams.size(); ++i) {
        SCOPED_TRACE("request " + std::to_string(i));
        expect_same(collect(streams[i]), alone[i]);
      }
      expect_nothing_leaked(*engine);
    }
  }
}

TEST_F(EngineDeterminism, EverySimdTargetAgreesWithTheReferencesOnTheTokens) {
  // Float32 FMA targets repeat the references' arithmetic; tokens must agree whatever the target.
  const Request request = video_request(6, 3, true);
  EngineOptions options = manual();
  options.simd = "scalar";
  const Answer reference = run(*make(options), request);
  options.simd = "";
  const Answer fast = run(*make(options), request);
  EXPECT_EQ(fast.tokens, reference.tokens);
  EXPECT_EQ(fast.usage.kept_per_layer, reference.usage.kept_per_layer);
}

TEST_F(EngineDeterminism, FeedingTheAnswerAsPromptGivesTheSameLogits) {
  // Decode one token at a time equals prefill of the same tokens: the KV path is one.
  auto engine = make(manual());
  Request request = text_request(40, 9, 12);
  const Answer answer = run(*engine, request);
  Request replay = request;
  replay.prompt.insert(replay.prompt.end(), answer.tokens.begin(), answer.tokens.end() - 1);
  replay.return_prompt_logits = true;
  replay.sampling.max_tokens = 1;
  const Answer again = run(*engine, replay);
  const size_t vocab = static_cast<size_t>(tiny_.vocab);
  ASSERT_EQ(again.prompt_logits.size(), replay.prompt.size() * vocab);
  const std::vector<float> tail(
      again.prompt_logits.end() - static_cast<ptrdiff_t>(answer.tokens.size() * vocab),
      again.prompt_logits.end());
  EXPECT_EQ(tail, answer.logits);
}

TEST_F(EngineDeterminism, CostOneEqualsNoReduction) {
  auto engine = make(manual());
  Request on = video_request(6, 12, true);
  on.reduction.framefusion->cost = 1.0;
  Request off = on;
  off.reduction.framefusion.reset();
  const Answer a = run(*engine, on);
  const Answer b = run(*engine, off);
  EXPECT_EQ(a.logits, b.logits);
  EXPECT_EQ(a.usage.kept_per_layer, b.usage.kept_per_layer);
}

TEST_F(EngineDeterminism, SeededSamplingRepeatsAndSeedsDiffer) {
  auto engine = make(manual());
  Request request = text_request(20, 5, 24);
  request.sampling.temperature = 1.5f;
  request.sampling.seed = 42;
  const Answer a = run(*engine, request);
  const Answer b = run(*engine, request);
  EXPECT_EQ(a.tokens, b.tokens);
  request.sampling.seed = 43;
  EXPECT_NE(run(*engine, request).tokens, a.tokens);
}

TEST_F(EngineDeterminism, ReductionShrinksDeeperLayersAndTheirKv) {
  auto engine = make(manual());
  const Answer answer = run(*engine, video_request(24, 8, true));
  ASSERT_EQ(answer.finish, FinishReason::kLength);
  const auto& kept = answer.usage.kept_per_layer;
  ASSERT_EQ(kept.size(), 3u);
  EXPECT_TRUE(std::is_sorted(kept.rbegin(), kept.rend()));
  EXPECT_LT(kept.back(), answer.usage.prompt_tokens);
  EXPECT_LT(answer.usage.kv_bytes, answer.usage.kv_bytes_unreduced);
  EXPECT_EQ(answer.usage.reduction.stage, "framefusion");
  EXPECT_FALSE(answer.usage.reduction.calls.empty());
}

}  // namespace
}  // namespace fq::testing
