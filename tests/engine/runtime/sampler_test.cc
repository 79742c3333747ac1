// The sampler against hand-computed distributions: each filter alone, their order, penalties,
// log-probabilities, and the drawn frequencies (chi-square with fixed seeds).
#include "src/runtime/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <random>

#include "src/runtime/philox.h"

// Options are spelled by name here; what is left out has its default.
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"

namespace fq::runtime {
namespace {

std::vector<float> logits_of(const std::vector<double>& probabilities) {
  std::vector<float> logits;
  for (double p : probabilities) logits.push_back(static_cast<float>(std::log(p)));
  return logits;
}

// Relative frequencies of `draws` first tokens with different seeds.
std::vector<double> frequencies(Sampling sampling, const std::vector<float>& logits, int draws) {
  std::vector<double> counts(logits.size(), 0.0);
  for (int i = 0; i < draws; ++i) {
    sampling.seed = static_cast<uint64_t>(i) * 0x9E3779B97F4A7C15ull + 1;
    Sampler sampler(sampling, static_cast<int>(logits.size()), {}, {});
    std::vector<float> copy = logits;
    auto choice = sampler.pick(copy);
    EXPECT_TRUE(choice.ok());
    counts[choice->token] += 1.0;
  }
  return counts;
}

// Asserts that `counts` are plausible draws from `expected`: no impossible token, and a chi-square
// statistic below mean + 5 standard deviations of its distribution (k - 1 degrees of freedom: mean
// k - 1, variance 2 (k - 1)). The seeds are fixed, so a pass stays a pass.
void expect_distribution(const std::vector<double>& counts, const std::vector<double>& expected) {
  double total = 0.0, statistic = 0.0;
  int possible = 0;
  for (double c : counts) total += c;
  for (size_t i = 0; i < counts.size(); ++i) {
    if (expected[i] == 0.0) {
      EXPECT_EQ(counts[i], 0.0) << "token " << i << " is filtered out";
      continue;
    }
    ++possible;
    const double mean = expected[i] * total;
    statistic += (counts[i] - mean) * (counts[i] - mean) / mean;
  }
  const double freedom = possible - 1;
  EXPECT_LE(statistic, freedom + 5.0 * std::sqrt(2.0 * freedom)) << "chi-square";
}

constexpr int kDraws = 20000;
const std::vector<double> kFive = {0.1, 0.4, 0.05, 0.3, 0.15};

TEST(Philox, MatchesTheKnownAnswersOfItsAuthors) {
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}),
            (PhiloxBlock{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}),
            (PhiloxBlock{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (PhiloxBlock{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Sampler, DrawsFromTheSoftmax) {
  expect_distribution(frequencies({}, logits_of(kFive), kDraws), kFive);
}

TEST(Sampler, TemperatureRaisesProbabilitiesToItsInverse) {
  for (float t : {0.5f, 2.0f}) {
    std::vector<double> expected;
    double total = 0.0;
    for (double p : kFive) total += std::pow(p, 1.0 / t);
    for (double p : kFive) expected.push_back(std::pow(p, 1.0 / t) / total);
    expect_distribution(frequencies({.temperature = t}, logits_of(kFive), kDraws), expected);
  }
}

TEST(Sampler, TinyTemperatureIsGreedyAndDoesNotOverflow) {
  const std::vector<float> logits = {1e30f, -1e30f, 1.01e30f, 0.0f};
  EXPECT_EQ(frequencies({.temperature = 1e-30f}, logits, 50)[2], 50.0);
}

TEST(Sampler, TopKKeepsTheMostLikelyAndTiesWithTheLast) {
  expect_distribution(frequencies({.top_k = 2}, logits_of(kFive), kDraws),
                      {0, 4 / 7., 0, 3 / 7., 0});
  expect_distribution(frequencies({.top_k = 1}, logits_of(kFive), 50), {0, 1, 0, 0, 0});
  expect_distribution(frequencies({.top_k = 99}, logits_of(kFive), kDraws), kFive);
  const std::vector<float> tied = {1.0f, 0.0f, 1.0f, 1.0f, -3.0f};
  expect_distribution(frequencies({.top_k = 2}, tied, kDraws), {1 / 3., 0, 1 / 3., 1 / 3., 0});
}

TEST(Sampler, TopPKeepsTheSmallestSufficientSet) {
  // Sorted: 0.4, 0.3, 0.15, 0.1, 0.05; cumulative: 0.4, 0.7, 0.85, 0.95, 1.
  const std::map<float, std::vector<double>> cases = {
      {0.01f, {0, 1, 0, 0, 0}},
      {0.39f, {0, 1, 0, 0, 0}},
      {0.41f, {0, 4 / 7., 0, 3 / 7., 0}},
      {0.69f, {0, 4 / 7., 0, 3 / 7., 0}},
      {0.71f, {0, 8 / 17., 0, 6 / 17., 3 / 17.}},
      {0.94f, {2 / 19., 8 / 19., 0, 6 / 19., 3 / 19.}},
      {1.0f, kFive},
  };
  for (const auto& [p, expected] : cases) {
    SCOPED_TRACE(p);
    expect_distribution(frequencies({.top_p = p}, logits_of(kFive), kDraws), expected);
  }
}

TEST(Sampler, TopPBreaksTiesByLowerId) {
  const std::vector<float> flat(8, 0.5f);  // each exactly 1/8
  expect_distribution(frequencies({.top_p = 0.375f}, flat, kDraws),
                      {1 / 3., 1 / 3., 1 / 3., 0, 0, 0, 0, 0});
}

TEST(Sampler, MinPIsRelativeToTheMostLikely) {
  // Relative to 0.4: 0.25, 1, 0.125, 0.75, 0.375.
  expect_distribution(frequencies({.min_p = 0.3f}, logits_of(kFive), kDraws),
                      {0, 8 / 17., 0, 6 / 17., 3 / 17.});
  expect_distribution(frequencies({.min_p = 0.2f}, logits_of(kFive), kDraws),
                      {2 / 19., 8 / 19., 0, 6 / 19., 3 / 19.});
  expect_distribution(frequencies({.min_p = 1.0f}, logits_of(kFive), 50), {0, 1, 0, 0, 0});
}

TEST(Sampler, FiltersApplyInTheDocumentedOrder) {
  // Temperature first: at T = 0.5 the squares 0.16 0.09 0.0225 0.01 0.0025 (of 0.285) reach 0.8
  // after two tokens, while the unscaled probabilities would need three.
  expect_distribution(frequencies({.temperature = 0.5f, .top_p = 0.8f}, logits_of(kFive), kDraws),
                      {0, 16 / 25., 0, 9 / 25., 0});
  // Top-k before top-p: of the three best (0.4 0.3 0.15, of 0.85) two reach 0.8; of all five three
  // are needed.
  expect_distribution(frequencies({.top_k = 3, .top_p = 0.8f}, logits_of(kFive), kDraws),
                      {0, 4 / 7., 0, 3 / 7., 0});
  // Min-p after top-p: 0.45 of the whole distribution needs 0.4 and 0.3; of the three that min-p
  // would leave (0.85) the first alone has 0.47.
  expect_distribution(frequencies({.top_p = 0.45f, .min_p = 0.3f}, logits_of(kFive), kDraws),
                      {0, 4 / 7., 0, 3 / 7., 0});
  // Bias before temperature: log 2 doubles at T = 1 and quadruples at T = 0.5.
  Sampling biased{.temperature = 0.5f};
  biased.logit_bias = {{0, std::log(2.0f)}};
  expect_distribution(frequencies(biased, logits_of({0.5, 0.5}), kDraws), {0.8, 0.2});
}

TEST(Sampler, GreedyTakesTheLowestIdOfTheLargest) {
  Sampling sampling{.temperature = 0.0f};
  Sampler sampler(sampling, 5, {}, {});
  std::vector<float> logits = {0.0f, 3.0f, -1.0f, 3.0f, 2.0f};
  EXPECT_EQ(sampler.pick(logits)->token, 1);
}

// Logits are looked at in vectors, in blocks of them, and one by one at the end.
TEST(Sampler, FindsTheLargestAndWhatIsNotFiniteAnywhereInALargeVocabulary) {
  constexpr int kVocab = 2500;
  std::mt19937 random(1);
  std::uniform_real_distribution<float> below(-9.0f, -1.0f);
  std::vector<float> logits(kVocab);
  for (float& logit : logits) logit = below(random);
  const auto pick = [&](const std::vector<float>& of) {
    Sampler sampler({.temperature = 0.0f}, kVocab, {}, {});
    std::vector<float> copy = of;
    return sampler.pick(copy);
  };
  for (const int at : {0, 15, 16, 1000, 1023, 1024, 2047, 2048, 2495, 2496, 2499}) {
    std::vector<float> one = logits;
    one[static_cast<size_t>(at)] = -0.5f;
    one[kVocab - 1] = -0.5f;  // as large, further on
    EXPECT_EQ(pick(one)->token, at);
    one[static_cast<size_t>(at)] = std::numeric_limits<float>::quiet_NaN();
    const auto refused = pick(one);
    ASSERT_FALSE(refused.ok()) << at;
    EXPECT_NE(refused.error().message.find("token " + std::to_string(at) + " "), std::string::npos)
        << refused.error().message;
  }
}

// Logits after bias and penalties, seen through greedy picks that leave them in place.
TEST(Sampler, PenaltiesFollowTheirFormulas) {
  Sampling sampling{.temperature = 0.0f,
                    .repetition_penalty = 2.0f,
                    .presence_penalty = 0.5f,
                    .frequency_penalty = 0.25f};
  sampling.logit_bias = {{3, 1.0f}};
  const std::vector<TokenId> prompt = {1, kMediaToken, 1, 2};
  Sampler sampler(sampling, 5, prompt, {});
  const std::vector<float> raw = {1.0f, 4.0f, -3.0f, 5.0f, 0.0f};

  std::vector<float> logits = raw;  // token 3 wins with 6: in no prompt, never generated
  EXPECT_EQ(sampler.pick(logits)->token, 3);
  EXPECT_EQ(logits, (std::vector<float>{1.0f, 2.0f, -6.0f, 6.0f, 0.0f}));

  logits = raw;  // 3 was generated once: (5 + 1) / 2 - 0.5 - 0.25
  EXPECT_EQ(sampler.pick(logits)->token, 3);
  EXPECT_EQ(logits, (std::vector<float>{1.0f, 2.0f, -6.0f, 2.25f, 0.0f}));

  logits = raw;  // twice: 3 - 0.5 - 2 * 0.25 = 2, ties with 1: lower id
  EXPECT_EQ(sampler.pick(logits)->token, 1);
  EXPECT_EQ(logits, (std::vector<float>{1.0f, 2.0f, -6.0f, 2.0f, 0.0f}));

  logits = raw;  // now 1 is output too: 4 / 2 - 0.75
  EXPECT_EQ(sampler.pick(logits)->token, 3);
  EXPECT_EQ(logits, (std::vector<float>{1.0f, 1.25f, -6.0f, 2.0f, 0.0f}));
}

TEST(Sampler, PresenceAndFrequencyIgnoreThePrompt) {
  Sampling sampling{.temperature = 0.0f, .presence_penalty = 1.0f, .frequency_penalty = 1.0f};
  Sampler sampler(sampling, 3, std::vector<TokenId>{0, 0, 1}, {});
  std::vector<float> logits = {2.0f, 1.0f, 0.0f};
  ASSERT_TRUE(sampler.pick(logits));
  EXPECT_EQ(logits, (std::vector<float>{2.0f, 1.0f, 0.0f}));
}

TEST(Sampler, MinTokensMasksEndingTokensUntilReached) {
  Sampling sampling{.temperature = 0.0f, .min_tokens = 2};
  sampling.stop_tokens = {1};
  Sampler sampler(sampling, 4, {}, std::vector<TokenId>{0});
  const std::vector<float> raw = {9.0f, 8.0f, 7.0f, 6.0f};
  std::vector<TokenId> tokens;
  for (int i = 0; i < 3; ++i) {
    std::vector<float> logits = raw;
    tokens.push_back(sampler.pick(logits)->token);
  }
  EXPECT_EQ(tokens, (std::vector<TokenId>{2, 2, 0}));
}

TEST(Sampler, MaskedTokensAreNeverDrawn) {
  Sampling sampling{.temperature = 50.0f, .top_k = 3, .min_tokens = 1};
  sampling.stop_tokens = {1, 2};
  expect_distribution(frequencies(sampling, {0.0f, 5.0f, 6.0f, 0.0f}, kDraws), {0.5, 0, 0, 0.5});
}

TEST(Sampler, RefusesAVocabularyThatIsMaskedWhole) {
  Sampling sampling{.min_tokens = 1};
  sampling.stop_tokens = {0, 1};
  Sampler sampler(sampling, 2, {}, {});
  std::vector<float> logits = {0.0f, 1.0f};
  auto choice = sampler.pick(logits);
  ASSERT_FALSE(choice.ok());
  EXPECT_EQ(choice.error().code, Code::kInvalidArgument);
}

TEST(Sampler, StopsAtStopTokensAndUnlessIgnoredAtEos) {
  Sampling sampling;
  sampling.stop_tokens = {5};
  const std::vector<TokenId> eos = {2, 7};
  Sampler normal(sampling, 10, {}, eos);
  sampling.ignore_eos = true;
  Sampler ignoring(sampling, 10, {}, eos);
  EXPECT_TRUE(normal.stops(5) && normal.stops(2) && normal.stops(7));
  EXPECT_FALSE(normal.stops(3));
  EXPECT_TRUE(ignoring.stops(5));
  EXPECT_FALSE(ignoring.stops(2) || ignoring.stops(7));
}

TEST(Sampler, LogprobsAreTheModelsOwn) {
  Sampling sampling{.temperature = 0.0f, .repetition_penalty = 50.0f, .top_logprobs = 3};
  sampling.logit_bias = {{1, -100.0f}};
  Sampler sampler(sampling, 5, std::vector<TokenId>{3}, {});
  // 0.4 is biased away and 0.3 penalised (its logit is negative): 4 wins, its log-probability stays
  // log 0.15.
  std::vector<float> logits = logits_of(kFive);
  const Choice choice = *sampler.pick(logits);
  EXPECT_EQ(choice.token, 4);
  // One rounding of log p to float32, and of the result: 2 * 2^-24 * |log 0.05| < 1e-6.
  EXPECT_NEAR(choice.logprob, std::log(0.15), 1e-6);
  ASSERT_EQ(choice.top.size(), 3u);
  const std::vector<TokenId> ids = {1, 3, 4};
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(choice.top[i].token, ids[i]);
    EXPECT_NEAR(choice.top[i].logprob, std::log(kFive[ids[i]]), 1e-6);
  }
}

TEST(Sampler, TopLogprobsBreakTiesByLowerIdAtEveryStep) {
  Sampling sampling{.temperature = 0.0f, .top_logprobs = 4};
  Sampler sampler(sampling, 6, {}, {});
  for (int step = 0; step < 3; ++step) {
    std::vector<float> logits = {0.0f, 1.0f, 1.0f, 0.0f, 1.0f, 0.0f};
    if (step == 1) logits = {5.0f, 4.0f, 3.0f, 2.0f, 1.0f, 0.0f};
    const Choice choice = *sampler.pick(logits);
    std::vector<TokenId> ids;
    for (const TokenLogprob& t : choice.top) ids.push_back(t.token);
    EXPECT_EQ(ids,
              step == 1 ? (std::vector<TokenId>{0, 1, 2, 3}) : (std::vector<TokenId>{1, 2, 4, 0}));
  }
}

TEST(Sampler, ZeroTopLogprobsGivesTheChosenOnly) {
  Sampler sampler({.temperature = 0.0f, .top_logprobs = 0}, 2, {}, {});
  std::vector<float> logits = {0.0f, 0.0f};
  const Choice choice = *sampler.pick(logits);
  EXPECT_NEAR(choice.logprob, std::log(0.5), 1e-6);
  EXPECT_TRUE(choice.top.empty());
}

TEST(Sampler, RefusesLogitsThatAreNotFinite) {
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                    -std::numeric_limits<float>::infinity()}) {
    for (float temperature : {0.0f, 1.0f}) {
      Sampler sampler({.temperature = temperature}, 3, {}, {});
      std::vector<float> logits = {0.0f, bad, 1.0f};
      auto choice = sampler.pick(logits);
      ASSERT_FALSE(choice.ok());
      EXPECT_EQ(choice.error().code, Code::kInternal);
      EXPECT_NE(choice.error().message.find("token 1"), std::string::npos);
    }
  }
}

TEST(Sampler, StreamDependsOnSeedAndStepOnly) {
  std::mt19937 random(3);
  std::vector<std::vector<float>> steps(40, std::vector<float>(50));
  for (auto& logits : steps) {
    for (float& l : logits) l = static_cast<float>(random() % 1000) * 0.003f;
  }
  auto run = [&](uint64_t seed, bool logprobs) {
    Sampling sampling{.top_k = 30, .top_p = 0.95f, .seed = seed};
    if (logprobs) sampling.top_logprobs = 5;
    Sampler sampler(sampling, 50, {}, {});
    std::vector<TokenId> tokens;
    for (std::vector<float> logits : steps) tokens.push_back(sampler.pick(logits)->token);
    return tokens;
  };
  EXPECT_EQ(run(1, false), run(1, true));  // what is reported changes no draw
  EXPECT_NE(run(1, false), run(2, false));
  EXPECT_NE(run(1, false), run(uint64_t{1} << 40, false));  // the seed's upper half counts
}

TEST(Sampler, DrawsOfOneStreamAreIndependentOfEachOther) {
  // Pairs of consecutive tokens of one stream: uniform over all 16 pairs.
  Sampler sampler({.max_tokens = 40000, .seed = 11}, 4, {}, {});
  std::vector<double> pairs(16, 0.0);
  for (int i = 0; i < kDraws; ++i) {
    std::vector<float> a(4, 0.0f), b(4, 0.0f);
    const TokenId first = sampler.pick(a)->token;
    pairs[first * 4 + sampler.pick(b)->token] += 1.0;
  }
  expect_distribution(pairs, std::vector<double>(16, 1 / 16.));
}

TEST(ValidateSampling, AcceptsDefaultsAndLimits) {
  EXPECT_TRUE(validate_sampling({}, 10));
  Sampling s{.max_tokens = 1, .temperature = 0.0f, .top_p = 1e-6f, .min_p = 1.0f, .min_tokens = 1};
  s.stop_tokens = {0, 9};
  s.stop_strings = {"\xE2\x82\xAC"};
  s.logit_bias = {{9, -100.0f}};
  s.top_logprobs = 10;
  EXPECT_TRUE(validate_sampling(s, 10));
}

TEST(ValidateSampling, NamesWhatIsWrong) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  auto expect_invalid = [](const char* name, const std::string& value, auto change) {
    Sampling sampling;
    change(sampling);
    const Status status = validate_sampling(sampling, 10);
    ASSERT_FALSE(status.ok()) << name;
    EXPECT_EQ(status.error().code, Code::kInvalidArgument);
    EXPECT_NE(status.error().message.find(name), std::string::npos) << status.error().message;
    EXPECT_NE(status.error().message.find(value), std::string::npos) << status.error().message;
  };
  expect_invalid("max_tokens", "0", [](Sampling& s) { s.max_tokens = 0; });
  expect_invalid("temperature", "-0.5", [](Sampling& s) { s.temperature = -0.5f; });
  expect_invalid("temperature", "nan", [&](Sampling& s) { s.temperature = nan; });
  expect_invalid("temperature", "inf", [&](Sampling& s) { s.temperature = inf; });
  expect_invalid("top_k", "-1", [](Sampling& s) { s.top_k = -1; });
  for (float p : {0.0f, -0.1f, 1.01f, nan}) {
    expect_invalid("top_p", std::to_string(p), [&](Sampling& s) { s.top_p = p; });
  }
  for (float p : {-0.1f, 1.5f, nan}) {
    expect_invalid("min_p", std::to_string(p), [&](Sampling& s) { s.min_p = p; });
  }
  for (float p : {0.0f, -1.0f, 1000.0f, nan}) {
    expect_invalid("repetition_penalty", std::to_string(p),
                   [&](Sampling& s) { s.repetition_penalty = p; });
  }
  expect_invalid("presence_penalty", "inf", [&](Sampling& s) { s.presence_penalty = inf; });
  expect_invalid("frequency_penalty", "nan", [&](Sampling& s) { s.frequency_penalty = nan; });
  expect_invalid("min_tokens", "-1", [](Sampling& s) { s.min_tokens = -1; });
  expect_invalid("min_tokens", "300", [](Sampling& s) { s.min_tokens = 300; });
  expect_invalid("top_logprobs", "11", [](Sampling& s) { s.top_logprobs = 11; });
  expect_invalid("top_logprobs", "-2", [](Sampling& s) { s.top_logprobs = -2; });
  expect_invalid("stop token", "10", [](Sampling& s) { s.stop_tokens = {3, 10}; });
  expect_invalid("logit_bias token", "-1", [](Sampling& s) { s.logit_bias = {{-1, 0.0f}}; });
  expect_invalid("logit_bias", "nan", [&](Sampling& s) { s.logit_bias = {{1, nan}}; });
  expect_invalid("stop string", "empty", [](Sampling& s) { s.stop_strings = {""}; });
  expect_invalid("stop string", "UTF-8", [](Sampling& s) { s.stop_strings = {"\xE2\x82"}; });
}

}  // namespace
}  // namespace fq::runtime
