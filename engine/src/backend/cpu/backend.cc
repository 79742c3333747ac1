// The CPU backend: finds the kernel of an op in the table of one SIMD target, or says what there
// is. Immutable; any thread may ask, the engine thread calls the kernels.
#include <algorithm>
#include <cctype>

#include "src/backend/cpu/kernels.h"
#include "src/backend/cpu/targets.h"

namespace fq::backend {
namespace {

class CpuBackend : public Backend {
 public:
  CpuBackend(std::string target, const cpu::Kernels& kernels)
      : target_(std::move(target)), kernels_(kernels) {}

  std::string name() const override { return "cpu " + target_; }

  Result<LinearFn> linear(const model::WeightFormat& format,
                          const model::ActivationFormat& activations) const override {
    using Kind = model::WeightFormat::Kind;
    const bool affine = format.kind == Kind::kAffine;
    const size_t bits = static_cast<size_t>(format.bits);
    if (affine && !model::is_affine_bits(format.bits)) {
      return Error{Code::kUnsupported,
                   "backend '" + name() + "' has no linear kernel for " +
                       std::to_string(format.bits) + "-bit weights",
                   "it has f32, bf16, and affine weights of 2 to 6 and 8 bits"};
    }
    if (!activations.fits(format)) {
      return Error{Code::kUnsupported,
                   "backend '" + name() + "' has no linear kernel for " + activations.name() +
                       " inputs and " + format.name() + " weights",
                   activations.bf16
                       ? "convert the weights to bf16, or leave their inputs in float32: a16"
                       : "inputs are quantized for affine weights only"};
    }
    if (activations.quantized()) return kernels_.linear_integer[bits];
    if (activations.bf16) {
      const LinearFn rounded = kernels_.linear_bf16dot[affine ? bits : 16];
      if (rounded != nullptr) return rounded;  // else the next ones round inputs first
    }
    if (format.kind == Kind::kF32) return kernels_.linear_f32;
    if (format.kind == Kind::kBF16) return kernels_.linear_bf16;
    return kernels_.linear_affine[bits];
  }

  Result<NormFn> norm(model::NormKind kind) const override {
    return kind == model::NormKind::kRms ? kernels_.rms_norm : kernels_.layer_norm;
  }

  Result<RopeFn> rope() const override { return kernels_.rope; }

  Result<KvAppendFn> kv_append(const quant::KvPageLayout& layout) const override {
    FQ_RETURN_IF_ERROR(check(layout));
    return kernels_.kv_append;
  }

  Result<AttentionFn> attention(const quant::KvPageLayout& layout) const override {
    FQ_RETURN_IF_ERROR(check(layout));
    return kernels_.attention;
  }

  Result<ImportanceFn> importance(const quant::KvPageLayout& layout) const override {
    FQ_RETURN_IF_ERROR(check(layout));
    return kernels_.importance;
  }

  Result<EncoderAttentionFn> encoder_attention(
      int head_dim, const model::ActivationFormat& activations) const override {
    FQ_RETURN_IF_ERROR(check_head_dim(head_dim));
    if (activations.float32()) return kernels_.encoder_attention;
    if (activations == model::ActivationFormat{.bits = 8})
      return kernels_.integer_encoder_attention;
    return Error{Code::kUnsupported,
                 "backend '" + name() + "' has no encoder attention with " + activations.name() +
                     " queries and keys",
                 "it has a16 (float32) and a8"};
  }

  Result<ActivationFn> activation(model::Activation kind) const override {
    return kernels_.activation[static_cast<size_t>(kind)];
  }

  Result<SimilarityFn> similarity() const override { return kernels_.similarity; }

 private:
  Status check_head_dim(int head_dim) const {
    if (head_dim >= 1 && head_dim <= cpu::kMaxHeadDim) return {};
    return Error{
        Code::kUnsupported,
        "backend '" + name() + "' has no attention for head dimension " + std::to_string(head_dim),
        "it has head dimensions up to " + std::to_string(cpu::kMaxHeadDim)};
  }

  Status check(const quant::KvPageLayout& layout) const {
    for (const int bits : {layout.k.bits, layout.v.bits}) {
      if (bits == 32 || bits == 16 || bits == 8 || bits == 6 || (bits >= 2 && bits <= 4)) continue;
      return Error{
          Code::kUnsupported,
          "backend '" + name() + "' has no attention over " + std::to_string(bits) + "-bit pages",
          "it has 32, 16, 8, 6, 4, 3 and 2 bits"};
    }
    return check_head_dim(layout.head_dim);
  }

  std::string target_;
  cpu::Kernels kernels_;
};

}  // namespace

std::vector<std::string> cpu_targets() {
  std::vector<std::string> names;
  for (const cpu::Target& target : cpu::simd_targets()) names.push_back(target.name);
  names.push_back("scalar");
  return names;
}

Result<std::unique_ptr<const Backend>> make_cpu_backend(const std::string& simd) {
  const std::vector<cpu::Target> targets = cpu::simd_targets();
  if (simd == "scalar" || (simd.empty() && targets.empty())) {
    return std::unique_ptr<const Backend>(
        std::make_unique<const CpuBackend>("scalar", cpu::scalar_kernels()));
  }
  for (const cpu::Target& target : targets) {  // best first
    if (simd.empty() || target.name == simd) {
      return std::unique_ptr<const Backend>(
          std::make_unique<const CpuBackend>(target.name, cpu::simd_kernels(target)));
    }
  }
  std::string known;
  for (const std::string& name : cpu_targets()) known += (known.empty() ? "" : ", ") + name;
  return Error{Code::kInvalidArgument, "no SIMD target '" + simd + "' here",
               "this build and machine have: " + known + "; leave it empty for the best"};
}

}  // namespace fq::backend
