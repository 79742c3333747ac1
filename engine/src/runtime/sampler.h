// Chooses the next token of one request from its logits. Owned by the sequence; engine thread only.
// All memory is allocated when the sampler is made.
//
// Filters apply in the order that framequilt/request.h promises. Each of them sees the distribution
// the one before left:
//   top-k keeps every token tied with the k-th; top-p keeps the smallest set of most likely tokens
//   (ties: lower id) whose share is at least p; min-p keeps tokens at least min_p times as likely
//   as the most likely one.
// Log-probabilities are the model's own: log-softmax of the logits before any bias, penalty, mask
// or temperature.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "framequilt/request.h"
#include "framequilt/status.h"
#include "framequilt/types.h"

namespace fq::runtime {

// Errors: invalid_argument with the offending value.
Status validate_sampling(const Sampling& sampling, int vocab);

struct Choice {
  TokenId token = 0;
  float logprob = 0.0f;               // when top_logprobs >= 0
  std::span<const TokenLogprob> top;  // most likely first; valid until the next pick
};

class Sampler {
 public:
  // `sampling` was validated against `vocab`. `prompt` counts for the repetition penalty (media
  // markers do not); `eos` are the model's own end-of-sequence ids.
  Sampler(const Sampling& sampling, int vocab, std::span<const TokenId> prompt,
          std::span<const TokenId> eos);

  // Chooses from `logits` [vocab], which is modified in place, and counts the choice as generated.
  // The draw depends on the seed and the number of tokens generated so far only. Errors: internal
  // (a logit that is not finite), invalid_argument (min_tokens masks the whole vocabulary).
  Result<Choice> pick(std::span<float> logits);

  // Whether generation ends with this token: a stop token, or end of sequence unless ignore_eos.
  bool stops(TokenId token) const;
  int generated() const { return generated_; }

 private:
  struct Candidate {
    double weight = 0.0;  // proportional to the probability, 1 for the most likely
    TokenId token = 0;
  };

  void fill_logprobs(Choice* choice);
  void adjust(std::span<float> logits) const;
  TokenId sample(std::span<const float> logits, float largest);
  void collect_candidates(std::span<const float> logits, float largest);
  void keep_nucleus();
  void count(TokenId token);

  Sampling sampling_;
  int vocab_;
  std::vector<TokenId> eos_;
  int generated_ = 0;

  bool penalises_ = false;
  std::vector<TokenId> seen_;         // distinct tokens of prompt and output
  std::vector<uint8_t> is_seen_;      // [vocab] when penalises_
  std::vector<int32_t> occurrences_;  // in the output; [vocab] when penalises_

  std::vector<Candidate> candidates_;
  std::vector<float> scratch_;  // top-k
  std::vector<float> raw_;      // log-probabilities
  std::vector<TokenId> ranking_;
  std::vector<TokenLogprob> top_;
};

}  // namespace fq::runtime
