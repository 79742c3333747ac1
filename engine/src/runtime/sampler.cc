#include "src/runtime/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <utility>

#include "src/runtime/philox.h"
#include "src/runtime/stop_matcher.h"

namespace fq::runtime {
namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();
// Penalised logits stay finite, however large a model's own logits are.
constexpr float kLargestLogit = 1e30f;
constexpr float kMaxBias =
    100.0f;  // moves a token from certain to impossible for every model in use
constexpr float kMaxPenalty = 100.0f;
constexpr float kMaxRepetitionPenalty = 100.0f;

template <class T>
Status out_of_range(const char* name, T value, const std::string& range) {
  return Error{
      Code::kInvalidArgument,
      std::string("sampling: ") + name + " is " + std::to_string(value) + ", must be " + range, ""};
}

float bounded(float logit) { return std::clamp(logit, -kLargestLogit, kLargestLogit); }

// Logits are looked at in lanes, which compilers turn into vectors: one after the other, 152,000 of
// them took 2.4 % of the engine thread's time in a step of a 0.5B model (Zen 5, profile).
constexpr size_t kLanes = 16;
constexpr size_t kBlock = 1024;  // logits

bool all_finite(std::span<const float> logits) {
  float zeros[kLanes] = {};  // and NaN from the first on that is not finite
  size_t i = 0;
  for (; i + kLanes <= logits.size(); i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) zeros[lane] += 0.0f * logits[i + lane];
  }
  for (; i < logits.size(); ++i) zeros[0] += 0.0f * logits[i];
  return std::accumulate(zeros, zeros + kLanes, 0.0f) == 0.0f;
}

// Of none that is NaN.
float largest_of(std::span<const float> logits) {
  float most[kLanes];
  std::fill_n(most, kLanes, kMasked);
  size_t i = 0;
  for (; i + kLanes <= logits.size(); i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane)
      most[lane] = most[lane] < logits[i + lane] ? logits[i + lane] : most[lane];
  }
  for (; i < logits.size(); ++i) most[0] = std::max(most[0], logits[i]);
  return *std::max_element(most, most + kLanes);
}

// The first of the largest.
size_t index_of_largest(std::span<const float> logits) {
  float largest = kMasked;
  size_t block = 0;
  for (size_t i = 0; i < logits.size(); i += kBlock) {
    const float most = largest_of(logits.subspan(i, std::min(kBlock, logits.size() - i)));
    if (most > largest) largest = most, block = i;
  }
  const auto from = logits.begin() + static_cast<std::ptrdiff_t>(block);
  return static_cast<size_t>(std::find(from, logits.end(), largest) - logits.begin());
}

bool contains(std::span<const TokenId> tokens, TokenId token) {
  return std::find(tokens.begin(), tokens.end(), token) != tokens.end();
}

}  // namespace

Status validate_sampling(const Sampling& s, int vocab) {
  const std::string ids = "in [0, " + std::to_string(vocab) + ")";
  // Comparisons are written so that a NaN fails them.
  if (s.max_tokens < 1) return out_of_range("max_tokens", s.max_tokens, "at least 1");
  if (!(s.temperature >= 0.0f && std::isfinite(s.temperature))) {
    return out_of_range("temperature", s.temperature, "finite and at least 0 (0: greedy)");
  }
  if (s.top_k < 0) return out_of_range("top_k", s.top_k, "at least 0 (0: off)");
  if (!(s.top_p > 0.0f && s.top_p <= 1.0f)) {
    return out_of_range("top_p", s.top_p, "in (0, 1] (1: off)");
  }
  if (!(s.min_p >= 0.0f && s.min_p <= 1.0f)) {
    return out_of_range("min_p", s.min_p, "in [0, 1] (0: off)");
  }
  if (!(s.repetition_penalty >= 1.0f / kMaxRepetitionPenalty &&
        s.repetition_penalty <= kMaxRepetitionPenalty)) {
    return out_of_range("repetition_penalty", s.repetition_penalty, "in [0.01, 100] (1: off)");
  }
  if (!(std::abs(s.presence_penalty) <= kMaxPenalty)) {
    return out_of_range("presence_penalty", s.presence_penalty, "in [-100, 100] (0: off)");
  }
  if (!(std::abs(s.frequency_penalty) <= kMaxPenalty)) {
    return out_of_range("frequency_penalty", s.frequency_penalty, "in [-100, 100] (0: off)");
  }
  if (s.min_tokens < 0 || s.min_tokens > s.max_tokens) {
    return out_of_range("min_tokens", s.min_tokens,
                        "in [0, max_tokens = " + std::to_string(s.max_tokens) + "]");
  }
  if (s.top_logprobs < -1 || s.top_logprobs > vocab) {
    return out_of_range("top_logprobs", s.top_logprobs,
                        "in [-1, " + std::to_string(vocab) + "] (-1: no log-probabilities)");
  }
  for (TokenId token : s.stop_tokens) {
    if (token < 0 || token >= vocab) return out_of_range("stop token", token, ids);
  }
  for (const auto& [token, bias] : s.logit_bias) {
    if (token < 0 || token >= vocab) return out_of_range("logit_bias token", token, ids);
    if (!(std::abs(bias) <= kMaxBias)) return out_of_range("logit_bias", bias, "in [-100, 100]");
  }
  for (const std::string& text : s.stop_strings) {
    if (text.empty()) return Error{Code::kInvalidArgument, "sampling: a stop string is empty", ""};
    if (!is_valid_utf8(text)) {
      return Error{Code::kInvalidArgument, "sampling: a stop string is not valid UTF-8", ""};
    }
  }
  return {};
}

