// How much an executor computes: rows whose results nobody reads do not go through linears.
#include <gtest/gtest.h>

#include <vector>

#include "src/model/directory.h"
#include "src/runtime/executor.h"
#include "src/runtime/scheduler.h"
#include "tests/engine/testing/model_builder.h"
#include "tests/engine/testing/temp_dir.h"

namespace fq::runtime {
namespace {

// Rows that went through linears since the last look, by their inputs and outputs.
std::map<std::pair<int, int>, std::vector<int64_t>> rows_seen;

void counted_linear(const ops::LinearArgs& args, ThreadPool&) {
  for (const ops::LinearArgs* one = &args; one != nullptr; one = one->next)
    rows_seen[{one->w->in, one->w->out}].push_back(one->rows);
  ops::linear_reference(args);
}

// The references, with linears that are counted.
class CountingBackend final : public backend::Backend {
 public:
  CountingBackend() : scalar_(std::move(*backend::make_cpu_backend("scalar"))) {}
  std::string name() const override { return "counting"; }
  Result<backend::LinearFn> linear(const model::WeightFormat&,
                                   const model::ActivationFormat&) const override {
    return &counted_linear;
  }
  Result<backend::NormFn> norm(model::NormKind kind) const override { return scalar_->norm(kind); }
  Result<backend::RopeFn> rope() const override { return scalar_->rope(); }
  Result<backend::KvAppendFn> kv_append(const quant::KvPageLayout& layout) const override {
    return scalar_->kv_append(layout);
  }
  Result<backend::AttentionFn> attention(const quant::KvPageLayout& layout) const override {
    return scalar_->attention(layout);
  }
  Result<backend::ImportanceFn> importance(const quant::KvPageLayout& layout) const override {
    return scalar_->importance(layout);
  }
  Result<backend::EncoderAttentionFn> encoder_attention(
      int head_dim, const model::ActivationFormat& activations) const override {
    return scalar_->encoder_attention(head_dim, activations);
  }
  Result<backend::ActivationFn> activation(model::Activation kind) const override {
    return scalar_->activation(kind);
  }
  Result<backend::SimilarityFn> similarity() const override { return scalar_->similarity(); }

 private:
  std::unique_ptr<const backend::Backend> scalar_;
};

class ExecutorWork : public ::testing::Test {
 protected:
  static constexpr int kChunk = 8;
  // All linears of a layer have shapes of their own, but for k and v.
  static constexpr int kHidden = 48, kHeads = 4, kKvHeads = 2, kHeadDim = 16, kMlp = 96,
                       kVocab = 80;
  static constexpr std::pair<int, int> kQ = {kHidden, kHeads* kHeadDim};
  static constexpr std::pair<int, int> kKv = {kHidden, kKvHeads* kHeadDim};
  static constexpr std::pair<int, int> kO = {kHeads * kHeadDim, kHidden};
  static constexpr std::pair<int, int> kUp = {kHidden, kMlp};
  static constexpr std::pair<int, int> kDown = {kMlp, kHidden};
  static constexpr std::pair<int, int> kHead = {kHidden, kVocab};

  void SetUp() override {
    testing::TinyModelOptions options;
    options.layers = 2;
    options.hidden = kHidden;
    options.heads = kHeads;
    options.kv_heads = kKvHeads;
    options.head_dim = kHeadDim;
    options.mlp_hidden = kMlp;
    options.vocab = kVocab;
    testing::write_tiny_model(folder_ / "model", options);
    auto directory = model::ModelDirectory::open(folder_ / "model", true);
    ASSERT_TRUE(directory) << directory.error().to_string();
    directory_ = std::move(*directory);
    auto decoder = blocks::Decoder::bind({*directory_, backend_, pool_, {}, false},
                                         *quant::parse_kv_format("kv8"));
    ASSERT_TRUE(decoder) << decoder.error().to_string();
    decoder_ = std::move(*decoder);
    const size_t page = decoder_->kv_layout(0).page_bytes;
    pools_ =
        std::move(*kv::LayerPools::create(kv::LayerPools::plan({{page, page}}, 64 * page, 32)));
    scheduler_ = std::make_unique<Scheduler>(pools_.get(), quant::kPageTokens, kChunk, 4);
    executor_ = std::make_unique<Executor>(*decoder_, nullptr, backend_, pool_, kChunk, 4);
  }

