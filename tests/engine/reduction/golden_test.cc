// The stage against golden vectors of the published method, call by call. Cases are found through
// manifest.json, so another set of the same form is tested by pointing FRAMEQUILT_SHARED at it.

#include <algorithm>
#include <cmath>
#include <set>

#include "tests/engine/reduction/helpers.h"

namespace fq::reduction::test {
namespace {

using nlohmann::json;

FrameFusionOptions options_of(const json& item) {
  const json& params = item["params"];
  FrameFusionOptions options;
  options.cost = params["cost"];
  options.similarity_lower_bound = params["similarity_lower_bound"];
  options.ratio_lower_bound = params["ratio_lower_bound"];
  options.budget_layers = params["num_layers_in_budget"];
  for (const json& call : item["calls"]) {
    if (call.contains("attn_num_queries")) options.importance_queries = call["attn_num_queries"];
  }
  return options;
}

// `array` [..., n(, n)] with its trailing `axes` axes gathered at `keep`; leading axes as they are.
std::vector<float> gather(const std::vector<float>& array, int64_t rows, int64_t inner,
                          const std::vector<int32_t>& keep) {
  const int64_t outer = static_cast<int64_t>(array.size()) / (rows * inner);
  std::vector<float> out;
  for (int64_t o = 0; o < outer; ++o) {
    for (int32_t row : keep) {
      for (int64_t i = 0; i < inner; ++i) out.push_back(array[(o * rows + row) * inner + i]);
    }
  }
  return out;
}

std::vector<float> gather_square(const std::vector<float>& mask, int64_t rows,
                                 const std::vector<int32_t>& keep) {
  std::vector<float> out;
  for (int32_t i : keep) {
    for (int32_t j : keep) out.push_back(mask[i * rows + j]);
  }
  return out;
}

class GoldenCase {
 public:
  GoldenCase(const json& item, backend::SimilarityFn similarity, bool importance_from_scores)
      : item_(item),
        file_(golden_folder() / item["file"].get<std::string>()),
        from_scores_(importance_from_scores),
        bf16_(item["params"]["dtype"] == "bfloat16"),
        options_(options_of(item)),
        period_(item["params"]["patch_num"]) {
    slots_ = file_.ints("c0.patch_type_in");
    for (size_t i = 0; i < slots_.size(); ++i) positions_.push_back(static_cast<int32_t>(i));
    if (item["params"]["explicit_4d_mask"]) {
      const size_t n = slots_.size();
      mask_.assign(n * n, 0.0f);
      for (size_t i = 0; i < n; ++i) {
        for (size_t j = i + 1; j < n; ++j) mask_[i * n + j] = -INFINITY;
      }
    }
    stage_ = make(options_, {slots_, period_, options_.budget_layers}, similarity);
  }

  void run() {
    EXPECT_EQ(positions_.size(), item_["params"]["original_length"].get<size_t>());
    for (const json& call : item_["calls"]) {
      SCOPED_TRACE("call " + std::to_string(call["call"].get<int>()));
      step(call);
      if (::testing::Test::HasFatalFailure()) return;
    }
    const bool raised = item_["sequence_of_branches"].back() == "ValueError";
    EXPECT_EQ(stage_->report().budget_missed, raised);
    // Decode: one row, untouched at any time.
    std::vector<float> row(64, 1.0f);
    RowPlan plan;
    stage_->decide({.call = 0, .x = row.data(), .stride = 64, .rows = 1, .width = 64}, &plan,
                   pool());
    EXPECT_TRUE(plan.unchanged);
  }

 private:
  const FrameFusion& stage() const { return dynamic_cast<const FrameFusion&>(*stage_); }