Sampler::Sampler(const Sampling& sampling, int vocab, std::span<const TokenId> prompt,
                 std::span<const TokenId> eos)
    : sampling_(sampling), vocab_(vocab), eos_(eos.begin(), eos.end()) {
  const auto size = static_cast<size_t>(vocab);
  penalises_ = sampling.repetition_penalty != 1.0f || sampling.presence_penalty != 0.0f ||
               sampling.frequency_penalty != 0.0f;
  if (penalises_) {
    is_seen_.assign(size, 0);
    occurrences_.assign(size, 0);
    seen_.reserve(std::min(size, prompt.size() + static_cast<size_t>(sampling.max_tokens)));
    for (TokenId token : prompt) {
      if (token < 0 || token >= vocab || is_seen_[token]) continue;
      is_seen_[token] = 1;
      seen_.push_back(token);
    }
  }
  if (sampling.temperature > 0.0f) {
    candidates_.reserve(size);
    if (sampling.top_k > 0 && sampling.top_k < vocab) scratch_.reserve(size);
  }
  if (sampling.top_logprobs >= 0) raw_.resize(size);
  if (sampling.top_logprobs > 0) {
    ranking_.resize(size);
    std::iota(ranking_.begin(), ranking_.end(), 0);
    top_.reserve(static_cast<size_t>(sampling.top_logprobs));
  }
}

bool Sampler::stops(TokenId token) const {
  return contains(sampling_.stop_tokens, token) || (!sampling_.ignore_eos && contains(eos_, token));
}

Result<Choice> Sampler::pick(std::span<float> logits) {
  if (logits.size() != static_cast<size_t>(vocab_)) {
    return Error{Code::kInternal,
                 "Sampler: " + std::to_string(logits.size()) + " logits for a vocabulary of " +
                     std::to_string(vocab_),
                 ""};
  }
  if (!all_finite(logits)) {
    const auto at = std::find_if_not(logits.begin(), logits.end(),
                                     [](float logit) { return std::isfinite(logit); });
    return Error{Code::kInternal,
                 "Sampler: the logit of token " + std::to_string(at - logits.begin()) + " is " +
                     std::to_string(*at),
                 "the model's weights or the input rows hold values that are not finite"};
  }
  if (sampling_.top_logprobs >= 0) std::copy(logits.begin(), logits.end(), raw_.begin());
  adjust(logits);
  const size_t best = index_of_largest(logits);  // of equals the lowest id
  if (logits[best] == kMasked) {
    return Error{Code::kInvalidArgument, "sampling: min_tokens masks the whole vocabulary",
                 "list fewer stop tokens, or set min_tokens to 0"};
  }
  Choice choice;
  choice.token =
      sampling_.temperature > 0.0f ? sample(logits, logits[best]) : static_cast<TokenId>(best);
  if (sampling_.top_logprobs >= 0) fill_logprobs(&choice);
  count(choice.token);
  return choice;
}

