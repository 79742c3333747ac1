// Times the engine as its users drive it: opens a model directory, submits random token prompts,
// random frames or ready-made visual rows, and prints one JSON object. One thread drives the engine
// step by step, so that a sample begins and ends between steps. One mode times a stage of the
// engine that cannot be told apart from outside. How to run and read it: tests/bench/README.md.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "framequilt/engine.h"
#include "src/backend/backend.h"
#include "src/blocks/vision.h"
#include "src/core/thread_pool.h"
#include "src/model/directory.h"
#include "src/model/slots.h"

namespace fq {
namespace {

constexpr int kSkipped = 3;  // exit status: this build cannot do what was asked
constexpr int kPageTokens = 64;

struct Options {
  std::string model;
  std::string mode;  // prefill | decode | vision | projector | rows | load
  EngineOptions engine;
  std::string activations;
  int tokens = 64;       // generated and timed (decode, vision, rows)
  int prompt = 512;      // text tokens of the prompt
  int batch = 1;         // sequences (decode)
  int frames = 1;        // frames (vision, projector: of one call), frames of rows (rows)
  int frame_rows = 210;  // rows of one frame (rows)
  double cost = 1.0;     // below 1: with token reduction (vision, rows)
  double motion = 0.5;   // share of the rows of a frame that differ from the frame before (rows)
  double bound = 0.6;    // similarity from which rows merge
  int warm_up = 1;       // 0: only a short request before a prompt or frame, for CPU times
};

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Resident memory in bytes; 0 where the system does not say.
double resident_bytes() {
  std::ifstream file("/proc/self/statm");
  double total = 0, resident = 0;
  file >> total >> resident;
  return resident * 4096.0;
}

// Options that some builds do not have yet are set where they are, and refused where not.
template <class T>
bool set_activations(T* options, const std::string& value) {
  if constexpr (requires { options->activations = value; }) {
    options->activations = value;
    return true;
  } else {
    return value.empty() || value == "a16";
  }
}

std::vector<TokenId> random_tokens(const model::ModelSpec& spec, int count, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<TokenId> token(3, spec.decoder.vocab - 1);
  std::vector<TokenId> tokens(static_cast<size_t>(count));
  for (TokenId& t : tokens) t = token(random);
  return tokens;
}

// Normal values, repeated from a short table: making millions of them would take longer than using
// them.
std::vector<float> random_values(size_t count, float deviation, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> table(65521);
  for (float& value : table) value = normal(random);
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = table[i % table.size()];
  return values;
}

Request text_request(const model::ModelSpec& spec, int prompt, int tokens, unsigned seed) {
  Request request;
  request.prompt = random_tokens(spec, prompt, seed);
  request.sampling.max_tokens = tokens;
  request.sampling.temperature = 0.0f;
  request.sampling.ignore_eos = true;
  return request;
}

Media random_frames(const model::ModelSpec& spec, int frames) {
  const model::VisionSpec& vision = *spec.vision;
  Media media;
  media.kind = MediaKind::kVideo;
  media.frames = frames;
  media.height = media.width = vision.image_size;
  const size_t frame = static_cast<size_t>(vision.channels) * vision.image_size * vision.image_size;
  media.data = random_values(frame * static_cast<size_t>(frames), 0.5f, 5);
  return media;
}

void reduce(const Options& options, Request* request) {
  if (options.cost >= 1.0) return;
  request->reduction.framefusion =
      FrameFusionOptions{.cost = options.cost, .similarity_lower_bound = options.bound};
}

// Bytes of weights that one decode step reads: everything of the decoder, of the embedding only one
// row unless it is the head too.
double step_weight_bytes(const model::ModelDirectory& directory) {
  double bytes = 0;
  for (const auto& [name, tensor] : directory.tensors()) {
    if (!name.starts_with("decoder.")) continue;
    if (name.starts_with("decoder.embedding.") && !directory.spec().decoder.tied_embedding)
      continue;
    bytes += static_cast<double>(tensor.bytes.size());
  }
  return bytes;
}

int fail(const Error& error) {
  std::fprintf(stderr, "bench_engine: %s\n", error.to_string().c_str());
  // What a build cannot do is a row without a number, not a broken benchmark.
  return error.code == Code::kUnsupported || error.code == Code::kInvalidArgument ? kSkipped : 1;
}

class Bench {
 public:
  Bench(const Options& options, std::shared_ptr<const Model> model, std::unique_ptr<Engine> engine)
      : options_(options),
        model_(std::move(model)),
        spec_(model_->directory().spec()),
        engine_(std::move(engine)) {}

