#include "convert.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <set>

namespace py = pybind11;

namespace fq::python {

void raise(const Error& error) {
  const py::object from_code = py::module_::import("framequilt.errors").attr("from_code");
  const py::object exception =
      from_code(std::string(code_name(error.code)), error.message, error.hint);
  PyErr_SetObject(py::type::of(exception).ptr(), exception.ptr());
  throw py::error_already_set();
}

namespace {

[[noreturn]] void invalid(const std::string& message) {
  raise({Code::kInvalidArgument, message, ""});
}

// Reads optional keys of a dict into fields and complains about keys nobody asked for.
class Reader {
 public:
  Reader(const py::dict& dict, std::string where) : dict_(dict), where_(std::move(where)) {}

  template <class T>
  void read(const char* key, T* out) {
    known_.insert(key);
    if (!dict_.contains(key)) return;
    const py::object value = dict_[key];
    if (value.is_none()) return;
    try {
      *out = value.cast<T>();
    } catch (const py::cast_error&) {
      invalid(where_ + "." + key +
              " has the wrong type: " + py::repr(value).cast<std::string>().substr(0, 80));
    }
  }
  py::object object(const char* key) {
    known_.insert(key);
    if (!dict_.contains(key)) return py::none();
    return dict_[key];
  }
  void finish() const {
    for (const auto& item : dict_) {
      const auto key = py::str(item.first).cast<std::string>();
      if (!known_.contains(key)) invalid(where_ + " has no field '" + key + "'");
    }
  }

