// framequilt-run MODEL PROMPT [options]: the smallest embedded application, and a smoke test of an
// installation. Reads a model directory, continues the prompt, prints text as it comes and a line
// of usage.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "framequilt/engine.h"
#include "framequilt/tokenizer.h"

namespace {

int usage() {
  std::fprintf(stderr,
               "usage: framequilt-run MODEL PROMPT [--max-tokens N] [--temperature T] [--seed N] "
               "[--kv kv8]\n"
               "                      [--memory-mib N] [--threads N] [--simd TARGET]\n"
               "PROMPT is raw text; special tokens such as <|im_start|> are recognised.\n");
  return 2;
}

int fail(const fq::Error& error) {
  std::fprintf(stderr, "framequilt-run: %s\n", error.to_string().c_str());
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3 || (argc - 3) % 2 != 0) return usage();
  fq::EngineOptions options;
  fq::Request request;
  for (int i = 3; i < argc; i += 2) {
    const std::string key = argv[i];
    const char* value = argv[i + 1];
    if (key == "--max-tokens") {
      request.sampling.max_tokens = std::atoi(value);
    } else if (key == "--temperature") {
      request.sampling.temperature = static_cast<float>(std::atof(value));
    } else if (key == "--seed") {
      request.sampling.seed = std::strtoull(value, nullptr, 10);
    } else if (key == "--kv") {
      options.kv = value;
    } else if (key == "--memory-mib") {
      options.memory_bytes = std::strtoull(value, nullptr, 10) << 20;
    } else if (key == "--threads") {
      options.threads = std::atoi(value);
    } else if (key == "--simd") {
      options.simd = value;
    } else {
      return usage();
    }
  }

  auto model = fq::Model::open(argv[1]);
  if (!model) return fail(model.error());
  auto tokenizer = fq::Tokenizer::open(argv[1]);
  if (!tokenizer) return fail(tokenizer.error());
  auto tokens = (*tokenizer)->encode(argv[2]);
  if (!tokens) return fail(tokens.error());
  auto engine = fq::Engine::create(*model, options);
  if (!engine) return fail(engine.error());

  request.prompt = *tokens;
  fq::Stream stream = (*engine)->submit(std::move(request));
  while (auto event = stream.next()) {
    std::fwrite(event->text.data(), 1, event->text.size(), stdout);
    std::fflush(stdout);
    if (event->finish == fq::FinishReason::kNone) continue;
    std::printf("\n");
    if (event->error) return fail(*event->error);
    const fq::Usage& u = *event->usage;
    std::fprintf(stderr,
                 "%d prompt tokens in %.0f ms, %d tokens in %.0f ms, %lld KiB of KV, finish: %s\n",
                 u.prompt_tokens, u.timings.prefill_ms, u.completion_tokens, u.timings.decode_ms,
                 static_cast<long long>(u.kv_bytes >> 10),
                 std::string(fq::finish_reason_name(event->finish)).c_str());
  }
  return 0;
}
