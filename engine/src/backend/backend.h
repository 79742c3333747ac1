// The op table: how blocks reach kernels. A backend is found by name and asked once, at bind time,
// for each op; what it does not have is an error that names what there is, never a slower
// substitute. Kernels are called by the engine thread only and spread over the pool themselves.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "framequilt/status.h"
#include "src/core/thread_pool.h"
#include "src/ops/ops.h"

namespace fq::backend {

using LinearFn = void (*)(const ops::LinearArgs&, ThreadPool&);
using NormFn = void (*)(const ops::NormArgs&, ThreadPool&);
using RopeFn = void (*)(const ops::RopeArgs&, ThreadPool&);
using KvAppendFn = void (*)(const ops::KvAppendArgs&, ThreadPool&);
// Several independent items (sequences) at once, so that decode rows of a batch share the threads.
using AttentionFn = void (*)(std::span<const ops::AttentionArgs>, ThreadPool&);
using ImportanceFn = void (*)(const ops::ImportanceArgs&, ThreadPool&);
using EncoderAttentionFn = void (*)(const ops::EncoderAttentionArgs&, ThreadPool&);
using ActivationFn = void (*)(const ops::ActivationArgs&, ThreadPool&);
using SimilarityFn = void (*)(const ops::SimilarityArgs&, ThreadPool&);

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string name() const = 0;  // "cpu avx3", "cpu scalar"

  virtual Result<LinearFn> linear(const model::WeightFormat& format,
                                  const model::ActivationFormat& activations) const = 0;
  virtual Result<NormFn> norm(model::NormKind kind) const = 0;
  virtual Result<RopeFn> rope() const = 0;
  virtual Result<KvAppendFn> kv_append(const quant::KvPageLayout& layout) const = 0;
  virtual Result<AttentionFn> attention(const quant::KvPageLayout& layout) const = 0;
  virtual Result<ImportanceFn> importance(const quant::KvPageLayout& layout) const = 0;
  // `activations`: float32 or a8, of queries and keys.
  virtual Result<EncoderAttentionFn> encoder_attention(
      int head_dim, const model::ActivationFormat& activations) const = 0;
  virtual Result<ActivationFn> activation(model::Activation kind) const = 0;
  virtual Result<SimilarityFn> similarity() const = 0;
};

// `simd`: "" best target of this machine; "scalar": the references; else a target that this build
// and machine have
// ("sse4", "avx2", "avx3", "neon"). Errors: invalid_argument listing the targets. Backends of
// several targets may live side by side. Any thread.
Result<std::unique_ptr<const Backend>> make_cpu_backend(const std::string& simd);
std::vector<std::string> cpu_targets();

}  // namespace fq::backend
