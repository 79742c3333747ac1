// Runs requests on a tiny random model and gathers what came out.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "framequilt/engine.h"
#include "tests/engine/testing/model_builder.h"
#include "tests/engine/testing/temp_dir.h"

namespace fq::testing {

struct Answer {
  std::vector<TokenId> tokens;
  std::vector<float> logits;  // of all generated tokens, when asked
  std::vector<float> prompt_logits;
  FinishReason finish = FinishReason::kNone;
  Usage usage;
  std::optional<Error> error;
};

inline void take(Answer* answer, Event event) {
  if (event.token >= 0) answer->tokens.push_back(event.token);
  answer->logits.insert(answer->logits.end(), event.logits.begin(), event.logits.end());
  if (event.finish == FinishReason::kNone) return;
  answer->finish = event.finish;
  if (event.usage) answer->usage = *event.usage;
  if (event.prompt_logits) answer->prompt_logits = *event.prompt_logits;
  answer->error = event.error;
}

inline Answer collect(Stream& stream) {
  Answer answer;
  while (auto event = stream.next()) take(&answer, std::move(*event));
  return answer;
}

class EngineTest : public ::testing::Test {
 protected:
  // A text and video model; tests that need another shape call open() with their own options.
  void SetUp() override {
    TinyModelOptions options;
    options.layers = 3;
    options.vision = true;
    options.vocab = 80;
    options.context = 2048;
    open(options);
  }

  void open(const TinyModelOptions& options) {
    directory_ = std::make_unique<TempDir>();
    write_tiny_model(*directory_ / "model", options);
    auto model = Model::open(*directory_ / "model");
    ASSERT_TRUE(model) << model.error().to_string();
    model_ = *model;
    tiny_ = options;
  }

  static EngineOptions manual() {
    EngineOptions options;
    options.manual_step = true;
    options.text = false;
    options.memory_bytes = 64 << 20;
    options.threads = 1;
    options.kv = "kv8";
    return options;
  }

  std::unique_ptr<Engine> make(const EngineOptions& options) {
    auto engine = Engine::create(model_, options);
    EXPECT_TRUE(engine) << engine.error().to_string();
    return engine ? std::move(*engine) : nullptr;
  }

  Request text_request(int length, uint32_t seed, int max_tokens = 8) const {
    std::mt19937 rng(seed);
    Request request;
    for (int i = 0; i < length; ++i)
      request.prompt.push_back(static_cast<TokenId>(rng() % tiny_.vocab));
    request.sampling.temperature = 0;
    request.sampling.ignore_eos = true;
    request.sampling.max_tokens = max_tokens;
    request.return_logits = true;
    return request;
  }

  // Frames that drift slowly, so that some tokens merge and some do not.
  Media video(int frames, uint32_t seed) const {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    Media media;
    media.kind = MediaKind::kVideo;
    media.frames = frames;
    media.height = media.width = tiny_.image_size;
    const size_t frame = static_cast<size_t>(3 * tiny_.image_size * tiny_.image_size);
    std::vector<float> image(frame);
    for (float& v : image) v = normal(rng);
    for (int f = 0; f < frames; ++f) {
      for (size_t i = 0; i < frame; ++i) {
        if (rng() % 4 == 0) image[i] = normal(rng);
      }
      media.data.insert(media.data.end(), image.begin(), image.end());
    }
    return media;
  }

  Request video_request(int frames, uint32_t seed, bool reduce, int max_tokens = 6) const {
    Request request = text_request(9, seed, max_tokens);
    request.prompt.insert(request.prompt.begin() + 3, kMediaToken);
    request.media.push_back(video(frames, seed));
    if (reduce) request.reduction.framefusion = FrameFusionOptions{.cost = 0.4};
    return request;
  }

  static Answer run(Engine& engine, Request request) {
    Stream stream = engine.submit(std::move(request));
    return collect(stream);
  }

  static void expect_same(const Answer& a, const Answer& b) {
    EXPECT_EQ(a.tokens, b.tokens);
    EXPECT_EQ(a.logits, b.logits);  // bitwise: the contract promises it
    EXPECT_EQ(a.finish, b.finish);
    EXPECT_EQ(a.usage.kept_per_layer, b.usage.kept_per_layer);
  }

  static void expect_nothing_leaked(Engine& engine) {
    const Status status = engine.check_integrity();
    EXPECT_TRUE(status) << status.error().to_string();
    EXPECT_EQ(engine.stats().pages_free, engine.stats().pages_total);
  }

  TinyModelOptions tiny_;
  std::unique_ptr<TempDir> directory_;
  std::shared_ptr<const Model> model_;
};

}  // namespace fq::testing
