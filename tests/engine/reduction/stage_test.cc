// Properties of the stage on random scenes: agreement with the naive definition, and the invariants
// of the method.

#include <array>
#include <limits>
#include <map>
#include <numeric>
#include <set>

#include "tests/engine/reduction/helpers.h"
#include "tests/engine/reduction/naive.h"

namespace fq::reduction::test {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> random_importance(int64_t rows, std::mt19937* random) {
  std::vector<float> importance;
  for (int64_t i = 0; i < rows; ++i)
    importance.push_back(static_cast<float>((*random)() % 1000003));
  return importance;
}

// Asks the stage about the scene; importance is supplied when wanted.
RowPlan decide(Stage* stage, const Scene& scene, int call, const std::vector<float>& importance) {
  StageInput input{.call = call,
                   .x = scene.x.data(),
                   .stride = scene.width,
                   .rows = scene.rows,
                   .width = scene.width};
  if (stage->importance_queries(call) > 0) input.importance = importance.data();
  RowPlan plan;
  stage->decide(input, &plan, pool());
  return plan;
}

// A stand-in for a decoder layer: a little noise on every row.
void run_layer(Scene* scene, std::mt19937* random) {
  std::normal_distribution<float> normal(0.0f, 0.05f);
  for (float& v : scene->x) v += normal(*random);
}

std::vector<std::string> branches(const Stage& stage) {
  std::vector<std::string> names;
  for (const ReductionCall& call : stage.report().calls) names.push_back(call.branch);
  return names;
}

struct RandomCase {
  FrameFusionOptions options;
  SceneOptions scene;
  int layers = 0;
};

RandomCase random_case(uint32_t seed) {
  std::mt19937 random(seed);
  auto pick = [&](auto... values) {
    const std::array all = {values...};
    return all[random() % all.size()];
  };
  RandomCase c;
  c.options.cost = pick(0.04, 0.1, 0.2, 0.3, 0.5, 0.9, 1.0);
  c.options.similarity_lower_bound = pick(0.3, 0.6, 0.7, 0.9);
  c.options.ratio_lower_bound = pick(0.0, 0.05, 0.1, 0.3);
  c.options.budget_layers = pick(0, 0, 28);
  c.options.prune_text = pick(0, 1, 1) != 0;
  c.layers = pick(2, 5, 12, 28);
  c.scene = {.frames = pick(1, 2, 4, 8),
             .period = pick(1, 3, 10),
             .width = pick(8, 24),
             .text_before = pick(0, 3),
             .text_after = pick(0, 1, 4),
             .text_between = pick(0, 0, 2),
             .drift = pick(0.0, 0.3, 0.7, 1.2),
             .independent = pick(0, 0, 0, 1) != 0,
             .seed = seed};
  return c;
}

TEST(FrameFusion, AgreesWithTheNaiveDefinitionOnRandomScenes) {
  std::map<std::string, int> seen;
  int skipped = 0;
  for (uint32_t seed = 1; seed <= 1500; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const RandomCase c = random_case(seed);
    Scene scene = make_scene(c.scene);
    auto stage = make(c.options, scene.layout(c.layers));
    Naive naive(c.options, scene, c.layers);
    std::mt19937 random(seed);
    for (int call = 0; call < c.layers && scene.rows > 1; ++call) {
      const std::vector<float> importance = random_importance(scene.rows, &random);
      const Naive::Step want = naive.call(scene, importance);
      // Similarities reach the stage as float32 (error 2^-25): nearer decisions may go either way,
      // static scenes have many. Their rule is tested by TiesGoToTheLowerRow.
      if (want.margin < 1e-6) {
        ++skipped;
        break;
      }
      const RowPlan plan = decide(stage.get(), scene, call, importance);
      ++seen[want.branch];
      ASSERT_EQ(stage->report().calls.back().branch, want.branch) << "call " << call;
      apply(plan, &scene);
      std::vector<int> kept(want.kept.size());
      std::iota(kept.begin(), kept.end(), 0);
      if (!plan.unchanged) kept.assign(plan.keep.begin(), plan.keep.end());
      ASSERT_EQ(kept, want.kept) << "call " << call;
      for (size_t i = 0; i < scene.x.size(); ++i) {
        // At most 8 members, 8 roundings of sums of values below 8 each.
        ASSERT_NEAR(scene.x[i], want.x[i], 8 * 64 * 0x1p-24);
      }
      ASSERT_EQ(stage->finished(), naive.done());
      run_layer(&scene, &random);
    }
  }
  for (const char* branch :
       {"merge_continue", "merge_and_stop", "budget_topk", "prune", "noop", "budget_missed"}) {
    EXPECT_GT(seen[branch], 50) << branch;
  }
  EXPECT_LT(skipped, 600);
}

TEST(FrameFusion, InvariantsOfEveryCall) {
  int met = 0;
  for (uint32_t seed = 1; seed <= 800; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const RandomCase c = random_case(seed);
    Scene scene = make_scene(c.scene);
    const Scene start = scene;
    auto stage = make(c.options, scene.layout(c.layers));
    const auto is_visual = [](int32_t slot) { return slot >= 0; };
    const int64_t first =
        std::find_if(start.slots.begin(), start.slots.end(), is_visual) - start.slots.begin();
    const int64_t end = std::find_if(start.slots.rbegin(), start.slots.rend(), is_visual).base() -
                        start.slots.begin();
    const double visual_at_start = std::count_if(start.slots.begin(), start.slots.end(), is_visual);
    std::mt19937 random(seed);
    double kept_sum = 0.0;
    for (int call = 0; call <= c.layers && scene.rows > 1; ++call) {
      const Scene before = scene;
      const std::vector<float> importance = random_importance(scene.rows, &random);
      const RowPlan plan = decide(stage.get(), scene, call, importance);
      apply(plan, &scene);
      const ReductionCall& report = stage->report().calls.back();

      // Order is kept; positions are those of the prompt and only ever fewer.
      ASSERT_TRUE(std::is_sorted(scene.positions.begin(), scene.positions.end()));
      ASSERT_TRUE(std::includes(before.positions.begin(), before.positions.end(),
                                scene.positions.begin(), scene.positions.end()));
      // Text before and after the visual range survives bit for bit.
      std::set<int32_t> alive(scene.positions.begin(), scene.positions.end());
      for (int64_t p = 0; p < start.rows; ++p) {
        if (p < first || p >= end) {
          ASSERT_TRUE(alive.contains(static_cast<int32_t>(p)));
        }
      }
      for (int64_t i = 0; i < scene.rows; ++i) {
        if (scene.slots[i] >= 0) continue;
        const auto at =
            std::lower_bound(before.positions.begin(), before.positions.end(), scene.positions[i]) -
            before.positions.begin();
        ASSERT_TRUE(std::equal(scene.x.begin() + i * scene.width,
                               scene.x.begin() + (i + 1) * scene.width,
                               before.x.begin() + at * scene.width));
      }
      // Counts.
      const auto visual_now =
          static_cast<double>(std::count_if(scene.slots.begin(), scene.slots.end(), is_visual));
      const auto visual_before =
          static_cast<double>(std::count_if(before.slots.begin(), before.slots.end(), is_visual));
      ASSERT_EQ(report.rows_in, before.rows);
      ASSERT_EQ(report.rows_out, scene.rows);
      ASSERT_EQ(report.visual_in, visual_before);
      if (report.branch != "prune") {
        ASSERT_EQ(report.rows_out, report.rows_in - report.merged);
      }
      if (report.branch == "noop" || report.branch == "budget_missed") {
        ASSERT_TRUE(plan.unchanged);
      }
      if (report.branch.starts_with("merge") || report.branch == "budget_topk") {
        // Every slot keeps its first row, so at most all but one row of each slot merge.
        std::map<int32_t, int64_t> first_position, first_after;
        std::map<int32_t, double> sum_before, sum_after, magnitude;
        for (int64_t i = before.rows - 1; i >= 0; --i)
          first_position[before.slots[i]] = before.positions[i];
        for (int64_t i = scene.rows - 1; i >= 0; --i)
          first_after[scene.slots[i]] = scene.positions[i];
        ASSERT_EQ(first_position, first_after);
        const auto slots = static_cast<double>(first_position.size() - first_position.count(-1));
        ASSERT_LE(report.share, 1.0 - slots / visual_before + 1e-12);
        // Averages times their sizes add up to what was there, slot by slot.
        std::vector<double> size(scene.rows, 1.0);
        for (int64_t i = 0; i < before.rows; ++i) {
          sum_before[before.slots[i]] += before.x[i * before.width];
          magnitude[before.slots[i]] += std::abs(before.x[i * before.width]);
          if (!plan.unchanged && plan.root[i] != i) {
            const auto at = std::lower_bound(plan.keep.begin(), plan.keep.end(), plan.root[i]) -
                            plan.keep.begin();
            size[at] += 1.0;
          }
        }
        for (int64_t i = 0; i < scene.rows; ++i)
          sum_after[scene.slots[i]] += size[i] * scene.x[i * scene.width];
        // As many roundings of partial sums as a group has members (at most one per frame).
        const double unit = (c.scene.frames + 1) * 0x1p-24;
        for (const auto& [slot, sum] : sum_before)
          ASSERT_NEAR(sum_after[slot], sum, unit * magnitude[slot]);
      }
      if (report.branch == "budget_topk" && report.bound > 0) {
        const double kept = visual_now / visual_before;
        ASSERT_GE(kept, 1.0 - report.bound - 1e-12);
        ASSERT_LT(kept, 1.0 - report.bound + 1.0 / visual_before + 1e-12);
      }
      if (call < c.layers) kept_sum += visual_now;
      run_layer(&scene, &random);
    }
    if (scene.rows <= 1) continue;
    const double mean = kept_sum / (c.layers * visual_at_start);
    ASSERT_NEAR(stage->report().mean_kept_share, mean, 1e-12);
    // The budget, where the formula's depth is the real one and only visual rows were pruned.
    const bool real_depth = c.options.budget_layers == 0 || c.options.budget_layers == c.layers;
    if (!real_depth || (c.options.prune_text && c.scene.text_between > 0)) continue;
    for (const ReductionCall& call : stage->report().calls) {
      if (call.branch != "prune" || call.call >= c.layers) continue;
      const bool whole_prompt =
          first == 0 && end == start.rows;  // keeps a row even if the budget has none
      // A share below the bound keeps more than the budget can pay for to the end: something is
      // left to prune.
      ASSERT_GT(call.bound, 0.0);
      if (whole_prompt) continue;
      ASSERT_NEAR(mean, c.options.cost, 0.5 / visual_at_start + 1e-12);
      ++met;
    }
  }
  EXPECT_GT(met, 50);
}

TEST(FrameFusion, StaticVideoKeepsOneRowPerSlotAfterTheFirstCall) {
  Scene scene = make_scene({.frames = 8, .period = 6, .drift = 0.0});
  auto stage = make({.cost = 0.05}, scene.layout(28));
  apply(decide(stage.get(), scene, 0, {}), &scene);
  EXPECT_EQ(branches(*stage), (std::vector<std::string>{"merge_continue"}));
  EXPECT_EQ(std::count_if(scene.slots.begin(), scene.slots.end(), [](int32_t s) { return s >= 0; }),
            6);
  EXPECT_NEAR(stage->report().median_first_similarity, 1.0, 1e-6);
}

TEST(FrameFusion, IndependentFramesMergeNothingAndPruneAtOnce) {
  Scene scene = make_scene({.frames = 6, .width = 64, .independent = true});
  auto stage = make({}, scene.layout(28));
  std::mt19937 random(1);
  const auto importance = random_importance(scene.rows, &random);
  EXPECT_TRUE(decide(stage.get(), scene, 0, importance).unchanged);
  EXPECT_EQ(stage->importance_queries(1), 1);
  EXPECT_FALSE(decide(stage.get(), scene, 1, importance).unchanged);
  EXPECT_EQ(branches(*stage), (std::vector<std::string>{"merge_and_stop", "prune"}));
  EXPECT_TRUE(stage->finished());
  EXPECT_EQ(stage->importance_queries(2), 0);
}

TEST(FrameFusion, WholeBudgetChangesNothing) {
  for (uint32_t seed = 1; seed < 20; ++seed) {
    Scene scene = make_scene({.drift = 0.2, .seed = seed});
    auto stage = make({.cost = 1.0}, scene.layout(12));
    for (int call = 0; call <= 12; ++call)
      EXPECT_TRUE(decide(stage.get(), scene, call, {}).unchanged);
    EXPECT_EQ(stage->report().mean_kept_share, 1.0);
    EXPECT_FALSE(stage->report().budget_missed);
  }
}

TEST(FrameFusion, SingleRowsPassAtAnyTimeAndAreNoCalls) {
  Scene scene = make_scene({});
  auto stage = make({}, scene.layout(12));
  Scene row = make_scene({.frames = 1, .period = 1, .text_before = 0, .text_after = 0});
  EXPECT_TRUE(decide(stage.get(), row, 0, {}).unchanged);
  EXPECT_TRUE(stage->report().calls.empty());
  EXPECT_FALSE(stage->finished());
  EXPECT_FALSE(
      decide(stage.get(), scene, 0, {}).unchanged);  // the prompt is served as if nothing had been
}

TEST(FrameFusion, LoweringTheSimilarityBoundNeverMergesLess) {
  for (uint32_t seed = 1; seed < 30; ++seed) {
    const Scene scene = make_scene({.drift = 0.8, .seed = seed});
    int last = 0;
    for (double bound = 1.0; bound > -1.0; bound -= 0.1) {
      auto stage = make({.cost = 0.01, .similarity_lower_bound = bound}, scene.layout(28));
      decide(stage.get(), scene, 0, {});
      ASSERT_GE(stage->report().calls[0].merged, last);
      last = stage->report().calls[0].merged;
    }
    EXPECT_EQ(last, 40);  // 6 frames of 8: all but the first of each slot
  }
}

TEST(FrameFusion, SelectionIgnoresScaleOfRowsAndOrderOfFeatures) {
  for (uint32_t seed = 1; seed < 20; ++seed) {
    const Scene scene = make_scene({.seed = seed});
    Scene scaled = scene, permuted = scene;
    std::mt19937 random(seed);
    std::vector<int> order(scene.width);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    for (int64_t i = 0; i < scene.rows; ++i) {
      const auto scale =
          static_cast<float>(std::exp2(static_cast<int>(random() % 7) - 3));  // exact
      for (int64_t d = 0; d < scene.width; ++d) {
        scaled.x[i * scene.width + d] *= scale;
        permuted.x[i * scene.width + d] = scene.x[i * scene.width + order[d]];
      }
    }
    const RowPlan plan = decide(make({}, scene.layout(28)).get(), scene, 0, {});
    const RowPlan a = decide(make({}, scene.layout(28)).get(), scaled, 0, {});
    const RowPlan b = decide(make({}, scene.layout(28)).get(), permuted, 0, {});
    ASSERT_FALSE(plan.unchanged);
    EXPECT_EQ(plan.root, a.root);
    EXPECT_EQ(plan.root, b.root);
  }
}

TEST(FrameFusion, TiesGoToTheLowerRow) {
  // Identical frames: all 4 * 4 pairs tie at cosine 1. A budget of 0.7 lets 6 of 20 merge: the
  // first six that can.
  Scene scene = make_scene({.frames = 5, .period = 4, .text_before = 2, .drift = 0.0});
  for (int64_t i = 0; i < scene.rows; ++i) {
    for (int64_t d = 0; d < scene.width; ++d) scene.x[i * scene.width + d] = d == 0 ? 1.0f : 0.0f;
  }
  auto stage = make({.cost = 0.7}, scene.layout(28));
  const RowPlan plan = decide(stage.get(), scene, 0, {});
  EXPECT_EQ(stage->report().calls[0].branch, "budget_topk");
  std::vector<int> merged;
  for (int i = 0; i < scene.rows; ++i) {
    if (plan.root[i] != i) merged.push_back(i);
  }
  EXPECT_EQ(merged, (std::vector<int>{6, 7, 8, 9, 10, 11}));

  // Equal importance: the first of the range stay.
  Scene other = make_scene({.frames = 5, .period = 4, .text_before = 2, .independent = true});
  auto pruning = make({.cost = 0.5, .similarity_lower_bound = 2.0}, other.layout(28));
  decide(pruning.get(), other, 0, {});
  const RowPlan pruned = decide(pruning.get(), other, 1, std::vector<float>(other.rows, 0.5f));
  // n = 1 call at share 0: rem = 28 * 0.5 - 1 = 13 of 27; keep = round(20 * 13 / 27) = 10.
  std::vector<int32_t> want = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 22, 23, 24, 25, 26};
  EXPECT_EQ(pruned.keep, want);
  EXPECT_TRUE(pruned.root.empty());
}

