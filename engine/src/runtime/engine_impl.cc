#include "src/runtime/engine_impl.h"

#include <algorithm>
#include <future>
#include <new>
#include <numeric>

#include "src/model/directory.h"

namespace fq {
namespace {

std::string mib(uint64_t bytes) { return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB"; }

Error invalid(std::string message, std::string hint = "") {
  return Error{Code::kInvalidArgument, std::move(message), std::move(hint)};
}

Status check_options(const EngineOptions& o) {
  const auto range = [](const char* name, int64_t value, int64_t low, int64_t high) -> Status {
    if (value >= low && value <= high) return {};
    return invalid(std::string(name) + " is " + std::to_string(value) + ", expected " +
                   std::to_string(low) + ".." + std::to_string(high));
  };
  FQ_RETURN_IF_ERROR(range("threads", o.threads, 0, 1024));
  FQ_RETURN_IF_ERROR(range("chunk_rows", o.chunk_rows, 1, 1 << 16));
  FQ_RETURN_IF_ERROR(range("max_sequences", o.max_sequences, 1, 4096));
  FQ_RETURN_IF_ERROR(range("max_context", o.max_context, 0, 1 << 24));
  return {};
}

// How inputs are quantized if not as the model says.
Result<std::optional<model::ActivationChoice>> read_activations(const std::string& asked,
                                                                const model::ModelSpec& spec) {
  if (asked.empty()) return std::optional<model::ActivationChoice>();
  auto choice = model::parse_activation_choice(asked);
  if (!choice) {
    return invalid(
        "no activation format '" + asked + "'",
        "known: a16 (float32), abf16, a8, a6, a4, a8-asym, a6-asym, a4-asym; behind it the head's "
        "and that of the vision tower's attention, as a8,head=a8,attention=a8; leave it empty for "
        "what the model says");
  }
  const std::string head = spec.decoder.tied_embedding ? "decoder.embedding" : "decoder.head";
  const model::WeightFormat& weights = spec.linears.at(head).format;
  if (!choice->head.fits(weights)) {
    return invalid(head + " has " + weights.name() + " weights, which take no " +
                       choice->head.name() + " inputs",
                   "leave the head out");
  }
  if (choice->attention.quantized() && !spec.vision) {
    return invalid(
        "the model has no vision tower whose attention could be " + choice->attention.name(),
        "leave attention= out");
  }
  return choice;
}

}  // namespace

Result<std::shared_ptr<Engine::Impl>> Engine::Impl::create(std::shared_ptr<const Model> model,
                                                           const EngineOptions& options) {
  if (!model) return invalid("no model given", "open one with fq::Model::open");
  FQ_RETURN_IF_ERROR(check_options(options));
  const model::ModelDirectory& directory = model->directory();
  const model::ModelSpec& spec = directory.spec();

  auto impl = std::shared_ptr<Impl>(new Impl());
  impl->options_ = options;
  impl->model_ = std::move(model);
  impl->max_context_ = options.max_context > 0 ? std::min(options.max_context, spec.decoder.context)
                                               : spec.decoder.context;
  if (options.text) {
    FQ_ASSIGN_OR_RETURN(impl->tokenizer_, Tokenizer::open(directory.path()));
  }
  FQ_ASSIGN_OR_RETURN(impl->backend_, backend::make_cpu_backend(options.simd));
  impl->threads_ = std::make_unique<ThreadPool>(options.threads);
  FQ_ASSIGN_OR_RETURN(auto kv,
                      quant::parse_kv_format(options.kv.empty() ? spec.defaults.kv : options.kv));
  FQ_ASSIGN_OR_RETURN(const auto activations, read_activations(options.activations, spec));
  if (options.numerics != "int" && options.numerics != "exact") {
    return invalid("no numerics '" + options.numerics + "'", "known: int, exact");
  }
  const blocks::Binder binder{directory, *impl->backend_, *impl->threads_, activations,
                              options.numerics == "exact"};
  FQ_ASSIGN_OR_RETURN(impl->decoder_, blocks::Decoder::bind(binder, kv));
  if (spec.vision) {
    FQ_ASSIGN_OR_RETURN(impl->vision_, blocks::Vision::bind(binder));
  }

  MemoryPlan& plan = impl->plan_;
  const int layers = spec.decoder.layers;
  plan.weight_bytes = directory.weight_bytes();
  plan.workspace_bytes = runtime::Executor::workspace_bytes(
      *impl->decoder_, impl->vision_.get(), options.chunk_rows, options.max_sequences);
  std::vector<size_t> page_bytes;
  page_bytes.reserve(static_cast<size_t>(layers));
  for (int l = 0; l < layers; ++l) page_bytes.push_back(impl->decoder_->kv_layout(l).page_bytes);
  plan.page_bytes = page_bytes[page_bytes.size() / 2];
  const uint64_t least =
      std::accumulate(page_bytes.begin(), page_bytes.end(), plan.workspace_bytes);
  if (options.memory_bytes < least) {
    return invalid("memory_bytes is " + mib(options.memory_bytes) +
                       ", the workspace and one page for each of " + std::to_string(layers) +
                       " layers need " + mib(least),
                   "give more memory, or lower chunk_rows or max_sequences");
  }
  // No more than every sequence at full context could ever use: page ids stay small and plans
  // honest.
  impl->pool_plan_ =
      kv::LayerPools::plan(page_bytes, options.memory_bytes - plan.workspace_bytes,
                           options.max_sequences * runtime::Scheduler::page_bound(
                                                       impl->max_context_, 1, quant::kPageTokens));
  plan.pages = impl->pool_plan_.total_pages();
  plan.kv_bytes = impl->pool_plan_.total_bytes();
  plan.tokens = impl->pool_plan_.pages_per_layer() * quant::kPageTokens;

  FQ_ASSIGN_OR_RETURN(impl->pools_,
                      kv::LayerPools::create(impl->pool_plan_, options.page_shuffle_seed));
  impl->scheduler_ = std::make_unique<runtime::Scheduler>(
      impl->pools_.get(), quant::kPageTokens, options.chunk_rows, options.max_sequences);
  try {
    impl->executor_ = std::make_unique<runtime::Executor>(
        *impl->decoder_, impl->vision_.get(), *impl->backend_, *impl->threads_, options.chunk_rows,
        options.max_sequences);
  } catch (const std::bad_alloc&) {
    return Error{Code::kOutOfMemory, "no memory for a workspace of " + mib(plan.workspace_bytes),
                 "lower chunk_rows or max_sequences"};
  }
  impl->batch_.reserve(static_cast<size_t>(options.max_sequences));
  impl->publish_stats();
  return impl;
}

// ---------------------------------------------------------------------------------------------------------------
// Submission, on the caller's thread

Status Engine::Impl::check_request(const Request& request) const {
  const model::DecoderSpec& decoder = decoder_->spec();
  FQ_RETURN_IF_ERROR(runtime::validate_sampling(request.sampling, decoder.vocab));
  if (!tokenizer_ && !request.sampling.stop_strings.empty()) {
    return invalid("stop strings need text, and this engine was created without",
                   "use stop_tokens");
  }
  if (request.return_prompt_logits && request.reduction.framefusion) {
    return invalid("prompt logits were asked for together with token reduction",
                   "dropped rows have no logits: turn one of them off");
  }
  return {};
}

Result<std::unique_ptr<runtime::Sequence>> Engine::Impl::prepare(
    Request request, std::shared_ptr<Stream::Impl> stream) const {
  FQ_RETURN_IF_ERROR(check_request(request));
  auto sequence = std::make_unique<runtime::Sequence>();
  sequence->stream = std::move(stream);
  FQ_ASSIGN_OR_RETURN(sequence->prompt, runtime::lay_out_prompt(request, model_->directory().spec(),
                                                                vision_.get(), max_context_));
  const int64_t rows = sequence->prompt.rows();
  if (request.reduction.framefusion) {
    // Options are refused here, not after minutes of vision work.
    FQ_ASSIGN_OR_RETURN(auto stage, reduction::make_stage(request.reduction,
                                                          {.slots = sequence->prompt.slots,
                                                           .period = sequence->prompt.period,
                                                           .layers = decoder_->spec().layers},
                                                          *backend_));
  }
  sequence->max_tokens =
      static_cast<int>(std::min<int64_t>(request.sampling.max_tokens, max_context_ - rows));
  const int64_t pages =
      runtime::Scheduler::page_bound(rows, sequence->max_tokens, quant::kPageTokens);
  if (pages > pool_plan_.pages_per_layer()) {
    const int layers = decoder_->spec().layers;
    return Error{Code::kOutOfPages,
                 "the request may need " + std::to_string(pages * layers) +
                     " KV pages, the pool has " + std::to_string(plan_.pages),
                 "give the engine more memory (" +
                     mib(static_cast<uint64_t>(pages) * pool_plan_.bytes_per_layer_page()) +
                     " of KV), a smaller KV format, fewer frames or a lower max_tokens"};
  }
  std::vector<TokenId> text_prompt;  // media placeholders are no tokens to penalise
  for (TokenId token : request.prompt) {
    if (token != kMediaToken) text_prompt.push_back(token);
  }
  sequence->sampler.emplace(request.sampling, decoder_->spec().vocab, text_prompt,
                            model_->directory().spec().tokens.eos);
  sequence->stop.emplace(request.sampling.stop_strings);
  sequence->usage.prompt_tokens = static_cast<int>(rows);
  sequence->usage.visual_tokens = static_cast<int>(sequence->prompt.media_rows);
  sequence->request = std::move(request);
  return sequence;
}

Stream Engine::Impl::submit(Request request) {
  uint64_t id = 0;
  bool closed = false;
  {
    std::lock_guard lock(mutex_);
    id = next_id_++;
    closed = closing_;
  }
  auto state = std::make_shared<Stream::Impl>(id);
  state->engine = weak_from_this();
  const auto refuse = [&](Error error) {
    Event event;
    event.finish = FinishReason::kError;
    event.error = std::move(error);
    event.usage = std::make_shared<Usage>();
    state->push(std::move(event));
    return Stream(state);
  };
  const Error closed_error{Code::kClosed, "the engine is closed", "create a new engine"};
  if (closed) return refuse(closed_error);
  try {
    auto sequence = prepare(std::move(request), state);
    if (!sequence) return refuse(sequence.error());
    std::lock_guard lock(mutex_);
    if (closing_) return refuse(closed_error);
    std::erase_if(live_, [](const auto& weak) { return weak.expired(); });
    live_.push_back(state);
    inbox_.push_back(std::move(*sequence));
  } catch (const std::bad_alloc&) {
    return refuse(
        Error{Code::kOutOfMemory, "no memory to lay out the request", "use fewer frames"});
  }
  changed_.notify_all();
  return Stream(state);
}

// ---------------------------------------------------------------------------------------------------------------
// Engine thread

void Engine::Impl::start_thread() {
  thread_ = std::thread([this] { thread_main(); });
}

void Engine::Impl::wake() { changed_.notify_all(); }

void Engine::Impl::thread_main() {
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] {
        return closing_ || !inbox_.empty() || !commands_.empty() || !scheduler_->empty();
      });
      if (closing_) return;
    }
    step();
  }
}

