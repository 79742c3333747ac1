// What the reduction tests share: a backend that has nothing but a similarity in double precision,
// golden files found through their manifest, and random video-like scenes.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "src/backend/backend.h"
#include "src/reduction/framefusion/framefusion.h"
#include "src/reduction/stage.h"

namespace fq::reduction::test {

// A backend of at most one op; every other is unsupported.
class SimilarityOnlyBackend final : public backend::Backend {
 public:
  // nullptr: not even that one.
  explicit SimilarityOnlyBackend(backend::SimilarityFn similarity) : similarity_(similarity) {}
  std::string name() const override { return "similarity only"; }
  Result<backend::LinearFn> linear(const model::WeightFormat&,
                                   const model::ActivationFormat&) const override {
    return none();
  }
  Result<backend::NormFn> norm(model::NormKind) const override { return none(); }
  Result<backend::RopeFn> rope() const override { return none(); }
  Result<backend::KvAppendFn> kv_append(const quant::KvPageLayout&) const override {
    return none();
  }
  Result<backend::AttentionFn> attention(const quant::KvPageLayout&) const override {
    return none();
  }
  Result<backend::ImportanceFn> importance(const quant::KvPageLayout&) const override {
    return none();
  }
  Result<backend::EncoderAttentionFn> encoder_attention(
      int, const model::ActivationFormat&) const override {
    return none();
  }
  Result<backend::ActivationFn> activation(model::Activation) const override { return none(); }
  Result<backend::SimilarityFn> similarity() const override {
    if (similarity_ == nullptr) return none();
    return similarity_;
  }

 private:
  static Error none() { return {Code::kUnsupported, "not in this test", ""}; }
  backend::SimilarityFn similarity_;
};

// Cosines in double, straight from the definition.
void exact_similarity(const ops::SimilarityArgs& args, ThreadPool& pool);

// What the goldens are run with: the definition, and the engine's own op.
struct NamedSimilarity {
  const char* name;
  backend::SimilarityFn run;
};
const std::vector<NamedSimilarity>& similarities();

ThreadPool& pool();

// Folder with the golden data of token reduction; skips the test where it is absent.
std::filesystem::path golden_folder();
#define SKIP_WITHOUT_GOLDEN()                                                             \
  if (!std::filesystem::exists(::fq::reduction::test::golden_folder() / "manifest.json")) \
  GTEST_SKIP() << "no golden data in " << ::fq::reduction::test::golden_folder()          \
               << " (set FRAMEQUILT_SHARED)"

nlohmann::json read_json(const std::filesystem::path& path);

// The arrays of one golden file, widened to what the tests need.
class GoldenFile {
 public:
  explicit GoldenFile(const std::filesystem::path& path);
  bool has(const std::string& name) const;
  std::vector<float> floats(const std::string& name) const;
  std::vector<int32_t> ints(const std::string& name) const;
  std::vector<int64_t> shape(const std::string& name) const;

 private:
  struct Array {
    std::vector<int64_t> shape;
    std::vector<float> floats;
    std::vector<int32_t> ints;
  };
  const Array& at(const std::string& name) const;
  std::map<std::string, Array> arrays_;
};

// Importance from its definition, in double: mean over heads and the last `queries` rows of
// softmax(q k / sqrt(d)). q [heads, queries, d], k [kv_heads, rows, d]; causal: query i sees rows
// [0, rows - queries + i].
std::vector<float> importance_from(const std::vector<float>& q, const std::vector<int64_t>& q_shape,
                                   const std::vector<float>& k, const std::vector<int64_t>& k_shape,
                                   bool causal);

// A prompt: text, frames of `period` patches that drift, text.
struct SceneOptions {
  int frames = 6, period = 8, width = 16;
  int text_before = 4, text_after = 5, text_between = 0;
  double drift = 0.7;  // noise of a patch from frame to frame, relative to the patch: 0 static
  bool independent = false;  // every patch of every frame on its own
  uint32_t seed = 1;
};

struct Scene {
  int64_t rows = 0, width = 0;
  int period = 0;
  std::vector<float> x;
  std::vector<int32_t> slots;
  std::vector<int32_t> positions;
  PromptLayout layout(int layers) const { return {slots, period, layers}; }
};
Scene make_scene(const SceneOptions& options);

// Applies `plan` to rows, slots and positions of the scene.
void apply(const RowPlan& plan, Scene* scene);

std::unique_ptr<Stage> make(const FrameFusionOptions& options, const PromptLayout& layout,
                            backend::SimilarityFn similarity = exact_similarity);

}  // namespace fq::reduction::test