 private:
  const py::dict& dict_;
  std::string where_;
  std::set<std::string> known_;
};

Sampling sampling_from_dict(const py::dict& dict) {
  Sampling s;
  Reader r(dict, "sampling");
  r.read("max_tokens", &s.max_tokens);
  r.read("temperature", &s.temperature);
  r.read("top_k", &s.top_k);
  r.read("top_p", &s.top_p);
  r.read("min_p", &s.min_p);
  r.read("repetition_penalty", &s.repetition_penalty);
  r.read("presence_penalty", &s.presence_penalty);
  r.read("frequency_penalty", &s.frequency_penalty);
  r.read("seed", &s.seed);
  r.read("ignore_eos", &s.ignore_eos);
  r.read("min_tokens", &s.min_tokens);
  r.read("stop_tokens", &s.stop_tokens);
  r.read("stop_strings", &s.stop_strings);
  r.read("logit_bias", &s.logit_bias);
  r.read("top_logprobs", &s.top_logprobs);
  r.finish();
  return s;
}

Reduction reduction_from_dict(const py::dict& dict) {
  FrameFusionOptions o;
  std::string stage;
  Reader r(dict, "reduction");
  r.read("stage", &stage);
  if (stage != "framefusion") invalid("reduction.stage is '" + stage + "', there is: framefusion");
  r.read("cost", &o.cost);
  r.read("similarity_lower_bound", &o.similarity_lower_bound);
  r.read("ratio_lower_bound", &o.ratio_lower_bound);
  r.read("budget_layers", &o.budget_layers);
  r.read("importance_queries", &o.importance_queries);
  r.read("prune_text", &o.prune_text);
  r.read("merge_separators", &o.merge_separators);
  r.finish();
  return {.framefusion = o};
}

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;
using IntArray = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

Media media_from_dict(const py::dict& dict) {
  Media media;
  std::string kind;
  FloatArray data;
  std::optional<std::tuple<int, int, int, int, int, int>> tiles;
  Reader r(dict, "media");
  r.read("kind", &kind);
  r.read("data", &data);
  r.read("tiles", &tiles);
  const py::object slots = r.object("slots");
  r.finish();
  if (kind == "embedding") {
    media.kind = MediaKind::kEmbedding;
    if (data.ndim() != 2) invalid("an embedding item is [rows, hidden]");
    media.rows = static_cast<int>(data.shape(0));
    if (!slots.is_none()) {
      const auto array = slots.cast<IntArray>();
      media.slots.assign(array.data(), array.data() + array.size());
    }
  } else if (kind == "video" || kind == "image") {
    media.kind = kind == "video" ? MediaKind::kVideo : MediaKind::kImage;
    if (data.ndim() != 4) invalid("a " + kind + " item is [frames, channels, height, width]");
    media.frames = static_cast<int>(data.shape(0));
    media.height = static_cast<int>(data.shape(2));
    media.width = static_cast<int>(data.shape(3));
  } else {
    invalid("media.kind is '" + kind + "', expected video, image or embedding");
  }
  if (tiles) {
    const auto [rows, cols, top, left, height, width] = *tiles;
    media.tiles = ImageTiles{rows, cols, top, left, height, width};
  }
  media.data.assign(data.data(), data.data() + data.size());
  return media;
}

py::object to_array(const std::vector<float>& values) {
  if (values.empty()) return py::none();
  py::array_t<float> array(static_cast<py::ssize_t>(values.size()));
  std::memcpy(array.mutable_data(), values.data(), values.size() * sizeof(float));
  return array;
}

py::tuple logprob_to_tuple(const TokenLogprob& value) {
  return py::make_tuple(value.token, value.logprob);
}

py::dict usage_to_dict(const Usage& usage) {
  const Timings& t = usage.timings;
  py::dict timings;
  timings["queue_ms"] = t.queue_ms;
  timings["vision_ms"] = t.vision_ms;
  timings["prefill_ms"] = t.prefill_ms;
  timings["decode_ms"] = t.decode_ms;
  timings["reduction_ms"] = t.reduction_ms;
  timings["total_ms"] = t.total_ms;
  py::list calls;
  for (const ReductionCall& c : usage.reduction.calls) {
    py::dict call;
    call["call"] = c.call;
    call["rows_in"] = c.rows_in;
    call["rows_out"] = c.rows_out;
    call["visual_in"] = c.visual_in;
    call["merged"] = c.merged;
    call["share"] = c.share;
    call["bound"] = c.bound;
    call["branch"] = c.branch;
    calls.append(call);
  }
  py::dict reduction;
  reduction["stage"] = usage.reduction.stage;
  reduction["calls"] = calls;
  reduction["median_first_similarity"] = usage.reduction.median_first_similarity;
  reduction["mean_kept_share"] = usage.reduction.mean_kept_share;
  reduction["budget_missed"] = usage.reduction.budget_missed;
  py::dict out;
  out["prompt_tokens"] = usage.prompt_tokens;
  out["completion_tokens"] = usage.completion_tokens;
  out["visual_tokens"] = usage.visual_tokens;
  out["frames"] = usage.frames;
  out["frames_encoded"] = usage.frames_encoded;
  out["kept_per_layer"] = usage.kept_per_layer;
  out["visual_per_layer"] = usage.visual_per_layer;
  out["kv_bytes"] = usage.kv_bytes;
  out["kv_bytes_unreduced"] = usage.kv_bytes_unreduced;
  out["timings"] = timings;
  out["reduction"] = reduction;
  return out;
}

}  // namespace

Request request_from_dict(const py::dict& dict) {
  Request request;
  Reader r(dict, "request");
  r.read("prompt", &request.prompt);
  const py::object media = r.object("media");
  if (!media.is_none()) {
    for (const auto& item : media) request.media.push_back(media_from_dict(item.cast<py::dict>()));
  }
  const py::object sampling = r.object("sampling");
  if (!sampling.is_none()) request.sampling = sampling_from_dict(sampling.cast<py::dict>());
  const py::object reduction = r.object("reduction");
  if (!reduction.is_none()) request.reduction = reduction_from_dict(reduction.cast<py::dict>());
  r.read("return_logits", &request.return_logits);
  r.read("return_prompt_logits", &request.return_prompt_logits);
  r.finish();
  return request;
}

py::dict event_to_dict(Event event) {
  py::dict out;
  out["token"] = event.token;
  out["text"] = event.text;
  out["logprob"] = event.logprob ? py::object(logprob_to_tuple(*event.logprob)) : py::none();
  py::list top;
  for (const TokenLogprob& value : event.top_logprobs) top.append(logprob_to_tuple(value));
  out["top_logprobs"] = top;
  out["logits"] = to_array(event.logits);
  out["finish"] = std::string(finish_reason_name(event.finish));
  out["usage"] = event.usage ? py::object(usage_to_dict(*event.usage)) : py::none();
  out["prompt_logits"] = event.prompt_logits ? to_array(*event.prompt_logits) : py::none();
  out["error"] = event.error ? py::object(py::make_tuple(std::string(code_name(event.error->code)),
                                                         event.error->message, event.error->hint))
                             : py::none();
  return out;
}

py::dict plan_to_dict(const MemoryPlan& plan) {
  py::dict out;
  out["weight_bytes"] = plan.weight_bytes;
  out["workspace_bytes"] = plan.workspace_bytes;
  out["kv_bytes"] = plan.kv_bytes;
  out["page_bytes"] = plan.page_bytes;
  out["pages"] = plan.pages;
  out["tokens"] = plan.tokens;
  return out;
}

py::dict stats_to_dict(const EngineStats& stats) {
  py::dict out;
  out["running"] = stats.running;
  out["waiting"] = stats.waiting;
  out["pages_total"] = stats.pages_total;
  out["pages_free"] = stats.pages_free;
  out["steps"] = stats.steps;
  return out;
}

}  // namespace fq::python