bool Engine::Impl::step() {
  std::lock_guard step_lock(step_mutex_);
  drain_inbox();
  cancel_flagged();
  scheduler_->retire();
  scheduler_->admit();
  if (runtime::Sequence* sequence = scheduler_->unit_of_work()) run_unit(*sequence);
  run_batch();
  scheduler_->retire();
  publish_stats();
  std::lock_guard lock(mutex_);
  ++stats_.steps;
  return !scheduler_->empty() || !inbox_.empty();
}

void Engine::Impl::drain_inbox() {
  std::vector<std::unique_ptr<runtime::Sequence>> arrived;
  std::vector<std::function<void()>> commands;
  {
    std::lock_guard lock(mutex_);
    arrived.swap(inbox_);
    commands.swap(commands_);
  }
  for (auto& sequence : arrived) scheduler_->enqueue(std::move(sequence));
  for (auto& command : commands) command();
}

void Engine::Impl::cancel_flagged() {
  scheduler_->for_each([this](runtime::Sequence& s) {
    if (s.phase != runtime::Phase::kDone && s.cancelled()) finish(s, FinishReason::kCancelled, {});
  });
}

void Engine::Impl::run_unit(runtime::Sequence& sequence) {
  const auto sample = [this](runtime::Sequence& s, std::span<float> logits) {
    on_logits(s, logits);
  };
  try {
    if (sequence.phase == runtime::Phase::kVision) {
      if (executor_->vision_unit(sequence)) {
        sequence.phase = sequence.reduced() ? runtime::Phase::kLayerMajor : runtime::Phase::kChunks;
      }
      return;
    }
    auto done = executor_->layer_unit(sequence, sample);
    if (!done) {
      fail(sequence, done.error());
    } else if (*done && sequence.phase != runtime::Phase::kDone) {
      scheduler_->return_surplus(sequence);
    }
  } catch (const std::bad_alloc&) {
    fail(sequence,
         {Code::kOutOfMemory, "no memory for the rows of the request", "use fewer frames"});
  }
}