  void enqueue(int rows, bool prompt_logits = false) {
    auto sequence = std::make_unique<Sequence>();
    for (int i = 0; i < rows; ++i) sequence->request.prompt.push_back(i % kVocab);
    sequence->request.return_prompt_logits = prompt_logits;
    sequence->prompt = *lay_out_prompt(sequence->request, directory_->spec(), nullptr,
                                       directory_->spec().decoder.context);
    sequence->stream = std::make_shared<Stream::Impl>(1);
    sequence->max_tokens = 8;
    scheduler_->enqueue(std::move(sequence));
    scheduler_->admit();
  }

  // One pass over what there is; sequences whose prompt ends go on decoding. Returns how many rows
  // gave logits.
  int pass() {
    rows_seen.clear();
    std::vector<BatchItem> items;
    scheduler_->compose(&items);
    int results = 0;
    executor_->token_pass(items, [&](Sequence& sequence, std::span<float>) {
      sequence.phase = Phase::kDecode;
      ++sequence.generated;
      ++results;
    });
    return results;
  }

  using Rows = std::vector<int64_t>;
  testing::TempDir folder_;
  CountingBackend backend_;
  ThreadPool pool_{1};
  std::unique_ptr<const model::ModelDirectory> directory_;
  std::unique_ptr<const blocks::Decoder> decoder_;
  std::unique_ptr<kv::LayerPools> pools_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<Executor> executor_;
};

TEST_F(ExecutorWork, AChunkThatEndsNoPromptOnlyLeavesItsKeysAndValuesInTheLastLayer) {
  enqueue(kChunk + 5);
  EXPECT_EQ(pass(), 0);
  EXPECT_EQ(rows_seen[kKv], Rows(4, kChunk));  // k and v of two layers
  for (const auto& shape : {kQ, kO, kDown}) EXPECT_EQ(rows_seen[shape], Rows{kChunk});
  EXPECT_EQ(rows_seen[kUp], Rows(2, kChunk));  // gate and up
  EXPECT_TRUE(rows_seen[kHead].empty());
}

TEST_F(ExecutorWork, OfAPromptsEndOneRowPassesTheLastLayer) {
  enqueue(5);
  EXPECT_EQ(pass(), 1);
  EXPECT_EQ(rows_seen[kKv], Rows(4, 5));
  for (const auto& shape : {kQ, kO, kDown}) EXPECT_EQ(rows_seen[shape], (Rows{5, 1}));
  EXPECT_EQ(rows_seen[kUp], (Rows{5, 5, 1, 1}));
  EXPECT_EQ(rows_seen[kHead], Rows{1});
}

TEST_F(ExecutorWork, EachSequenceOfAPassKeepsTheRowsThatItNeeds) {
  enqueue(3);
  EXPECT_EQ(pass(), 1);
  enqueue(4);           // decodes from the next pass on
  enqueue(kChunk + 1);  // four of its rows fit this pass beside the other's
  EXPECT_EQ(pass(), 2);
  for (const auto& shape : {kQ, kO, kDown}) EXPECT_EQ(rows_seen[shape], (Rows{1 + 4 + 4, 2}));
  EXPECT_EQ(rows_seen[kHead], Rows{2});
}

TEST_F(ExecutorWork, DecodingTakesEveryRowThroughEveryLayer) {
  enqueue(2);
  enqueue(3);
  EXPECT_EQ(pass(), 2);
  EXPECT_EQ(pass(), 2);
  for (const auto& shape : {kQ, kO, kDown}) EXPECT_EQ(rows_seen[shape], Rows(2, 2));
}

TEST_F(ExecutorWork, PromptLogitsNeedEveryRow) {
  enqueue(kChunk + 2, true);
  EXPECT_EQ(pass(), 0);
  for (const auto& shape : {kQ, kO, kDown}) EXPECT_EQ(rows_seen[shape], Rows(2, kChunk));
  EXPECT_EQ(pass(), 1);
  for (const auto& shape : {kQ, kO, kDown}) EXPECT_EQ(rows_seen[shape], Rows(2, 2));
}

}  // namespace
}  // namespace fq::runtime
