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

TEST_F(EngineDeterminism, RowsWithoutLogitsMayBeLeftOutOfTheLastLayer) {
  // With prompt logits every row goes through the whole last layer, without them only the last one
  // does: the same answer, from the same keys and values.
  for (const char* kv : {"kv32", "k8v4", "kv4+rotate", "kv6+ends16"}) {
    for (const int chunk : {256, 17, 1}) {
      SCOPED_TRACE(std::string(kv) + ", chunk " + std::to_string(chunk));
      EngineOptions options = manual();
      options.kv = kv;
      options.chunk_rows = chunk;
      auto engine = make(options);
      for (Request request : {text_request(70, 21), video_request(5, 22, false)}) {
        const Answer answer = run(*engine, request);
        request.return_prompt_logits = true;
        const Answer all = run(*engine, request);
        expect_same(answer, all);
        const auto vocab = static_cast<ptrdiff_t>(tiny_.vocab);
        ASSERT_GE(all.prompt_logits.size(), static_cast<size_t>(vocab));
        EXPECT_TRUE(std::equal(answer.logits.begin(), answer.logits.begin() + vocab,
                               all.prompt_logits.end() - vocab));
      }
      expect_nothing_leaked(*engine);
    }
  }
}

TEST_F(EngineDeterminism, AFrameThatEqualsTheOneBeforeIsNotEncodedAgain) {
  const Media three = video(3, 41);
  const size_t frame = three.data.size() / 3;
  const std::vector<int> order = {0, 0, 1, 2, 2, 2, 0};
  Media whole;
  whole.kind = MediaKind::kVideo;
  whole.frames = static_cast<int>(order.size());
  whole.height = whole.width = tiny_.image_size;
  Request apart = text_request(9, 42);  // every frame a video of its own: nothing to compare with
  for (const int f : order) {
    const auto* const at = three.data.data() + static_cast<size_t>(f) * frame;
    Media one = whole;
    one.frames = 1;
    one.data.assign(at, at + frame);
    whole.data.insert(whole.data.end(), one.data.begin(), one.data.end());
    apart.media.push_back(std::move(one));
  }
  Request together = text_request(9, 42);
  together.media.push_back(std::move(whole));
  together.prompt.insert(together.prompt.begin() + 3, kMediaToken);
  apart.prompt.insert(apart.prompt.begin() + 3, order.size(), kMediaToken);

  for (const int chunk : {256, 16, 1}) {  // 32 frames, two frames and one go through the tower
    SCOPED_TRACE("chunk " + std::to_string(chunk));
    EngineOptions options = manual();
    options.chunk_rows = chunk;
    auto engine = make(options);
    const Answer once = run(*engine, together);
    const Answer each = run(*engine, apart);
    expect_same(once, each);
    EXPECT_EQ(once.usage.frames, 7);
    EXPECT_EQ(once.usage.frames_encoded, 4);
    EXPECT_EQ(each.usage.frames_encoded, 7);
  }
}

TEST_F(EngineDeterminism, TilesOfAnImageAreAllEncoded) {
  // They are laid out as one picture, whether two of them are equal or not.
  Media image = video(1, 43);
  image.kind = MediaKind::kImage;
  image.frames = 3;
  const std::vector<float> tile = image.data;
  for (int i = 0; i < 2; ++i) image.data.insert(image.data.end(), tile.begin(), tile.end());
  const int grid = tiny_.image_size / tiny_.patch;
  image.tiles = ImageTiles{.rows = 1, .cols = 2, .crop_height = grid, .crop_width = 2 * grid};
  Request request = text_request(9, 44);
  request.prompt.insert(request.prompt.begin() + 3, kMediaToken);
  request.media.push_back(std::move(image));
  const Answer answer = run(*make(manual()), request);
  EXPECT_EQ(answer.finish, FinishReason::kLength);
  EXPECT_EQ(answer.usage.frames, 3);
  EXPECT_EQ(answer.usage.frames_encoded, 3);
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

TEST_F(EngineDeterminism, AReductionThatGoesOnInTheLastLayerSeesWhatItDidToEveryRow) {
  // Decisions after the last layer are those that a deeper model takes after the same layer, where
  // every row goes on.
  const auto decisions = [&](int layers) {
    TinyModelOptions options;
    options.layers = layers;
    open(options);
    Request request = text_request(7, 31);
    request.prompt.insert(request.prompt.begin() + 2, kMediaToken);
    Media media;
    media.kind = MediaKind::kEmbedding;
    media.rows = 120;
    std::mt19937 rng(32);
    std::normal_distribution<float> normal;
    for (int row = 0; row < media.rows; ++row) {
      media.slots.push_back(row % 10);
      for (int i = 0; i < options.hidden; ++i) media.data.push_back(normal(rng));
    }
    request.media.push_back(std::move(media));
    // Merging never ends by itself: not for want of pairs, and the budget is that of many layers.
    request.reduction.framefusion = FrameFusionOptions{
        .cost = 0.2, .similarity_lower_bound = 0.2, .ratio_lower_bound = 0.0, .budget_layers = 40};
    return run(*make(manual()), request).usage.reduction.calls;
  };
  const auto calls = decisions(3);
  const auto deeper = decisions(4);
  ASSERT_EQ(calls.size(), 4u);
  ASSERT_EQ(deeper.size(), 5u);
  for (size_t i = 0; i < calls.size(); ++i) {
    SCOPED_TRACE("call " + std::to_string(i));
    EXPECT_EQ(calls[i].branch, "merge_continue");
    EXPECT_GT(calls[i].merged, 0);
    EXPECT_EQ(calls[i].merged, deeper[i].merged);
    EXPECT_EQ(calls[i].rows_out, deeper[i].rows_out);
  }
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
