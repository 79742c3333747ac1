// Cancelling, failing, waiting and closing: every page comes back, and the next request is served.
#include <atomic>
#include <thread>

#include "tests/engine/runtime/engine_fixture.h"

namespace fq::testing {
namespace {

using EngineLifecycle = EngineTest;

TEST_F(EngineLifecycle, CancelAfterAnyStepLeaksNothingAndTheNextAnswerIsUnchanged) {
  EngineOptions options = manual();
  options.chunk_rows = 16;
  auto engine = make(options);
  const Answer expected = run(*engine, video_request(8, 21, true));
  const Answer expected_text = run(*engine, text_request(60, 22));
  for (int steps = 0; steps < 24; ++steps) {
    SCOPED_TRACE(steps);
    Stream video = engine->submit(video_request(8, 21, true));
    Stream text = engine->submit(text_request(60, 22));
    Stream other = engine->submit(video_request(3, 23, false));
    for (int i = 0; i < steps; ++i) engine->step();
    video.cancel();
    other.cancel();
    ASSERT_TRUE(engine->check_integrity());
    // Cancelling takes effect at the next layer boundary: one more step, and the end is there.
    engine->step();
    FinishReason finish = FinishReason::kNone;
    while (auto event = video.next_for(0)) finish = event->finish;
    EXPECT_TRUE(finish == FinishReason::kCancelled || finish == FinishReason::kLength);
    engine->run();
    expect_same(collect(text), expected_text);
    expect_nothing_leaked(*engine);
  }
  expect_same(run(*engine, video_request(8, 21, true)), expected);
}

TEST_F(EngineLifecycle, LeavingAStreamCancelsItsRequest) {
  auto engine = make(manual());
  { Stream dropped = engine->submit(text_request(30, 1, 500)); }
  engine->run();
  EXPECT_LE(engine->stats().steps, 3);
  expect_nothing_leaked(*engine);
}

struct BadRequest {
  const char* name;
  Code code;
  std::function<void(Request&)> spoil;
};

TEST_F(EngineLifecycle, BadRequestsGetTheirCodeAndTheEngineServesOn) {
  auto engine = make(manual());
  const Answer expected = run(*engine, text_request(10, 1));
  const std::vector<BadRequest> cases = {
      {"empty prompt", Code::kInvalidArgument, [](Request& r) { r.prompt.clear(); }},
      {"token outside the vocabulary", Code::kInvalidArgument,
       [](Request& r) { r.prompt[0] = 80; }},
      {"negative token", Code::kInvalidArgument, [](Request& r) { r.prompt[0] = -7; }},
      {"placeholder without media", Code::kInvalidArgument,
       [](Request& r) { r.prompt[0] = kMediaToken; }},
      {"media without placeholder", Code::kInvalidArgument,
       [&](Request& r) { r.media.push_back(video(2, 1)); }},
      {"frames of another size", Code::kInvalidArgument,
       [&](Request& r) {
         r.prompt[0] = kMediaToken;
         r.media.push_back(video(2, 1));
         r.media[0].height = 8;
       }},
      {"zero frames", Code::kInvalidArgument,
       [&](Request& r) {
         r.prompt[0] = kMediaToken;
         r.media.emplace_back();
         r.media[0].height = r.media[0].width = 16;
       }},
      {"data that does not match the frames", Code::kInvalidArgument,
       [&](Request& r) {
         r.prompt[0] = kMediaToken;
         r.media.push_back(video(2, 1));
         r.media[0].data.pop_back();
       }},
      {"prompt over the context", Code::kContextOverflow,
       [](Request& r) { r.prompt.assign(2048, 1); }},
      {"no tokens wanted", Code::kInvalidArgument, [](Request& r) { r.sampling.max_tokens = 0; }},
      {"negative temperature", Code::kInvalidArgument,
       [](Request& r) { r.sampling.temperature = -1; }},
      {"stop strings without text", Code::kInvalidArgument,
       [](Request& r) { r.sampling.stop_strings = {"x"}; }},
      {"cost of zero", Code::kInvalidArgument,
       [](Request& r) { r.reduction.framefusion = FrameFusionOptions{.cost = 0.0}; }},
      {"cost that is not a number", Code::kInvalidArgument,
       [](Request& r) { r.reduction.framefusion = FrameFusionOptions{.cost = std::nan("")}; }},
      {"prompt logits with reduction", Code::kInvalidArgument,
       [](Request& r) {
         r.reduction.framefusion = FrameFusionOptions{};
         r.return_prompt_logits = true;
       }},
  };
  for (const BadRequest& bad : cases) {
    SCOPED_TRACE(bad.name);
    Request request = text_request(10, 1);
    bad.spoil(request);
    const Answer answer = run(*engine, request);
    EXPECT_EQ(answer.finish, FinishReason::kError);
    ASSERT_TRUE(answer.error);
    EXPECT_EQ(answer.error->code, bad.code) << answer.error->to_string();
    EXPECT_FALSE(answer.error->message.empty());
    expect_same(run(*engine, text_request(10, 1)), expected);
    expect_nothing_leaked(*engine);
  }
}

TEST_F(EngineLifecycle, APoolThatIsTooSmallRefusesOnlyWhatCanNeverFit) {
  EngineOptions options = manual();
  options.chunk_rows = 8;
  options.max_sequences = 4;
  const MemoryPlan plan = make(options)->plan();
  // Room for three pages in each layer: 192 tokens of one sequence.
  options.memory_bytes = plan.workspace_bytes + 9 * plan.page_bytes;
  auto engine = make(options);
  ASSERT_EQ(engine->plan().pages, 9);
  const Answer refused = run(*engine, text_request(200, 1));
  ASSERT_TRUE(refused.error);
  EXPECT_EQ(refused.error->code, Code::kOutOfPages);
  EXPECT_FALSE(refused.error->hint.empty());
  // Two that fit one at a time: the second waits, both finish.
  Stream a = engine->submit(text_request(150, 2));
  Stream b = engine->submit(text_request(150, 3));
  engine->step();
  EXPECT_EQ(engine->stats().waiting + engine->stats().running, 2);
  engine->run();
  EXPECT_EQ(collect(a).finish, FinishReason::kLength);
  EXPECT_EQ(collect(b).finish, FinishReason::kLength);
  expect_nothing_leaked(*engine);
}

TEST_F(EngineLifecycle, MemoryBelowTheWorkspaceIsRefusedWithTheNeed) {
  EngineOptions options = manual();
  options.memory_bytes = 1;
  auto engine = Engine::create(model_, options);
  ASSERT_FALSE(engine);
  EXPECT_EQ(engine.error().code, Code::kInvalidArgument);
  EXPECT_NE(engine.error().message.find("MiB"), std::string::npos);
}

TEST_F(EngineLifecycle, AnswersStopAtTheContext) {
  EngineOptions options = manual();
  options.max_context = 40;
  auto engine = make(options);
  const Answer answer = run(*engine, text_request(30, 1, 500));
  EXPECT_EQ(answer.finish, FinishReason::kLength);
  EXPECT_EQ(answer.tokens.size(), 10u);
}

TEST_F(EngineLifecycle, UnknownOptionsNameWhatThereIs) {
  for (auto spoil :
       {+[](EngineOptions& o) { o.kv = "kv7"; }, +[](EngineOptions& o) { o.simd = "avx9"; },
        +[](EngineOptions& o) { o.chunk_rows = 0; }}) {
    EngineOptions options = manual();
    spoil(options);
    auto engine = Engine::create(model_, options);
    ASSERT_FALSE(engine);
    EXPECT_EQ(engine.error().code, Code::kInvalidArgument) << engine.error().to_string();
  }
}

TEST_F(EngineLifecycle, ThreadedEngineServesManySubmittersAndCancels) {
  EngineOptions options = manual();
  options.manual_step = false;
  options.threads = 2;
  options.max_sequences = 3;
  const Answer expected = run(*make(manual()), video_request(4, 31, true));
  auto engine = make(options);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 6; ++i) {
        Stream stream = engine->submit(video_request(4, 31, true));
        if ((t + i) % 3 == 0) {
          stream.next();  // leave after the first event
          continue;
        }
        expect_same(collect(stream), expected);
      }
    });
  }
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(engine->check_integrity());
  for (std::thread& thread : threads) thread.join();
  // Cancelled requests end at the next layer boundary; the last answer comes after them in the same
  // loop.
  expect_same(run(*engine, video_request(4, 31, true)), expected);
  while (engine->stats().running > 0) std::this_thread::yield();
  expect_nothing_leaked(*engine);
}