void Sampler::fill_logprobs(Choice* choice) {
  const double largest = largest_of(raw_);
  double sum = 0.0;
  for (float logit : raw_) sum += std::exp(logit - largest);
  const double log_sum = largest + std::log(sum);
  const auto logprob = [&](TokenId token) { return static_cast<float>(raw_[token] - log_sum); };
  choice->logprob = logprob(choice->token);
  if (sampling_.top_logprobs == 0) return;
  // ranking_ starts as whatever permutation the last step left: the order asked for is total.
  std::partial_sort(
      ranking_.begin(), ranking_.begin() + sampling_.top_logprobs, ranking_.end(),
      [&](TokenId a, TokenId b) { return raw_[a] != raw_[b] ? raw_[a] > raw_[b] : a < b; });
  top_.clear();
  for (int i = 0; i < sampling_.top_logprobs; ++i) {
    top_.push_back({ranking_[i], logprob(ranking_[i])});
  }
  choice->top = top_;
}

void Sampler::adjust(std::span<float> logits) const {
  for (const auto& [token, bias] : sampling_.logit_bias) logits[token] += bias;
  const float repetition = sampling_.repetition_penalty;
  for (TokenId token : seen_) {
    float logit = logits[token];
    if (repetition != 1.0f) logit = logit > 0.0f ? logit / repetition : logit * repetition;
    if (const int32_t n = occurrences_[token]; n > 0) {
      logit -= sampling_.presence_penalty + sampling_.frequency_penalty * static_cast<float>(n);
    }
    logits[token] = bounded(logit);
  }
  if (generated_ < sampling_.min_tokens) {
    for (TokenId token : eos_) {
      if (token >= 0 && token < vocab_) logits[token] = kMasked;
    }
    for (TokenId token : sampling_.stop_tokens) logits[token] = kMasked;
  }
}

TokenId Sampler::sample(std::span<const float> logits, float largest) {
  collect_candidates(logits, largest);
  if (sampling_.top_p < 1.0f) keep_nucleus();
  if (sampling_.min_p > 0.0f) {
    // The most likely token has weight 1 and has passed every filter.
    const double least = sampling_.min_p;
    std::erase_if(candidates_, [least](const Candidate& c) { return c.weight < least; });
  }
  double total = 0.0;
  for (const Candidate& c : candidates_) total += c.weight;
  const double target = philox_uniform(sampling_.seed, static_cast<uint64_t>(generated_)) * total;
  double sum = 0.0;
  const Candidate* chosen = &candidates_.front();
  for (const Candidate& c : candidates_) {
    if (c.weight <= 0.0) continue;
    chosen = &c;  // the last possible one, should rounding keep the sum below the target
    sum += c.weight;
    if (sum > target) break;
  }
  return chosen->token;
}

void Sampler::collect_candidates(std::span<const float> logits, float largest) {
  float least = std::numeric_limits<float>::lowest();  // leaves out what is masked
  const int k = sampling_.top_k;
  if (k > 0 && k < vocab_) {
    scratch_.assign(logits.begin(), logits.end());
    std::nth_element(scratch_.begin(), scratch_.begin() + (k - 1), scratch_.end(),
                     std::greater<float>());
    least = std::max(least, scratch_[k - 1]);
  }
  // Subtracting before dividing keeps every exponent at or below 0, however low the temperature.
  const double temperature = sampling_.temperature;
  candidates_.clear();
  for (int token = 0; token < vocab_; ++token) {
    if (logits[token] < least) continue;
    const double distance = static_cast<double>(logits[token]) - largest;
    candidates_.push_back({std::exp(distance / temperature), token});
  }
}

void Sampler::keep_nucleus() {
  double total = 0.0;
  for (const Candidate& c : candidates_) total += c.weight;
  const double wanted = static_cast<double>(sampling_.top_p) * total;
  // A heap gives the most likely ones first without sorting the rest.
  const auto less_likely = [](const Candidate& a, const Candidate& b) {
    return a.weight != b.weight ? a.weight < b.weight : a.token > b.token;
  };
  std::make_heap(candidates_.begin(), candidates_.end(), less_likely);
  auto heap_end = candidates_.end();
  double sum = 0.0;
  while (heap_end != candidates_.begin()) {
    std::pop_heap(candidates_.begin(), heap_end, less_likely);
    --heap_end;
    sum += heap_end->weight;
    if (sum >= wanted) break;
  }
  // What was popped lies behind heap_end, the least likely first.
  candidates_.erase(candidates_.begin(), heap_end);
}

void Sampler::count(TokenId token) {
  ++generated_;
  if (!penalises_) return;
  ++occurrences_[token];
  if (is_seen_[token]) return;
  is_seen_[token] = 1;
  seen_.push_back(token);
}

}  // namespace fq::runtime