TEST(FrameFusion, RowsWithoutAnAngleNeverMergeByThreshold) {
  for (float bad : {0.0f, kNan, std::numeric_limits<float>::infinity()}) {
    Scene scene = make_scene({.frames = 3, .period = 2, .text_before = 1, .drift = 0.0});
    for (int64_t d = 0; d < scene.width; ++d)
      scene.x[3 * scene.width + d] = bad;  // frame 1, slot 0
    // A bound below every cosine, and a backend that lets NaN through.
    auto stage = make({.cost = 0.01, .similarity_lower_bound = -5.0}, scene.layout(28),
                      [](const ops::SimilarityArgs& args, ThreadPool& p) {
                        exact_similarity(args, p);
                        for (int64_t i = 0; i < args.rows; ++i) {
                          if (args.prev[i] >= 0 && args.out[i] == -2.0f) args.out[i] = kNan;
                        }
                      });
    const RowPlan plan = decide(stage.get(), scene, 0, {});
    EXPECT_EQ(plan.root, (std::vector<int32_t>{0, 1, 2, 3, 2, 5, 2, 7, 8, 9, 10, 11})) << bad;
    EXPECT_EQ(stage->report().calls[0].merged, 2);
  }
}

TEST(FrameFusion, ImportanceThatIsNotANumberIsPrunedFirst) {
  Scene scene = make_scene({.frames = 1, .period = 4, .text_before = 0, .text_after = 1});
  auto stage = make({.cost = 0.5}, scene.layout(28));
  decide(stage.get(), scene, 0, {});
  const RowPlan plan = decide(stage.get(), scene, 1, {kNan, -1.0f, kNan, 0.5f, 9.0f});
  EXPECT_EQ(plan.keep, (std::vector<int32_t>{1, 3, 4}));
}