TEST_F(EngineLifecycle, ClosingCancelsWhatRunsAndRefusesWhatComes) {
  EngineOptions options = manual();
  options.manual_step = false;
  auto engine = make(options);
  Stream running = engine->submit(text_request(50, 1, 1500));
  ASSERT_TRUE(running.next());
  engine->close();
  EXPECT_EQ(collect(running).finish, FinishReason::kCancelled);
  const Answer late = run(*engine, text_request(5, 1));
  ASSERT_TRUE(late.error);
  EXPECT_EQ(late.error->code, Code::kClosed);
  expect_nothing_leaked(*engine);
}

TEST_F(EngineLifecycle, SeveralThreadsMayCloseAtOnce) {
  EngineOptions options = manual();
  options.manual_step = false;
  for (int round = 0; round < 20; ++round) {
    auto engine = make(options);
    Stream running = engine->submit(text_request(50, 1, 1500));
    ASSERT_TRUE(running.next());
    std::atomic<int> ready{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t) {
      threads.emplace_back([&] {
        ready.fetch_add(1);
        while (ready.load() < 3) std::this_thread::yield();
        engine->close();
        // Closed means that for everybody: nothing runs any more.
        EXPECT_EQ(engine->stats().running, 0);
        EXPECT_EQ(engine->stats().pages_free, engine->stats().pages_total);
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(collect(running).finish, FinishReason::kCancelled);
  }
}

TEST_F(EngineLifecycle, EnginesOfOneModelStartAndRunSideBySide) {
  const Answer expected = run(*make(manual()), video_request(4, 31, true));
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      EngineOptions options = manual();
      options.manual_step = false;
      options.threads = 1 + t;
      auto engine = make(options);
      for (int i = 0; i < 2; ++i) expect_same(run(*engine, video_request(4, 31, true)), expected);
      expect_nothing_leaked(*engine);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Whoever waits for an event drives the engine, now this thread and now that one.
TEST_F(EngineLifecycle, AManualEngineMayBeDrivenByAllItsConsumers) {
  const Answer expected = run(*make(manual()), video_request(4, 31, true));
  EngineOptions options = manual();
  options.threads = 2;
  auto engine = make(options);
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 2; ++i) expect_same(run(*engine, video_request(4, 31, true)), expected);
      EXPECT_TRUE(engine->check_integrity());
    });
  }
  for (std::thread& thread : threads) thread.join();
  expect_nothing_leaked(*engine);
}

TEST_F(EngineLifecycle, StreamsOutliveTheirEngine) {
  auto engine = make(manual());
  Stream stream = engine->submit(text_request(5, 1));
  engine.reset();
  EXPECT_EQ(collect(stream).finish, FinishReason::kCancelled);
  stream.cancel();
}

}  // namespace
}  // namespace fq::testing