void Engine::Impl::run_batch() {
  scheduler_->compose(&batch_);
  if (batch_.empty()) return;
  const auto sample = [this](runtime::Sequence& s, std::span<float> logits) {
    on_logits(s, logits);
  };
  try {
    executor_->token_pass(batch_, sample);
  } catch (const std::bad_alloc&) {
    for (runtime::BatchItem& item : batch_) {
      if (item.sequence->phase != runtime::Phase::kDone) {
        fail(*item.sequence,
             {Code::kOutOfMemory, "no memory while running", "use a smaller batch"});
      }
    }
  }
}

void Engine::Impl::on_logits(runtime::Sequence& sequence, std::span<float> logits) {
  const Sampling& sampling = sequence.request.sampling;
  if (sequence.phase != runtime::Phase::kDecode) {
    // Reduction reports what it kept; an unreduced prompt kept everything everywhere.
    if (sequence.usage.kept_per_layer.empty()) {
      const auto layers = decoder_->layers().size();
      sequence.usage.kept_per_layer.assign(layers, static_cast<int>(sequence.prompt.rows()));
      sequence.usage.visual_per_layer.assign(layers, static_cast<int>(sequence.prompt.media_rows));
      sequence.usage.reduction.stage = "none";
    }
    sequence.phase = runtime::Phase::kDecode;
  }
  Event event;
  if (sequence.request.return_logits) event.logits.assign(logits.begin(), logits.end());
  auto choice = sequence.sampler->pick(logits);
  if (!choice) return fail(sequence, choice.error());
  event.token = choice->token;
  if (sampling.top_logprobs >= 0) event.logprob = TokenLogprob{choice->token, choice->logprob};
  event.top_logprobs.assign(choice->top.begin(), choice->top.end());
  sequence.last_token = choice->token;
  ++sequence.generated;

  const bool end = sequence.sampler->stops(event.token);
  bool matched = false;
  if (tokenizer_ && !end) {
    matched = sequence.stop->push(tokenizer_->token_bytes(event.token), &event.text);
  }
  if (end || matched) return finish(sequence, FinishReason::kStop, std::move(event));
  if (sequence.generated >= sequence.max_tokens)
    return finish(sequence, FinishReason::kLength, std::move(event));
  sequence.stream->push(std::move(event));
}