  int run() {
    if (options_.mode == "prefill") return prefill();
    if (options_.mode == "decode") return decode();
    return media();
  }

 private:
  // Takes what has arrived, without driving the engine. False after an error.
  bool poll(Stream& stream, int* count) {
    while (auto event = stream.next_for(0)) {
      if (event->error) {
        error_ = *event->error;
        return false;
      }
      if (event->token >= 0) ++*count;
      if (event->usage) usage_ = event->usage;
    }
    return true;
  }

  // Drives the engine until the stream has `wanted` tokens.
  bool until(Stream& stream, int wanted, int* count) {
    while (*count < wanted) {
      const bool more = engine_->step();
      if (!poll(stream, count)) return false;
      if (!more && *count < wanted) {
        error_ = {Code::kInternal, "the engine ended early", ""};
        return false;
      }
    }
    return true;
  }

  // A short request first: pages are touched, threads awake. Then, as the peers do it, the prompt's
  // length or a frame once: memory that is taken on the way is there.
  bool warm_up() {
    Stream stream = engine_->submit(text_request(spec_, 32, 4, 1));
    int count = 0;
    if (!until(stream, 4, &count)) return false;
    const bool frame = options_.mode == "vision";
    if (options_.warm_up == 0 || !(frame || options_.mode == "prefill")) return true;
    Request request = text_request(spec_, frame ? 8 : options_.prompt, 1, 3);
    if (frame) {
      request.prompt.push_back(kMediaToken);
      request.media.push_back(random_frames(spec_, 1));
    }
    Stream whole = engine_->submit(std::move(request));
    count = 0;
    return until(whole, 1, &count);
  }

  void print(double value, const char* unit, double wall, double bytes) {
    const MemoryPlan plan = engine_->plan();
    std::printf(
        "{\"value\": %.6g, \"unit\": \"%s\", \"seconds\": %.6g, \"bytes_per_step\": %.6g, "
        "\"resident_bytes\": %.6g, \"weight_bytes\": %.6g, \"page_bytes\": %.6g",
        value, unit, wall, bytes, resident_bytes(), static_cast<double>(plan.weight_bytes),
        static_cast<double>(plan.page_bytes));
    for (const auto& [name, number] : extra_) std::printf(", \"%s\": %.6g", name.c_str(), number);
    std::string kernels = engine_->describe_kernels();
    for (char& c : kernels) {
      if (c == '\n' || c == '"' || c == '\\') c = ' ';
    }
    std::printf(", \"kernels\": \"%s\"}\n", kernels.c_str());
  }

  int prefill() {
    if (!warm_up()) return fail(error_);
    const double start = seconds();
    Stream stream = engine_->submit(text_request(spec_, options_.prompt, 1, 2));
    int count = 0;
    if (!until(stream, 1, &count)) return fail(error_);
    const double wall = seconds() - start;
    print(options_.prompt / wall, "tok/s", wall, 0);
    return 0;
  }

  int decode() {
    if (!warm_up()) return fail(error_);
    // Sequences start a few steps apart: the last one's first token begins the sample, and none may
    // end in it.
    const int spare = 8 + options_.batch * (1 + options_.prompt / options_.engine.chunk_rows);
    std::vector<Stream> streams;
    std::vector<int> counts(static_cast<size_t>(options_.batch), 0);
    for (int i = 0; i < options_.batch; ++i) {
      streams.push_back(engine_->submit(text_request(
          spec_, options_.prompt, options_.tokens + spare, static_cast<unsigned>(10 + i))));
    }
    const auto step = [&] {
      engine_->step();
      for (size_t i = 0; i < streams.size(); ++i) {
        if (!poll(streams[i], &counts[i])) return false;
      }
      return true;
    };
    while (std::any_of(counts.begin(), counts.end(), [](int count) { return count == 0; })) {
      if (!step()) return fail(error_);
    }
    const auto total = [&] {
      int sum = 0;
      for (int count : counts) sum += count;
      return sum;
    };
    const int before = total();
    const double start = seconds();
    for (int i = 0; i < options_.tokens; ++i) {
      if (!step()) return fail(error_);
    }
    const double wall = seconds() - start;
    const int made = total() - before;
    if (made != options_.batch * options_.tokens) {
      return fail({Code::kInternal, "not every step made a token of every sequence", ""});
    }
    const double context = options_.prompt + 0.5 * options_.tokens;
    const double kv_bytes = options_.batch * spec_.decoder.layers * context / kPageTokens *
                            static_cast<double>(engine_->plan().page_bytes);
    extra_.emplace_back("kv_bytes_per_step", kv_bytes);
    extra_.emplace_back("batch", options_.batch);
    print(made / wall, "tok/s", wall, step_weight_bytes(model_->directory()) + kv_bytes);
    return 0;
  }