TEST(FrameFusion, TextInsideTheRangeIsPrunedOnlyIfAllowed) {
  for (bool prune_text : {true, false}) {
    Scene scene = make_scene({.frames = 4, .period = 3, .text_between = 2, .independent = true});
    auto stage = make({.cost = 0.3, .similarity_lower_bound = 2.0, .prune_text = prune_text},
                      scene.layout(28));
    decide(stage.get(), scene, 0, {});
    std::vector<float> importance(scene.rows);
    for (int64_t i = 0; i < scene.rows; ++i) importance[i] = scene.slots[i] < 0 ? 0.0f : 1.0f;
    const auto text = std::count(scene.slots.begin(), scene.slots.end(), -1);
    apply(decide(stage.get(), scene, 1, importance), &scene);
    const auto text_left = std::count(scene.slots.begin(), scene.slots.end(), -1);
    // bound = 1 - (8.4 - 1) / 27; 18 rows in the range keep 5, of 12 visual ones 3.
    EXPECT_EQ(text_left, prune_text ? text - 6 : text);
    EXPECT_EQ(scene.rows - text_left, prune_text ? 5 : 3);
  }
}

TEST(FrameFusion, NeverLeavesASequenceWithoutRows) {
  Scene scene = make_scene({.frames = 1, .period = 4, .text_before = 0, .text_after = 0});
  auto stage = make({.cost = 0.04}, scene.layout(28));
  decide(stage.get(), scene, 0, {});
  const RowPlan plan = decide(stage.get(), scene, 1, {1, 3, 2, 0});
  EXPECT_EQ(stage->report().calls[1].branch, "prune");
  EXPECT_EQ(plan.keep, (std::vector<int32_t>{1}));
}