  void step(const json& call) {
    const std::string c = "c" + std::to_string(call["call"].get<int>()) + ".";
    std::vector<float> x = file_.floats(c + "hidden_in");
    const int64_t rows = file_.shape(c + "hidden_in")[0], width = file_.shape(c + "hidden_in")[1];
    EXPECT_EQ(stage().merging_done(), call["finish_merging_in"].get<bool>());
    EXPECT_EQ(stage().finished(), call["finish_pruning_in"].get<bool>());
    if (file_.has(c + "patch_type_in")) {
      EXPECT_EQ(slots_, file_.ints(c + "patch_type_in"));
    }

    const std::string branch = call.contains("branch") ? call["branch"] : call["exception"];
    const int queries = branch == "prune" ? call["attn_num_queries"].get<int>() : 0;
    EXPECT_EQ(stage_->importance_queries(call["call"]), queries);
    std::vector<float> importance;
    if (queries > 0) importance = importance_of(c);

    const std::vector<float> before = x;
    StageInput input{
        .call = call["call"], .x = x.data(), .stride = width, .rows = rows, .width = width};
    if (queries > 0) input.importance = importance.data();
    RowPlan plan;
    stage_->decide(input, &plan, pool());
    EXPECT_EQ(x, before) << "a decision changes nothing";
    const ReductionCall& reported = stage_->report().calls.back();
    if (branch == "ValueError") {  // the reference raises here; this stage gives up and says so
      EXPECT_TRUE(plan.unchanged);
      EXPECT_EQ(reported.branch, "budget_missed");
      EXPECT_TRUE(stage_->finished());
      return;
    }
    check_report(call, reported, branch);
    check_selection(c, plan, rows);
    check_hidden(c, plan, before, &x, rows, width);
  }

  std::vector<float> importance_of(const std::string& c) const {
    const std::vector<float> given = file_.floats(c + "attn_mean");
    if (!from_scores_) return given;
    const auto q_shape = file_.shape(c + "q_last");
    const std::vector<float> computed =
        importance_from(file_.floats(c + "q_last"), q_shape, file_.floats(c + "k"),
                        file_.shape(c + "k"), /*causal=*/mask_.empty());
    // A probability goes through a float32 (bf16) score s, whose rounding is about 8 products and
    // |s| units, exp, sum and mean: below 64 units of its value for the scores of these files (|s|
    // < 40).
    const double unit = bf16_ ? 0x1p-8 : 0x1p-24;
    for (size_t i = 0; i < given.size(); ++i) {
      EXPECT_NEAR(given[i], computed[i], 64 * unit * std::max(given[i], 0x1p-10f)) << "row " << i;
    }
    return computed;
  }

  void check_report(const json& call, const ReductionCall& reported, const std::string& branch) {
    EXPECT_EQ(reported.branch, branch);
    EXPECT_EQ(reported.call, call["call"].get<int>());
    EXPECT_EQ(reported.rows_in, call["q_len_in"].get<int>());
    EXPECT_EQ(reported.rows_out, call["q_len_out"].get<int>());
    // The same formula in the same precision, summed in another order at most: a few units of
    // 2^-53.
    if (call.contains("sparsity_upper_bound")) {
      EXPECT_NEAR(reported.bound, call["sparsity_upper_bound"].get<double>(), 1e-14);
      EXPECT_EQ(reported.merged, call["merged_count"].get<int>());
      EXPECT_EQ(reported.visual_in, call["frame_token_num"].get<int>());
      EXPECT_EQ(reported.share, static_cast<double>(reported.merged) / reported.visual_in);
    }
    if (call.contains("pruning_ratio")) {
      EXPECT_NEAR(reported.bound, call["pruning_ratio"].get<double>(), 1e-14);
    }
    const auto shares = call["sparsity_list_out"].get<std::vector<double>>();
    EXPECT_EQ(std::vector<double>(stage().shares().begin(), stage().shares().end()), shares);
    EXPECT_EQ(stage().merging_done(), call["finish_merging_out"].get<bool>());
    EXPECT_EQ(stage().finished(), call["finish_pruning_out"].get<bool>());
  }