  // Rows that live in the decoder's input space, as a tower would deliver them: some patches stay
  // as they were in the frame before, up to noise, the others are new.
  Media visual_rows() const {
    const int hidden = spec_.decoder.hidden, rows = options_.frames * options_.frame_rows;
    const size_t width = static_cast<size_t>(hidden);
    Media media;
    media.kind = MediaKind::kEmbedding;
    media.rows = rows;
    media.data = random_values(static_cast<size_t>(rows) * width, 1.0f, 3);
    std::mt19937 random(4);
    std::uniform_real_distribution<double> uniform(0, 1);
    for (int row = 0; row < rows; ++row) {
      media.slots.push_back(row % options_.frame_rows);
      if (row < options_.frame_rows || uniform(random) < options_.motion) continue;
      float* here = media.data.data() + static_cast<size_t>(row) * width;
      const float* before = here - static_cast<size_t>(options_.frame_rows) * width;
      for (size_t i = 0; i < width; ++i) here[i] = 0.97f * before[i] + 0.24f * here[i];
    }
    return media;
  }

  int media() {
    if (options_.mode == "vision" && !spec_.vision) {
      return fail({Code::kInvalidArgument, "the model has no vision tower", ""});
    }
    if (!warm_up()) return fail(error_);
    Request request = text_request(spec_, options_.prompt, options_.tokens, 6);
    request.prompt.insert(request.prompt.begin() + options_.prompt / 2, kMediaToken);
    request.media.push_back(options_.mode == "vision" ? random_frames(spec_, options_.frames)
                                                      : visual_rows());
    reduce(options_, &request);
    const double start = seconds();
    Stream stream = engine_->submit(std::move(request));
    int count = 0;
    if (!until(stream, 1, &count)) return fail(error_);
    const double first = seconds();
    if (!until(stream, options_.tokens, &count)) return fail(error_);
    const double end = seconds();
    const Timings& t = usage_->timings;
    extra_.emplace_back("vision_s", 1e-3 * t.vision_ms);
    extra_.emplace_back("prefill_s", 1e-3 * t.prefill_ms);
    extra_.emplace_back("decode_s", end - first);
    extra_.emplace_back("reduction_s", 1e-3 * t.reduction_ms);
    extra_.emplace_back("prompt_rows", usage_->prompt_tokens);
    extra_.emplace_back("visual_rows", usage_->visual_tokens);
    extra_.emplace_back("kept_share", usage_->reduction.mean_kept_share);
    extra_.emplace_back("calls", static_cast<double>(usage_->reduction.calls.size()));
    const double value =
        options_.mode == "vision" ? 1e-3 * t.vision_ms / options_.frames : first - start;
    print(value, options_.mode == "vision" ? "s/frame" : "s", end - start, 0);
    return 0;
  }