TEST(FrameFusion, OverspentBudgetEndsBothPhasesAndIsReported) {
  Scene scene = make_scene({.frames = 4, .independent = true});
  auto stage = make({.cost = 0.04, .ratio_lower_bound = 0.0}, scene.layout(28));
  EXPECT_TRUE(decide(stage.get(), scene, 0, {}).unchanged);  // 28 * 0.04 = 1.12 calls' worth
  EXPECT_TRUE(decide(stage.get(), scene, 1, {}).unchanged);
  EXPECT_TRUE(decide(stage.get(), scene, 2, {}).unchanged);
  EXPECT_EQ(branches(*stage),
            (std::vector<std::string>{"merge_continue", "merge_continue", "budget_missed"}));
  EXPECT_TRUE(stage->finished());
  EXPECT_TRUE(stage->report().budget_missed);
}

TEST(FrameFusion, BudgetFormulaIsNeverAskedBeyondItsDepth) {
  Scene scene = make_scene({.frames = 4, .width = 64, .independent = true});
  auto stage = make({.cost = 0.9, .ratio_lower_bound = 0.0, .budget_layers = 3}, scene.layout(12));
  for (int call = 0; call < 4; ++call) EXPECT_TRUE(decide(stage.get(), scene, call, {}).unchanged);
  EXPECT_EQ(branches(*stage), (std::vector<std::string>{"merge_continue", "merge_continue",
                                                        "merge_continue", "budget_missed"}));
  EXPECT_TRUE(stage->report().budget_missed);
}