  void check_selection(const std::string& c, const RowPlan& plan, int64_t rows) {
    std::vector<int32_t> keep = plan.keep;
    if (plan.unchanged) {
      keep.resize(static_cast<size_t>(rows));
      for (int64_t i = 0; i < rows; ++i) keep[i] = static_cast<int32_t>(i);
    }
    ASSERT_EQ(keep, file_.ints(c + "kept"));
    if (file_.has(c + "merge_index_by_patch")) {
      const std::vector<int32_t> rows_by_patch = file_.ints(c + "token_index_by_patch");
      std::set<int32_t> merged;
      for (int32_t j : file_.ints(c + "merge_index_by_patch")) merged.insert(rows_by_patch[j]);
      for (int32_t i = 0; i < rows; ++i) {
        const bool joins = !plan.unchanged && plan.root[i] != i;
        EXPECT_EQ(joins, merged.contains(i)) << "row " << i;
      }
    }
    for (size_t i = 0; i < keep.size(); ++i) {
      slots_[i] = slots_[keep[i]];
      positions_[i] = positions_[keep[i]];
    }
    slots_.resize(keep.size());
    positions_.resize(keep.size());
    EXPECT_EQ(positions_, file_.ints(c + "orig_index"));
    if (file_.has(c + "patch_type_out")) {
      EXPECT_EQ(slots_, file_.ints(c + "patch_type_out"));
    }

    if (!mask_.empty()) {
      mask_ = gather_square(mask_, rows, keep);
      if (file_.has(c + "mask_out")) {
        EXPECT_EQ(mask_, file_.floats(c + "mask_out"));
      }
    }
    for (const char* table : {"cos", "sin"}) {
      const std::string name = c + table + "_out";
      if (!file_.has(name)) continue;
      const std::vector<float> now = file_.floats(name);
      std::vector<float>& last = rotary_[table];
      if (!last.empty()) {
        EXPECT_EQ(gather(last, rows, file_.shape(name).back(), keep), now);
      }
      last = now;
    }
  }

  void check_hidden(const std::string& c, const RowPlan& plan, const std::vector<float>& before,
                    std::vector<float>* x, int64_t rows, int64_t width) {
    std::vector<int32_t> slots(static_cast<size_t>(rows));
    std::vector<int32_t*> columns = {slots.data()};
    const int64_t kept = apply_plan(plan, x->data(), width, rows, width, columns);
    const std::vector<float> want = file_.floats(c + "hidden_out");
    ASSERT_EQ(kept * width, static_cast<int64_t>(want.size()));
    for (int64_t i = 0; i < kept; ++i) {
      const int32_t row = plan.unchanged ? static_cast<int32_t>(i) : plan.keep[i];
      std::vector<int64_t> members;
      for (int64_t j = 0; j < rows; ++j) {
        if (plan.root.empty() ? j == row : plan.root[j] == row) members.push_back(j);
      }
      const auto count = static_cast<double>(members.size());
      for (int64_t d = 0; d < width; ++d) {
        const float got = (*x)[i * width + d];
        if (members.size() == 1) {
          ASSERT_EQ(got, want[i * width + d]) << "row " << i << " was not merged";
          continue;
        }
        // count - 1 sums and one division, each rounded once, on partial sums of at most sum |x|:
        // count units of the mean of |x|. Both sides round in float32; bfloat16 files were rounded
        // by the reference only.
        double magnitude = 0.0;
        for (int64_t j : members) magnitude += std::abs(before[j * width + d]);
        const double unit = bf16_ ? 0x1p-8 : 2 * 0x1p-24;
        ASSERT_NEAR(got, want[i * width + d], count * unit * magnitude / count) << i << "," << d;
      }
    }
  }