void Engine::Impl::finish(runtime::Sequence& sequence, FinishReason reason, Event event,
                          std::optional<Error> error) {
  if (tokenizer_ && sequence.stop->flush(&event.text) && reason == FinishReason::kLength) {
    reason =
        FinishReason::kStop;  // the replacement of an unfinished character completed a stop string
  }
  auto usage = std::make_shared<Usage>(std::move(sequence.usage));
  usage->completion_tokens = sequence.generated;
  usage->timings.total_ms = runtime::ms_between(sequence.submitted, runtime::Clock::now());
  const int64_t unreduced = kv::PageTable::pages_for(
      sequence.prompt.rows() + std::max(0, sequence.generated - 1), quant::kPageTokens);
  usage->kv_bytes = usage->kv_bytes_unreduced = 0;
  for (size_t l = 0; l < sequence.tables.size(); ++l) {
    const auto bytes = static_cast<int64_t>(pools_->page_bytes(static_cast<int>(l)));
    usage->kv_bytes += static_cast<int64_t>(sequence.tables[l].ids().size()) * bytes;
    usage->kv_bytes_unreduced += unreduced * bytes;
  }

  // Pages go back before anybody can see that the request ended.
  scheduler_->release(sequence);
  sequence.phase = runtime::Phase::kDone;
  publish_stats();

  event.finish = reason;
  event.error = std::move(error);
  event.usage = std::move(usage);
  if (sequence.request.return_prompt_logits) {
    event.prompt_logits = std::make_shared<std::vector<float>>(std::move(sequence.prompt_logits));
  }
  sequence.stream->push(std::move(event));
}

void Engine::Impl::publish_stats() {
  int running = 0, waiting = 0;
  scheduler_->for_each([&](const runtime::Sequence& s) {
    running += s.phase != runtime::Phase::kDone && s.phase != runtime::Phase::kWaiting;
    waiting += s.phase == runtime::Phase::kWaiting;
  });
  std::lock_guard lock(mutex_);
  stats_.running = running;
  stats_.waiting = waiting;
  stats_.pages_total = pools_->total();
  stats_.pages_free = pools_->free_pages();
}