  const Options& options_;
  std::shared_ptr<const Model> model_;
  const model::ModelSpec& spec_;
  std::unique_ptr<Engine> engine_;
  std::shared_ptr<const Usage> usage_;
  Error error_;
  std::vector<std::pair<std::string, double>> extra_;
};

// What follows the tower: projector, pooling and newlines of `frames` frames at a time, as the
// engine calls them. In the engine this is a small part of the time of a stage that the tower
// dominates, so that it cannot be had as a difference.
int projector(const Options& options, const Model& model) {
  constexpr double kSeconds = 0.5;
  constexpr int kCalls = 5;
  const model::ModelDirectory& directory = model.directory();
  if (!directory.spec().vision) {
    return fail({Code::kInvalidArgument, "the model has no vision tower", ""});
  }
  auto backend = backend::make_cpu_backend(options.engine.simd);
  if (!backend) return fail(backend.error());
  ThreadPool pool(options.engine.threads);
  std::optional<model::ActivationChoice> activations;
  if (!options.activations.empty()) {
    activations = model::parse_activation_choice(options.activations);
    if (!activations) {
      return fail(
          {Code::kInvalidArgument, "no activation format '" + options.activations + "'", ""});
    }
  }
  auto bound = blocks::Vision::bind({directory, **backend, pool, activations, false});
  if (!bound) return fail(bound.error());
  const blocks::Vision& vision = **bound;
  const Media media = random_frames(directory.spec(), options.frames);
  const auto layout = vision.layout(media, true);
  if (!layout) return fail(layout.error());
  const auto rows = static_cast<size_t>(options.frames) * static_cast<size_t>(vision.patches());
  const auto width = static_cast<size_t>(vision.output_width());
  std::vector<float> x(rows * static_cast<size_t>(vision.spec().hidden)), projected(rows * width);
  std::vector<float> out(static_cast<size_t>(layout->rows) * width);
  std::vector<float> scratch(static_cast<size_t>(vision.scratch_floats(options.frames)));
  vision.embed(media.data.data(), options.frames, x.data(), scratch.data(), pool);
  const auto call = [&] {
    vision.project(x.data(), options.frames, projected.data(), scratch.data(), pool);
    const double done = seconds();
    vision.arrange_video(media, 0, options.frames, projected.data(), out.data());
    return seconds() - done;
  };
  call();  // pages are touched, threads awake
  int calls = 0;
  double arranged = 0, wall = 0;
  for (const double start = seconds(); calls < kCalls || wall < kSeconds;
       wall = seconds() - start) {
    arranged += call();
    ++calls;
  }
  const double value = wall / (static_cast<double>(calls) * options.frames);
  std::printf(
      "{\"value\": %.6g, \"unit\": \"s/frame\", \"seconds\": %.6g, \"calls\": %d, "
      "\"arrange_share\": %.6g, \"visual_rows\": %d}\n",
      value, wall, calls, arranged / wall, static_cast<int>(layout->rows));
  return 0;
}

int run(Options& options) {
  if (!set_activations(&options.engine, options.activations)) {
    return fail({Code::kUnsupported, "this engine has no option for activations",
                 "only a16 can be measured"});
  }
  const double start = seconds();
  auto model = Model::open(options.model);
  if (!model) return fail(model.error());
  if (options.mode == "projector") return projector(options, **model);
  options.engine.manual_step = true;
  options.engine.text = false;
  auto engine = Engine::create(*model, options.engine);
  if (!engine) return fail(engine.error());
  if (options.mode == "load") {
    const double wall = seconds() - start;
    std::printf(
        "{\"value\": %.6g, \"unit\": \"s\", \"seconds\": %.6g, \"resident_bytes\": %.6g, "
        "\"weight_bytes\": %.6g}\n",
        wall, wall, resident_bytes(), static_cast<double>((*engine)->plan().weight_bytes));
    return 0;
  }
  return Bench(options, *model, std::move(*engine)).run();
}

int usage() {
  std::fprintf(
      stderr,
      "usage: bench_engine MODEL prefill|decode|vision|projector|rows|load [--prompt N]\n"
      "       [--tokens N] [--batch N] [--frames N] [--frame-rows N] [--cost C] [--motion M] "
      "[--bound S]\n"
      "       [--kv kv8] [--activations a16] [--threads N] [--chunk-rows N] [--memory-mib N]\n"
      "       [--simd TARGET] [--warm-up 0]\n");
  return 2;
}

}  // namespace
}  // namespace fq

int main(int argc, char** argv) {
  if (argc < 3 || argc % 2 == 0) return fq::usage();
  fq::Options options;
  options.model = argv[1];
  options.mode = argv[2];
  options.engine.memory_bytes = uint64_t{2} << 30;
  const std::string_view modes[] = {"prefill", "decode", "vision", "projector", "rows", "load"};
  if (std::find(std::begin(modes), std::end(modes), options.mode) == std::end(modes)) {
    return fq::usage();
  }
  for (int i = 3; i < argc; i += 2) {
    const std::string_view flag = argv[i];
    const char* value = argv[i + 1];
    const std::pair<std::string_view, int*> integers[] = {
        {"--prompt", &options.prompt},
        {"--tokens", &options.tokens},
        {"--batch", &options.batch},
        {"--frames", &options.frames},
        {"--frame-rows", &options.frame_rows},
        {"--threads", &options.engine.threads},
        {"--chunk-rows", &options.engine.chunk_rows},
        {"--warm-up", &options.warm_up}};
    const std::pair<std::string_view, double*> numbers[] = {
        {"--cost", &options.cost}, {"--motion", &options.motion}, {"--bound", &options.bound}};
    const std::pair<std::string_view, std::string*> texts[] = {
        {"--kv", &options.engine.kv},
        {"--simd", &options.engine.simd},
        {"--activations", &options.activations}};
    bool known = flag == "--memory-mib";
    if (known) options.engine.memory_bytes = std::strtoull(value, nullptr, 10) << 20;
    for (const auto& [name, target] : integers) {
      if (name == flag) *target = std::atoi(value), known = true;
    }
    for (const auto& [name, target] : numbers) {
      if (name == flag) *target = std::atof(value), known = true;
    }
    for (const auto& [name, target] : texts) {
      if (name == flag) *target = value, known = true;
    }
    if (!known) return fq::usage();
  }
  return fq::run(options);
}
