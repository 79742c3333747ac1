// The C++ example of the README, compiled and run as it stands there.
#include "tests/engine/runtime/engine_fixture.h"

namespace fq::testing {
namespace {

// Two tokens over the bytes "a" and "b" would do; the model needs 80.
std::string byte_tokenizer(int vocab) {
  nlohmann::json entries = nlohmann::json::object();
  for (int i = 0; i < vocab; ++i) entries[std::string(1, static_cast<char>('!' + i))] = i;
  return nlohmann::json{
      {"version", "1.0"},
      {"added_tokens", nlohmann::json::array()},
      {"normalizer", nullptr},
      {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}},
      {"post_processor", nullptr},
      {"decoder", {{"type", "ByteLevel"}}},
      {"model", {{"type", "BPE"}, {"vocab", entries}, {"merges", nlohmann::json::array()}}}}
      .dump();
}

TEST_F(EngineTest, TheReadmeExampleStreamsTextAndUsage) {
  TinyModelOptions options;
  options.vocab = 80;
  options.vision = true;
  options.tokenizer = byte_tokenizer(80);
  open(options);
  const std::string path = (*directory_ / "model").string();
  const std::vector<TokenId> tokens = {1, kMediaToken, 7, 8};
  const std::vector<Media> frames = {video(4, 1)};

  auto model = fq::Model::open(path);
  ASSERT_TRUE(model);
  auto engine = fq::Engine::create(*model, {.kv = "kv8", .memory_bytes = 2ull << 30});
  ASSERT_TRUE(engine) << engine.error().to_string();
  fq::Stream stream =
      (*engine)->submit({.prompt = tokens, .media = frames, .sampling = {.max_tokens = 64}});
  std::string text;
  int events = 0;
  std::shared_ptr<const Usage> usage;
  while (auto event = stream.next()) {
    text += event->text;
    ++events;
    if (event->finish != FinishReason::kNone) usage = event->usage;
  }
  ASSERT_TRUE(usage);
  EXPECT_GE(events, usage->completion_tokens);
  // Every token is one character; an end-of-sequence token shows none.
  EXPECT_GE(static_cast<int>(text.size()), usage->completion_tokens - 1);
  EXPECT_EQ(usage->visual_tokens, 4 * 2 * 3);
}

TEST_F(EngineTest, StopStringsEndTheTextBeforeTheMatch) {
  TinyModelOptions options;
  options.vocab = 80;
  options.tokenizer = byte_tokenizer(80);
  open(options);
  EngineOptions with_text = manual();
  with_text.text = true;
  auto engine = make(with_text);
  const auto text_of = [&](const Request& request, FinishReason* finish) {
    Stream stream = engine->submit(request);
    std::string text;
    while (auto event = stream.next()) {
      text += event->text;
      *finish = event->finish;
    }
    return text;
  };
  Request request = text_request(10, 3, 40);
  FinishReason finish = FinishReason::kNone;
  const std::string whole = text_of(request, &finish);
  ASSERT_EQ(whole.size(), 40u);
  const std::string stop = whole.substr(17, 3);
  request.sampling.stop_strings = {stop};
  EXPECT_EQ(text_of(request, &finish), whole.substr(0, whole.find(stop)));
  EXPECT_EQ(finish, FinishReason::kStop);
}

}  // namespace
}  // namespace fq::testing