// ---------------------------------------------------------------------------------------------------------------
// Looking in, and the end

EngineStats Engine::Impl::stats() const {
  std::lock_guard lock(mutex_);
  return stats_;
}

void Engine::Impl::run_on_engine(const std::function<void()>& fn) {
  bool here = options_.manual_step;
  std::promise<void> done;
  {
    std::lock_guard lock(mutex_);
    here = here || closing_;
    if (!here) {
      commands_.push_back([&] {
        fn();
        done.set_value();
      });
    }
  }
  if (here) {
    std::lock_guard step_lock(step_mutex_);
    fn();
    return;
  }
  changed_.notify_all();
  done.get_future().wait();
}

Status Engine::Impl::check_integrity() {
  Status status;
  run_on_engine([&] { status = check_integrity_now(); });
  return status;
}

Status Engine::Impl::check_integrity_now() {
  std::vector<std::vector<kv::PageId>> ids(decoder_->layers().size());
  int64_t reserved = 0;
  Status broken;
  scheduler_->for_each([&](const runtime::Sequence& s) {
    reserved = std::accumulate(s.reserved.begin(), s.reserved.end(), reserved);
    for (size_t l = 0; l < s.tables.size(); ++l) {
      const kv::PageTable& table = s.tables[l];
      ids[l].insert(ids[l].end(), table.ids().begin(), table.ids().end());
      if (static_cast<int64_t>(table.ids().size()) !=
          kv::PageTable::pages_for(table.length(), quant::kPageTokens)) {
        broken = Error{Code::kInternal,
                       "a page table of length " + std::to_string(table.length()) + " has " +
                           std::to_string(table.ids().size()) + " pages",
                       ""};
      }
    }
  });
  if (!broken) return broken;
  if (reserved != pools_->reserved()) {
    return Error{Code::kInternal,
                 "sequences hold " + std::to_string(reserved) +
                     " promised pages, the pool promised " + std::to_string(pools_->reserved()),
                 ""};
  }
  return pools_->check_integrity(ids);
}

std::string Engine::Impl::describe_kernels() const {
  std::string text = "backend: " + backend_->name() + "\nkv: " + decoder_->kv_format().name() +
                     ", page " + std::to_string(plan_.page_bytes) + " bytes per layer";
  if (pools_->page_bytes(0) != plan_.page_bytes)
    text += " (first and last: " + std::to_string(pools_->page_bytes(0)) + ")";
  text += "\n";
  const model::ModelSpec& spec = model_->directory().spec();
  const auto chosen = model::parse_activation_choice(options_.activations);
  std::map<std::string, int> formats;
  for (const auto& [name, linear] : spec.linears) {
    const model::ActivationFormat inputs =
        chosen ? chosen->of(name, linear.format, spec.decoder.tied_embedding) : linear.activations;
    const char* const products = options_.numerics == "exact" ? ", float32 products"
                                 : inputs.bf16                ? ", bfloat16 products"
                                                              : ", integer products";
    ++formats[linear.format.name() +
              (inputs.float32() ? ", float32 activations" : " " + inputs.name() + products)];
  }
  for (const auto& [format, count] : formats) {
    text += "linear " + format + ": " + std::to_string(count) + " matrices\n";
  }
  if (spec.vision) {
    const model::ActivationFormat queries =
        chosen ? chosen->attention : spec.vision->attention_activations;
    text += "vision attention: " +
            (queries.quantized() ? queries.name() + " queries and keys, integer products"
                                 : std::string("float32")) +
            "\n";
  }
  return text;
}

void Engine::Impl::close() {
  std::lock_guard close_lock(close_mutex_);  // a thread can be joined once
  {
    std::lock_guard lock(mutex_);
    if (closed_) return;
    closing_ = true;
    for (auto& weak : live_) {
      if (auto stream = weak.lock()) stream->cancel.store(true, std::memory_order_relaxed);
    }
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
  std::lock_guard step_lock(step_mutex_);
  drain_inbox();  // also answers whoever waits in run_on_engine
  scheduler_->for_each([this](runtime::Sequence& s) {
    if (s.phase != runtime::Phase::kDone) finish(s, FinishReason::kCancelled, {});
  });
  scheduler_->retire();
  std::lock_guard lock(mutex_);
  closed_ = true;
}

}  // namespace fq
