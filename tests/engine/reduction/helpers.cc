#include "tests/engine/reduction/helpers.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>

#include "src/model/directory.h"

namespace fq::reduction::test {

void exact_similarity(const ops::SimilarityArgs& args, ThreadPool&) {
  for (int64_t i = 0; i < args.rows; ++i) {
    args.out[i] = -2.0f;
    if (args.prev[i] < 0) continue;
    const float* a = args.x + i * args.stride;
    const float* b = args.x + args.prev[i] * args.stride;
    double dot = 0.0, aa = 0.0, bb = 0.0;
    for (int64_t d = 0; d < args.width; ++d) {
      dot += double{a[d]} * b[d];
      aa += double{a[d]} * a[d];
      bb += double{b[d]} * b[d];
    }
    const double norm = std::sqrt(aa) * std::sqrt(bb);
    if (norm > 0.0 && std::isfinite(norm)) args.out[i] = static_cast<float>(dot / norm);
  }
}

const std::vector<NamedSimilarity>& similarities() {
  static const std::vector<NamedSimilarity> all = [] {
    std::vector<NamedSimilarity> list = {
        {"definition", exact_similarity},
        {"reference op",
         [](const ops::SimilarityArgs& args, ThreadPool&) { ops::similarity_reference(args); }},
    };
    auto cpu = backend::make_cpu_backend("");
    if (!cpu) throw std::runtime_error(cpu.error().to_string());
    list.push_back({"cpu backend", *(*cpu)->similarity()});
    return list;
  }();
  return all;
}

ThreadPool& pool() {
  static ThreadPool pool(1);
  return pool;
}

std::filesystem::path golden_folder() {
  const char* shared = std::getenv("FRAMEQUILT_SHARED");
  return std::filesystem::path(shared != nullptr ? shared : "../shared") / "golden" / "framefusion";
}

nlohmann::json read_json(const std::filesystem::path& path) {
  std::ifstream file(path);
  return nlohmann::json::parse(file);
}

GoldenFile::GoldenFile(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(stream)),
                                std::istreambuf_iterator<char>());
  auto parsed = model::parse_safetensors(std::as_bytes(std::span(bytes)), path.string());
  if (!parsed) throw std::runtime_error(parsed.error().to_string());
  for (const auto& [name, view] : *parsed) {
    Array array{view.shape, {}, {}};
    if (view.dtype == DType::kF32) {
      const auto* values = reinterpret_cast<const float*>(view.bytes.data());
      array.floats.assign(values, values + view.bytes.size() / sizeof(float));
    } else if (view.dtype == DType::kI32) {
      const auto* values = reinterpret_cast<const int32_t*>(view.bytes.data());
      array.ints.assign(values, values + view.bytes.size() / sizeof(int32_t));
    } else {
      throw std::runtime_error(path.string() + ": dtype of " + name);
    }
    arrays_[name] = std::move(array);
  }
}

const GoldenFile::Array& GoldenFile::at(const std::string& name) const {
  const auto found = arrays_.find(name);
  if (found == arrays_.end()) throw std::runtime_error("no array " + name);
  return found->second;
}
bool GoldenFile::has(const std::string& name) const { return arrays_.contains(name); }
std::vector<float> GoldenFile::floats(const std::string& name) const { return at(name).floats; }
std::vector<int32_t> GoldenFile::ints(const std::string& name) const { return at(name).ints; }
std::vector<int64_t> GoldenFile::shape(const std::string& name) const { return at(name).shape; }

std::vector<float> importance_from(const std::vector<float>& q, const std::vector<int64_t>& q_shape,
                                   const std::vector<float>& k, const std::vector<int64_t>& k_shape,
                                   bool causal) {
  const int64_t heads = q_shape[0], queries = q_shape[1], d = q_shape[2];
  const int64_t rows = k_shape[1], group = heads / k_shape[0];
  std::vector<double> mean(static_cast<size_t>(rows), 0.0);
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t visible = causal ? rows - queries + i + 1 : rows;
      std::vector<double> p(static_cast<size_t>(visible));
      double largest = -INFINITY, sum = 0.0;
      for (int64_t j = 0; j < visible; ++j) {
        double dot = 0.0;
        for (int64_t c = 0; c < d; ++c) {
          dot += double{q[(h * queries + i) * d + c]} * k[((h / group) * rows + j) * d + c];
        }
        p[j] = dot / std::sqrt(static_cast<double>(d));
        largest = std::max(largest, p[j]);
      }
      for (double& v : p) sum += v = std::exp(v - largest);
      for (int64_t j = 0; j < visible; ++j)
        mean[j] += p[j] / sum / static_cast<double>(heads * queries);
    }
  }
  return {mean.begin(), mean.end()};
}

Scene make_scene(const SceneOptions& o) {
  std::mt19937 random(o.seed);
  std::normal_distribution<float> normal;
  Scene scene;
  scene.width = o.width;
  scene.period = o.period;
  auto add = [&](int32_t slot, auto value) {
    scene.slots.push_back(slot);
    scene.positions.push_back(static_cast<int32_t>(scene.rows++));
    for (int d = 0; d < o.width; ++d) scene.x.push_back(value(d));
  };
  auto add_text = [&](int n) {
    for (int i = 0; i < n; ++i) add(-1, [&](int) { return normal(random); });
  };
  add_text(o.text_before);
  std::vector<std::vector<float>> patches(o.period, std::vector<float>(o.width));
  for (auto& patch : patches) {
    for (float& v : patch) v = normal(random);
  }
  for (int f = 0; f < o.frames; ++f) {
    for (int p = 0; p < o.period; ++p) {
      for (float& v : patches[p]) {
        if (o.independent) {
          v = normal(random);
        } else if (f > 0 && o.drift > 0.0) {
          v += static_cast<float>(o.drift) * normal(random);
        }
      }
      add(p, [&](int d) { return patches[p][d]; });
    }
    if (f + 1 < o.frames) add_text(o.text_between);
  }
  add_text(o.text_after);
  return scene;
}

void apply(const RowPlan& plan, Scene* scene) {
  std::vector<int32_t*> columns = {scene->slots.data(), scene->positions.data()};
  scene->rows = apply_plan(plan, scene->x.data(), scene->width, scene->rows, scene->width, columns);
  scene->x.resize(static_cast<size_t>(scene->rows * scene->width));
  scene->slots.resize(static_cast<size_t>(scene->rows));
  scene->positions.resize(static_cast<size_t>(scene->rows));
}

std::unique_ptr<Stage> make(const FrameFusionOptions& options, const PromptLayout& layout,
                            backend::SimilarityFn similarity) {
  const SimilarityOnlyBackend backend(similarity);
  auto stage = make_stage({.framefusion = options}, layout, backend);
  if (!stage) throw std::runtime_error(stage.error().to_string());
  return std::move(*stage);
}

}  // namespace fq::reduction::test