TEST(FrameFusion, BudgetDepthIsTheRealOneUnlessGiven) {
  // Published example: 80 layers, shares 0.5 and 0.05: a bound computed for 28 keeps 0.286 in place
  // of 0.295.
  const std::vector<double> shares = {0.5, 0.05};
  const double kept = 0.5 * 0.95;
  EXPECT_NEAR(kept * (1 - plan_budget(shares, 0.3, 80).bound), 0.295, 5e-4);
  EXPECT_NEAR(kept * (1 - plan_budget(shares, 0.3, 28).bound), 0.286, 5e-4);
  for (int budget_layers : {0, 28}) {
    Scene scene = make_scene({.frames = 1, .period = 100});
    auto stage = make({.cost = 0.3, .budget_layers = budget_layers}, scene.layout(80));
    decide(stage.get(), scene, 0, {});
    decide(stage.get(), scene, 1, std::vector<float>(scene.rows, 1.0f));
    const double depth = budget_layers == 0 ? 80 : 28;
    EXPECT_NEAR(stage->report().calls[1].bound, 1 - (depth * 0.3 - 1) / (depth - 1), 1e-12);
  }
}

TEST(FrameFusion, MergingUntilTheLastLayerMissesTheBudget) {
  for (double cost : {0.9, 0.99}) {
    Scene scene = make_scene({.frames = 4, .width = 64, .independent = true});
    auto stage =
        make({.cost = cost, .ratio_lower_bound = 0.0, .budget_layers = 28}, scene.layout(4));
    for (int call = 0; call <= 4; ++call) decide(stage.get(), scene, call, {});
    EXPECT_TRUE(stage->finished());
    EXPECT_EQ(stage->report().mean_kept_share, 1.0);
    // 32 visual rows: half a row of them is 0.0156.
    EXPECT_EQ(stage->report().budget_missed, cost == 0.9);
  }
}