  const json& item_;
  GoldenFile file_;
  bool from_scores_, bf16_;
  FrameFusionOptions options_;
  int period_;
  std::vector<int32_t> slots_, positions_;
  std::vector<float> mask_;
  std::map<std::string, std::vector<float>> rotary_;
  std::unique_ptr<Stage> stage_;
};

void run_all(bool importance_from_scores) {
  const json manifest = read_json(golden_folder() / "manifest.json");
  ASSERT_FALSE(manifest["unit_cases"].empty());
  std::set<std::string> branches;
  for (const json& item : manifest["unit_cases"]) {
    SCOPED_TRACE(item["name"].get<std::string>());
    for (const NamedSimilarity& similarity : similarities()) {
      SCOPED_TRACE(similarity.name);
      GoldenCase(item, similarity.run, importance_from_scores).run();
    }
    for (const json& branch : item["sequence_of_branches"]) branches.insert(branch);
  }
  for (const char* branch :
       {"merge_continue", "merge_and_stop", "budget_topk", "prune", "noop", "ValueError"}) {
    EXPECT_TRUE(branches.contains(branch)) << "no case takes " << branch;
  }
}

TEST(Golden, UnitCasesCallByCallWithGivenImportance) {
  SKIP_WITHOUT_GOLDEN();
  run_all(false);
}

TEST(Golden, UnitCasesCallByCallWithImportanceFromScores) {
  SKIP_WITHOUT_GOLDEN();
  run_all(true);
}

// Similarities, pair by pair, of the op that a backend supplies: here the definition, so that the
// golden numbers and prev[] agree on what a pair is.
TEST(Golden, SimilaritiesOfEveryMergingCall) {
  SKIP_WITHOUT_GOLDEN();
  const json manifest = read_json(golden_folder() / "manifest.json");
  for (const json& item : manifest["unit_cases"]) {
    SCOPED_TRACE(item["name"].get<std::string>());
    const GoldenFile file(golden_folder() / item["file"].get<std::string>());
    // A dot product and two norms of 32 float32 terms, each term and sum rounded: below 3 * (32 +
    // 2) units of 1.
    const double tolerance = item["params"]["dtype"] == "bfloat16" ? 4 * 0x1p-8 : 102 * 0x1p-24;
    for (int call = 0; file.has("c" + std::to_string(call) + ".similarity_by_patch"); ++call) {
      const std::string c = "c" + std::to_string(call) + ".";
      const auto x = file.floats(c + "hidden_in");
      const auto slots = file.ints(c + "patch_type_in");
      const auto rows_by_patch = file.ints(c + "token_index_by_patch");
      const auto want = file.floats(c + "similarity_by_patch");
      std::vector<int32_t> prev(slots.size(), -1);
      for (size_t i = 0; i < slots.size(); ++i) {
        for (size_t j = 0; j < i && slots[i] >= 0; ++j) {
          if (slots[j] == slots[i]) prev[i] = static_cast<int32_t>(j);
        }
      }
      std::vector<float> got(slots.size());
      const int64_t width = file.shape(c + "hidden_in")[1];
      for (const NamedSimilarity& similarity : similarities()) {
        similarity.run({.x = x.data(),
                        .stride = width,
                        .rows = static_cast<int64_t>(slots.size()),
                        .width = width,
                        .prev = prev.data(),
                        .out = got.data()},
                       pool());
        for (size_t j = 0; j < want.size(); ++j) {
          EXPECT_NEAR(got[rows_by_patch[j]], want[j], tolerance) << similarity.name << " " << j;
        }
      }
    }
  }
}

TEST(Golden, BudgetTable) {
  SKIP_WITHOUT_GOLDEN();
  const json tables = read_json(golden_folder() / "unit_tables.json");
  int bounds = 0, exhausted = 0, too_deep = 0;
  for (const json& row : tables["pruning_ratio"]) {
    const auto shares = row["sparsity_list"].get<std::vector<double>>();
    const int layers = row["num_layers"];
    const Budget budget = plan_budget(shares, row["cost"], layers);
    SCOPED_TRACE(row.dump());
    if (row.contains("value")) {
      ++bounds;
      ASSERT_EQ(budget.outcome, Budget::Outcome::kBound);
      EXPECT_NEAR(budget.bound, row["value"].get<double>(), 1e-13);
    } else if (static_cast<int>(shares.size()) >= layers) {
      ++too_deep;
      EXPECT_EQ(budget.outcome, Budget::Outcome::kTooDeep);
    } else {
      ++exhausted;
      EXPECT_EQ(budget.outcome, Budget::Outcome::kExhausted);
    }
  }
  EXPECT_GT(bounds, 100);
  EXPECT_GT(exhausted, 0);
  EXPECT_GT(too_deep, 0);
}

TEST(Golden, RoundingTable) {
  SKIP_WITHOUT_GOLDEN();
  const json tables = read_json(golden_folder() / "unit_tables.json");
  ASSERT_FALSE(tables["rounding"].empty());
  for (const json& row : tables["rounding"]) {
    EXPECT_EQ(prune_keep_count(row["range_len"], row["ratio"]), row["prune_keep"].get<int>())
        << row;
    EXPECT_EQ(budget_merge_count(row["range_len"], row["ratio"]), row["topk_merge_k"].get<int>())
        << row;
  }
}

TEST(Golden, CosineFunction) {
  SKIP_WITHOUT_GOLDEN();
  const GoldenFile file(golden_folder() / "unit_functions.safetensors");
  for (const auto& [name, tolerance] :
       std::map<std::string, double>{{"cos", 102 * 0x1p-24}, {"cos_bf16", 4 * 0x1p-8}}) {
    const auto a = file.floats(name + ".a"), b = file.floats(name + ".b"),
               want = file.floats(name + ".out");
    const int64_t width = file.shape(name + ".a")[1];
    for (size_t i = 0; i < want.size(); ++i) {
      std::vector<float> pair(b.begin() + i * width, b.begin() + (i + 1) * width);
      pair.insert(pair.end(), a.begin() + i * width, a.begin() + (i + 1) * width);
      const std::vector<int32_t> prev = {-1, 0};
      std::vector<float> out(2);
      for (const NamedSimilarity& similarity : similarities()) {
        similarity.run({.x = pair.data(),
                        .stride = width,
                        .rows = 2,
                        .width = width,
                        .prev = prev.data(),
                        .out = out.data()},
                       pool());
        EXPECT_EQ(out[0], -2.0f);
        if (std::isnan(want[i])) {
          EXPECT_EQ(out[1], -2.0f) << "no angle, no similarity";
        } else {
          EXPECT_NEAR(out[1], want[i], tolerance) << similarity.name << " " << name << " " << i;
        }
      }
    }
  }
}

TEST(Golden, ImportanceFunction) {
  SKIP_WITHOUT_GOLDEN();
  const GoldenFile file(golden_folder() / "unit_functions.safetensors");
  for (const char* prefix : {"attn_q1", "attn_q4", "attn_q4_noncausal", "attn_q1_gqa"}) {
    SCOPED_TRACE(prefix);
    const std::string name = prefix;
    const auto q = file.floats(name + ".q"), want = file.floats(name + ".importance");
    const auto shape = file.shape(name + ".q");
    const int64_t queries = file.shape(name + ".weights")[1], heads = shape[0], rows = shape[1],
                  d = shape[2];
    std::vector<float> last;
    for (int64_t h = 0; h < heads; ++h) {
      last.insert(last.end(), q.begin() + ((h * rows) + rows - queries) * d,
                  q.begin() + (h + 1) * rows * d);
    }
    const std::vector<float> got = importance_from(
        last, {heads, queries, d}, file.floats(name + ".k"), file.shape(name + ".k"),
        /*causal=*/name != "attn_q4_noncausal");
    // As in GoldenCase::importance_of.
    for (size_t i = 0; i < want.size(); ++i) {
      EXPECT_NEAR(got[i], want[i], 64 * 0x1p-24 * std::max(want[i], 0x1p-10f));
    }
  }
}

}  // namespace
}  // namespace fq::reduction::test
