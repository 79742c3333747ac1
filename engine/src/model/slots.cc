// Names and shapes of everything a description implies. Pure functions; any thread.
#include "src/model/slots.h"

#include <string_view>
#include <utility>

namespace fq::model {
namespace {

class SlotList {
 public:
  void linear(std::string name, int64_t out, int64_t in, bool bias) {
    slots_.push_back({std::move(name), true, out, in, bias, {}});
  }
  void vector(std::string name, std::vector<int64_t> shape) {
    slots_.push_back({std::move(name), false, 0, 0, false, std::move(shape)});
  }
  void norm(const std::string& name, const NormSpec& norm, int64_t width) {
    vector(name + ".weight", {width});
    if (norm.kind == NormKind::kLayer) vector(name + ".bias", {width});
  }

  // A pre-norm block: attention and MLP with their norms, the same in decoder and tower.
  void block(const std::string& name, int64_t hidden, const NormSpec& norm_spec,
             const AttentionSpec& attention, const MlpSpec& mlp) {
    const int64_t q_width = int64_t{attention.heads} * attention.head_dim;
    const int64_t kv_width = int64_t{attention.kv_heads} * attention.head_dim;
    norm(name + ".attention_norm", norm_spec, hidden);
    linear(name + ".attention.q", q_width, hidden, attention.qkv_bias);
    linear(name + ".attention.k", kv_width, hidden, attention.qkv_bias);
    linear(name + ".attention.v", kv_width, hidden, attention.qkv_bias);
    linear(name + ".attention.o", hidden, q_width, attention.output_bias);
    norm(name + ".mlp_norm", norm_spec, hidden);
    if (mlp.kind == MlpKind::kGated) linear(name + ".mlp.gate", mlp.hidden, hidden, mlp.bias);
    linear(name + ".mlp.up", mlp.hidden, hidden, mlp.bias);
    linear(name + ".mlp.down", hidden, mlp.hidden, mlp.bias);
  }

  std::vector<SlotInfo> take() { return std::move(slots_); }

 private:
  std::vector<SlotInfo> slots_;
};

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace

std::vector<SlotInfo> slots(const ModelSpec& spec) {
  SlotList list;
  const DecoderSpec& decoder = spec.decoder;
  list.linear("decoder.embedding", decoder.vocab, decoder.hidden, false);
  for (int i = 0; i < decoder.layers; ++i) {
    list.block("decoder.layers." + std::to_string(i), decoder.hidden, decoder.norm,
               decoder.attention, decoder.mlp);
  }
  list.norm("decoder.final_norm", decoder.norm, decoder.hidden);
  if (!decoder.tied_embedding) list.linear("decoder.head", decoder.vocab, decoder.hidden, false);

  if (spec.vision) {
    const VisionSpec& vision = *spec.vision;
    const int64_t patch_inputs = int64_t{vision.channels} * vision.patch * vision.patch;
    list.linear("vision.patch_embedding", vision.hidden, patch_inputs, vision.patch_bias);
    list.vector("vision.position", {int64_t{vision.grid()} * vision.grid(), vision.hidden});
    for (int i = 0; i < vision.layers; ++i) {
      list.block("vision.layers." + std::to_string(i), vision.hidden, vision.norm, vision.attention,
                 vision.mlp);
    }
    if (vision.post_norm) list.norm("vision.post_norm", vision.norm, vision.hidden);
  }
  if (spec.projector) {
    const ProjectorSpec& projector = *spec.projector;
    list.linear("projector.layers.0", projector.hidden, projector.input, true);
    list.linear("projector.layers.1", projector.output, projector.hidden, true);
  }
  if (spec.visual && (spec.visual->newline != NewlineMode::kNone || spec.visual->image_newline)) {
    list.vector("visual.newline", {decoder.hidden});
  }
  return list.take();
}

std::vector<TensorInfo> linear_tensors(const std::string& name, int64_t out, int64_t in,
                                       const WeightFormat& format) {
  const int64_t tiles = round_up(out, 16) / 8;
  switch (format.kind) {
    case WeightFormat::Kind::kF32:
      return {{name + ".weight", DType::kF32, {tiles, in, 8}}};
    case WeightFormat::Kind::kBF16:
      return {{name + ".weight", DType::kBF16, {tiles, (in + 1) / 2, 8, 2}}};
    case WeightFormat::Kind::kAffine:
      break;
  }
  // 32 inputs of 8 rows take as many blocks of 32 bytes as a code has bits.
  const int64_t groups = format.group == 0 ? 1 : (in + format.group - 1) / format.group;
  const int64_t steps = (in + kStepInputs - 1) / kStepInputs;
  std::vector<TensorInfo> result = {
      {name + ".codes", DType::kU8, {tiles, round_up(in, 32) / 32 * format.bits, 8, 4}},
      {name + ".scales", format.scale, {tiles, groups, 8}}};
  if (format.stepped()) result.push_back({name + ".scale_steps", DType::kF16, {tiles, steps, 8}});
  if (format.offset) {
    result.push_back({name + ".offsets", format.scale, {tiles, groups, 8}});
    if (format.stepped())
      result.push_back({name + ".offset_steps", DType::kF16, {tiles, steps, 8}});
  } else if (!format.symmetric) {
    result.push_back({name + ".zeros", DType::kU8, {tiles, groups, 8}});
  }
  return result;
}

std::vector<TensorInfo> tensors(const ModelSpec& spec) {
  std::vector<TensorInfo> result;
  for (SlotInfo& slot : slots(spec)) {
    if (!slot.linear) {
      result.push_back({std::move(slot.name), DType::kF32, std::move(slot.shape)});
      continue;
    }
    const auto linear = spec.linears.find(slot.name);
    if (linear == spec.linears.end()) continue;
    for (TensorInfo& tensor : linear_tensors(slot.name, slot.out, slot.in, linear->second.format)) {
      result.push_back(std::move(tensor));
    }
    if (linear->second.activations.needs_row_sums()) {
      // Optional: directories were written without them, and the engine can compute them.
      const int64_t tiles = round_up(slot.out, 16) / 8;
      result.push_back({slot.name + ".row_sums", DType::kF32, {tiles, 8}, true});
    }
    if (slot.bias) result.push_back({slot.name + ".bias", DType::kF32, {slot.out}});
  }
  return result;
}

}  // namespace fq::model