TEST(FrameFusion, MissingImportanceOnlyPostponesPruning) {
  Scene scene = make_scene({.frames = 1});
  auto stage = make({}, scene.layout(12));
  decide(stage.get(), scene, 0, {});
  RowPlan plan;
  stage->decide({.call = 1,
                 .x = scene.x.data(),
                 .stride = scene.width,
                 .rows = scene.rows,
                 .width = scene.width},
                &plan, pool());
  EXPECT_TRUE(plan.unchanged);
  EXPECT_EQ(stage->importance_queries(2), 1);
  EXPECT_FALSE(decide(stage.get(), scene, 2, std::vector<float>(scene.rows, 1.0f)).unchanged);
}

TEST(FrameFusion, RowsItDoesNotKnowEndItVisibly) {
  Scene scene = make_scene({});
  auto stage = make({}, scene.layout(12));
  scene.rows -= 1;
  EXPECT_TRUE(decide(stage.get(), scene, 0, {}).unchanged);
  EXPECT_TRUE(stage->finished());
  EXPECT_TRUE(stage->report().budget_missed);
}

TEST(FrameFusion, DisjointSlotRangesNeverMergeWithEachOther) {
  Scene scene = make_scene({.frames = 4, .period = 3, .text_before = 0, .drift = 0.0});
  for (int64_t i = 0; i < 12; ++i)
    scene.slots[i] += i < 6 ? 0 : 3;  // two media items of two frames
  scene.period = 6;
  auto stage = make({.cost = 0.05}, scene.layout(28));
  const RowPlan plan = decide(stage.get(), scene, 0, {});
  const std::vector<int32_t> roots(plan.root.begin(), plan.root.begin() + 12);
  EXPECT_EQ(roots, (std::vector<int32_t>{0, 1, 2, 0, 1, 2, 6, 7, 8, 6, 7, 8}));
}

