// The Python module framequilt._framequilt: thin, typed translation between dicts/arrays and the
// public C++ API. The GIL is released around everything that may wait or compute. Errors become
// framequilt.errors exceptions.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>

#include "convert.h"
#include "framequilt/engine.h"
#include "framequilt/tokenizer.h"
#include "src/backend/backend.h"
#include "src/model/directory.h"
#include "src/quant/kv_format.h"

namespace py = pybind11;

namespace fq::python {
namespace {

// Keeps the model alive for as long as Python or an engine does.
struct PyModel {
  std::shared_ptr<const Model> model;

  static PyModel open(const std::string& path, bool verify_checksums) {
    py::gil_scoped_release release;
    auto result = Model::open(path, {.verify_checksums = verify_checksums});
    py::gil_scoped_acquire acquire;
    if (!result) raise(result.error());
    return {*result};
  }
};

class PyStream {
 public:
  explicit PyStream(Stream stream) : stream_(std::move(stream)) {}

  std::optional<py::dict> next(double timeout_seconds) {
    std::optional<Event> event;
    {
      py::gil_scoped_release release;
      event = stream_.next_for(timeout_seconds);
    }
    if (!event) return std::nullopt;
    return event_to_dict(std::move(*event));
  }
  bool done() const { return stream_.done(); }
  void cancel() { stream_.cancel(); }
  uint64_t id() const { return stream_.id(); }

 private:
  Stream stream_;
};

class PyEngine {
 public:
  PyEngine(const PyModel& model, const EngineOptions& options) {
    py::gil_scoped_release release;
    auto result = Engine::create(model.model, options);
    py::gil_scoped_acquire acquire;
    if (!result) raise(result.error());
    engine_ = std::move(*result);
  }

  ~PyEngine() {
    py::gil_scoped_release release;
    engine_.reset();
  }
  PyEngine(const PyEngine&) = delete;
  PyEngine& operator=(const PyEngine&) = delete;

  std::unique_ptr<PyStream> submit(const py::dict& request) {
    Request native = request_from_dict(request);
    py::gil_scoped_release release;
    return std::make_unique<PyStream>(engine_->submit(std::move(native)));
  }
  bool step() {
    py::gil_scoped_release release;
    return engine_->step();
  }
  void close() {
    py::gil_scoped_release release;
    engine_->close();
  }
  void check_integrity() {
    Status status;
    {
      py::gil_scoped_release release;
      status = engine_->check_integrity();
    }
    if (!status) raise(status.error());
  }
  py::dict plan() const { return plan_to_dict(engine_->plan()); }
  py::dict stats() const { return stats_to_dict(engine_->stats()); }
  std::string describe_kernels() const { return engine_->describe_kernels(); }

 private:
  std::unique_ptr<Engine> engine_;
};

struct PyTokenizer {
  std::shared_ptr<const Tokenizer> tokenizer;
};

}  // namespace
}  // namespace fq::python

PYBIND11_MODULE(_framequilt, m) {
  using namespace fq::python;
  m.doc() = "Native engine of Framequilt.";

  py::class_<PyModel>(m, "Model", "An opened model directory; immutable, shared by engines.")
      .def_static("open", &PyModel::open, py::arg("path"), py::arg("verify_checksums") = false)
      .def_property_readonly("weight_bytes", [](const PyModel& model) {
        return model.model->directory().weight_bytes();
      });

  py::class_<PyStream>(m, "Stream", "Events of one request.")
      .def("next", &PyStream::next, py::arg("timeout_seconds"))
      .def_property_readonly("done", &PyStream::done)
      .def("cancel", &PyStream::cancel)
      .def_property_readonly("id", &PyStream::id);

  py::class_<PyEngine>(m, "Engine", "Runs requests; thread-safe.")
      .def(py::init([](const PyModel& model, const std::string& kv, const std::string& activations,
                       const std::string& numerics, uint64_t memory_bytes, int threads,
                       int chunk_rows, int max_sequences, int max_context, const std::string& simd,
                       uint32_t page_shuffle_seed, bool manual_step, bool text) {
             return std::make_unique<PyEngine>(
                 model, fq::EngineOptions{.kv = kv,
                                          .activations = activations,
                                          .numerics = numerics,
                                          .memory_bytes = memory_bytes,
                                          .threads = threads,
                                          .chunk_rows = chunk_rows,
                                          .max_sequences = max_sequences,
                                          .max_context = max_context,
                                          .simd = simd,
                                          .page_shuffle_seed = page_shuffle_seed,
                                          .manual_step = manual_step,
                                          .text = text});
           }),
           py::arg("model"), py::arg("kv") = "", py::arg("activations") = "",
           py::arg("numerics") = "int", py::arg("memory_bytes") = uint64_t{1} << 30,
           py::arg("threads") = 0, py::arg("chunk_rows") = 512, py::arg("max_sequences") = 64,
           py::arg("max_context") = 0, py::arg("simd") = "", py::arg("page_shuffle_seed") = 0,
           py::arg("manual_step") = false, py::arg("text") = true)
      .def("submit", &PyEngine::submit, py::arg("request"))
      .def("step", &PyEngine::step)
      .def("close", &PyEngine::close)
      .def("check_integrity", &PyEngine::check_integrity)
      .def("plan", &PyEngine::plan)
      .def("stats", &PyEngine::stats)
      .def("describe_kernels", &PyEngine::describe_kernels);

  py::class_<PyTokenizer>(m, "Tokenizer",
                          "The engine's own tokenizer, as embedded applications use it.")
      .def_static(
          "open",
          [](const std::string& model_directory) {
            auto result = fq::Tokenizer::open(model_directory);
            if (!result) raise(result.error());
            return PyTokenizer{*result};
          },
          py::arg("model_directory"))
      .def(
          "encode",
          [](const PyTokenizer& t, const std::string& text, bool parse_special) {
            auto result = t.tokenizer->encode(text, parse_special);
            if (!result) raise(result.error());
            return *result;
          },
          py::arg("text"), py::arg("parse_special") = true)
      .def(
          "decode",
          [](const PyTokenizer& t, const std::vector<fq::TokenId>& ids) {
            return t.tokenizer->decode(ids);
          },
          py::arg("ids"))
      .def(
          "token_bytes",
          [](const PyTokenizer& t, fq::TokenId id) {
            return py::bytes(std::string(t.tokenizer->token_bytes(id)));
          },
          py::arg("id"))
      .def_property_readonly("vocab_size",
                             [](const PyTokenizer& t) { return t.tokenizer->vocab_size(); });

  m.def("cpu_targets", &fq::backend::cpu_targets,
        "SIMD targets of this build and machine, best first.");
  m.def(
      "kv_format_name",
      [](const std::string& text) {
        const auto format = fq::quant::parse_kv_format(text);
        if (!format) raise(format.error());
        return format->name();
      },
      py::arg("text"), "The one name of a KV cache format. Errors: invalid_argument.");
  m.def(
      "kv_page_bytes",
      [](const std::string& text, int kv_heads, int head_dim, int layer, int layers) {
        const auto format = fq::quant::parse_kv_format(text);
        if (!format) raise(format.error());
        const auto layout =
            fq::quant::KvPageLayout::make(format->of_layer(layer, layers), kv_heads, head_dim);
        if (!layout) raise(layout.error());
        return layout->page_bytes;
      },
      py::arg("text"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("layer"),
      py::arg("layers"),
      "Bytes of a page, 64 tokens of one layer. Errors: invalid_argument, unsupported.");
  m.def("version", [] { return std::string(FRAMEQUILT_VERSION); });
}