TEST(FrameFusion, MedianIsThatOfRowsWithAPredecessor) {
  // One slot; angles 0, 60, 60, 90 degrees between neighbours: cosines 0.5, 0.5, 0; with 4 pairs
  // the mean of two.
  auto scene_of = [](const std::vector<double>& angles) {
    Scene scene;
    scene.width = 2;
    scene.period = 1;
    double at = 0.0;
    for (size_t i = 0; i <= angles.size(); ++i) {
      if (i > 0) at += angles[i - 1];
      scene.x.push_back(static_cast<float>(std::cos(at * M_PI / 180)));
      scene.x.push_back(static_cast<float>(std::sin(at * M_PI / 180)));
      scene.slots.push_back(0);
      ++scene.rows;
    }
    return scene;
  };
  for (const auto& [angles, median] : std::vector<std::pair<std::vector<double>, double>>{
           {{60, 90, 0}, 0.5}, {{60, 90, 0, 120}, 0.25}, {{}, 0.0}}) {
    Scene scene = scene_of(angles);
    scene.slots.push_back(-1);
    scene.x.insert(scene.x.end(), {1.0f, 0.0f});
    ++scene.rows;
    auto stage = make({.cost = 0.5}, scene.layout(12));
    decide(stage.get(), scene, 0, {});
    EXPECT_NEAR(stage->report().median_first_similarity, median, 1e-6);
  }
}

TEST(MakeStage, BypassesRequestsWithoutReductionOrVisualRows) {
  const SimilarityOnlyBackend backend(exact_similarity);
  const std::vector<int32_t> visual = {-1, 0, 1}, text = {-1, -1};
  for (auto [options, slots] : std::vector<std::pair<Reduction, std::vector<int32_t>>>{
           {{}, visual},
           {{.framefusion = FrameFusionOptions{}}, text},
           {{.framefusion = FrameFusionOptions{}}, {}}}) {
    auto stage = make_stage(options, {slots, 2, 4}, backend);
    ASSERT_TRUE(stage.ok());
    EXPECT_EQ((*stage)->report().stage, "none");
    EXPECT_TRUE((*stage)->finished());
    EXPECT_EQ((*stage)->importance_queries(1), 0);
    RowPlan plan{false, {0}, {0, 0}};
    (*stage)->decide({.call = 0, .rows = 3, .width = 1}, &plan, pool());
    EXPECT_TRUE(plan.unchanged && plan.keep.empty() && plan.root.empty());
  }
  auto stage = make_stage({.framefusion = FrameFusionOptions{}}, {visual, 2, 4}, backend);
  ASSERT_TRUE(stage.ok());
  EXPECT_EQ((*stage)->report().stage, "framefusion");
}

TEST(MakeStage, RefusesWhatCannotBe) {
  const SimilarityOnlyBackend backend(exact_similarity);
  const double nan = std::nan(""), inf = INFINITY;
  auto refused = [&](const char* what, auto change) {
    FrameFusionOptions options;
    std::vector<int32_t> slots = {-1, 0, 1, 0, 1};
    PromptLayout layout{slots, 2, 4};
    change(options, layout, slots);
    auto stage = make_stage({.framefusion = options}, layout, backend);
    ASSERT_FALSE(stage.ok()) << what;
    EXPECT_EQ(stage.error().code, Code::kInvalidArgument);
    EXPECT_NE(stage.error().message.find(what), std::string::npos) << stage.error().message;
  };
  for (double cost : {0.0, -0.1, 1.0001, nan, inf}) {
    refused("cost", [&](auto& o, auto&, auto&) { o.cost = cost; });
  }
  for (double v : {nan, inf, -inf}) {
    refused("similarity_lower_bound", [&](auto& o, auto&, auto&) { o.similarity_lower_bound = v; });
    refused("ratio_lower_bound", [&](auto& o, auto&, auto&) { o.ratio_lower_bound = v; });
  }
  for (int v : {-1, 1 << 20})
    refused("budget_layers", [&](auto& o, auto&, auto&) { o.budget_layers = v; });
  for (int v : {0, -3, 1000}) {
    refused("importance_queries", [&](auto& o, auto&, auto&) { o.importance_queries = v; });
  }
  refused("slot 2 of row 2", [](auto&, auto&, auto& slots) { slots[2] = 2; });
  refused("slot -2 of row 0", [](auto&, auto&, auto& slots) { slots[0] = -2; });
  refused("layers", [](auto&, auto& layout, auto&) { layout.layers = 0; });
  refused("period", [](auto&, auto& layout, auto&) { layout.period = -1; });
}

TEST(MakeStage, PassesOnThatABackendHasNoSimilarity) {
  const SimilarityOnlyBackend backend(nullptr);
  const std::vector<int32_t> slots = {0, 0};
  auto stage = make_stage({.framefusion = FrameFusionOptions{}}, {slots, 1, 4}, backend);
  ASSERT_FALSE(stage.ok());
  EXPECT_EQ(stage.error().code, Code::kUnsupported);
}

}  // namespace
}  // namespace fq::reduction::test
