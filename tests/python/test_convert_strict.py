"""The converter refuses what it does not understand, and then leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from oracles import tiny
from safetensors.numpy import load_file, save_file

from framequilt.convert import ConversionReport, Progress, convert
from framequilt.errors import (
    Cancelled,
    CorruptModel,
    FramequiltError,
    InvalidArgument,
    NotFound,
    Unsupported,
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint of each layout, in float32, which tests copy and damage."""
    base = tmp_path_factory.mktemp("checkpoints")
    tiny.tiny_llama(base / "llama", bf16=False)
    tiny.tiny_qwen2(base / "qwen2", bf16=False)
    tiny.tiny_llava_onevision(base / "onevision", bf16=False)
    tiny.tiny_llava_video_original(base / "original", bf16=False)
    return base


class Case:
    """A copy of a checkpoint and the place that it is converted to."""

    def __init__(self, origin: Path, base: Path) -> None:
        self.source = base / "source"
        self.out = base / "out"
        shutil.copytree(origin, self.source)
        self.out.mkdir()

    def config(self, **changes: Any) -> None:
        """Changes config.json; None removes a key."""
        file = self.source / "config.json"
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    def tensors(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Changes the dict of tensors in place."""
        file = self.source / "model.safetensors"
        tensors = {name: value.copy() for name, value in load_file(file).items()}
        change(tensors)
        save_file(tensors, file)

    def convert(self, **options: Any) -> ConversionReport:
        return convert(self.source, self.out / "model", **options)

    def refuses(
        self, kind: type[FramequiltError], match: str | None = None, **options: Any
    ) -> None:
        with pytest.raises(kind, match=match):
            self.convert(**options)
        assert list(self.out.iterdir()) == []


@pytest.fixture
def case(checkpoints: Path, tmp_path: Path) -> Callable[[str], Case]:
    return lambda name: Case(checkpoints / name, tmp_path)


UNKNOWN: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"logit_scale": 0.5}),
    ("llama", {"partial_rotary_factor": 0.5}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}),
    ("llama", {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2, 3]}}),
    ("llama", {"hidden_act": "gelu_fast"}),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}),
    ("llama", {"architectures": ["FalconForCausalLM"], "model_type": "falcon"}),
    ("qwen2", {"use_sliding_window": True}),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ("onevision", {"vision_feature_layer": [-1, -2]}),
    ("onevision", {"vision_feature_select_strategy": "default"}),
    ("onevision", {"vision_aspect_ratio": "anyres_max_0"}),
    ("onevision", {"vision_feature_layer": -9}),
    ("original", {"mm_projector_type": "linear"}),
    ("original", {"mm_newline_position": "everywhere"}),
    ("original", {"mm_spatial_pool_mode": "median"}),
    ("original", {"image_aspect_ratio": "pad"}),
    ("original", {"add_faster_video": True}),
    ("original", {"vision_config": None}),
    ("original", {"mm_vision_select_feature": "cls_patch"}),
]


@pytest.mark.parametrize(("layout", "change"), UNKNOWN, ids=lambda v: str(v)[:40])
def test_what_would_change_results_is_unsupported(
    case: Callable[[str], Case], layout: str, change: dict[str, Any]
) -> None:
    it = case(layout)
    it.config(**change)
    key = next(iter(change))
    it.refuses(Unsupported, "Falcon" if key == "architectures" else None)


def test_unknown_keys_are_named_wherever_they_are(case: Callable[[str], Case]) -> None:
    it = case("onevision")
    it.config(vision_config=tiny._tower() | {"window": 7})
    it.refuses(Unsupported, "window = 7")


CORRUPT: list[dict[str, Any]] = [
    {"hidden_size": None},
    {"hidden_size": "64"},
    {"hidden_size": 66},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": True},
    {"rms_norm_eps": -1.0},
    {"num_attention_heads": 8},
    {"vocab_size": 132},
    {"vocab_size": 100},
    {"num_hidden_layers": 4},
    {"eos_token_id": 131},
    {"rope_parameters": {"rope_type": "linear"}},
]


@pytest.mark.parametrize("change", CORRUPT, ids=str)
def test_configs_that_do_not_fit_the_weights_are_corrupt(
    case: Callable[[str], Case], change: dict[str, Any]
) -> None:
    it = case("llama")
    if next(iter(change)) == "num_attention_heads":
        change = {**change, "head_dim": None}
    it.config(**change)
    it.refuses(CorruptModel)


def test_a_layer_too_few_in_the_config_is_noticed(case: Callable[[str], Case]) -> None:
    it = case("llama")
    it.config(num_hidden_layers=2)
    it.refuses(Unsupported, r"9 tensors have no place.*layers\.2")


NAME = "model.layers.1.mlp.up_proj.weight"


BROKEN: dict[str, tuple[type[FramequiltError], str, Callable[[dict[str, Any]], object]]] = {
    "missing": (CorruptModel, r"missing.*decoder\.layers\.1\.mlp\.up", lambda t: t.pop(NAME)),
    "extra": (Unsupported, "surprise", lambda t: t.update(surprise=np.zeros(3, np.float32))),
    "a row less": (CorruptModel, NAME, lambda t: t.update({NAME: t[NAME][:-1].copy()})),
    "flat": (CorruptModel, NAME, lambda t: t.update({NAME: t[NAME].reshape(-1)})),
    "not a number": (CorruptModel, "mlp.up.*finite", lambda t: t[NAME].fill(np.nan)),
    "infinite": (CorruptModel, "final_norm.*finite", lambda t: t["model.norm.weight"].fill(np.inf)),
    "integers": (Unsupported, "I32", lambda t: t.update({NAME: t[NAME].astype(np.int32)})),
}


@pytest.mark.parametrize("name", BROKEN)
def test_missing_extra_and_broken_tensors(case: Callable[[str], Case], name: str) -> None:
    kind, match, change = BROKEN[name]
    it = case("llama")
    it.tensors(change)
    it.refuses(kind, match)


def test_truncated_and_missing_files(case: Callable[[str], Case]) -> None:
    it = case("llama")
    file = it.source / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        it.refuses(CorruptModel)
    file.unlink()
    it.refuses(NotFound, "model.safetensors")
    (it.source / "pytorch_model.bin").write_bytes(b"")
    it.refuses(Unsupported, "pickled")
    index = it.source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    it.refuses(NotFound, "00001-of-00002")
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    it.refuses(CorruptModel, "other.safetensors")
    index.write_text("[]")
    it.refuses(CorruptModel, "index")
    (it.source / "config.json").write_text("{")
    it.refuses(CorruptModel, "config.json")
    (it.source / "config.json").unlink()
    it.refuses(NotFound, "config.json")


def test_a_tokenizer_is_needed_and_has_to_fit(case: Callable[[str], Case], tmp_path: Path) -> None:
    it = case("llama")
    tiny.write_tokenizer(it.source, vocab=131)
    (it.source / "tokenizer.json").write_text("{}")
    it.refuses(CorruptModel, "tokenizer.json")
    (it.source / "tokenizer.json").unlink()
    it.refuses(NotFound, "tokenizer")
    tiny.write_tokenizer(tmp_path / "other")
    it.convert(tokenizer=tmp_path / "other")
    assert (it.out / "model" / "tokenizer.json").is_file()


def test_tokenizers_larger_than_the_embedding_are_refused(tmp_path: Path) -> None:
    tiny.tiny_llama(tmp_path / "source", vocab_size=64)
    tiny.write_tokenizer(tmp_path / "source", vocab=80)
    with pytest.raises(CorruptModel, match="80 tokens"):
        convert(tmp_path / "source", tmp_path / "model")


@pytest.mark.parametrize(
    "options", [{"weights": "w7"}, {"kv": "kv7"}, {"range_": "all"}, {"overrides": {"*": "x"}}]
)
def test_unknown_options_are_refused(case: Callable[[str], Case], options: Any) -> None:
    case("llama").refuses(InvalidArgument, **options)


def test_an_existing_destination_is_kept(case: Callable[[str], Case]) -> None:
    it = case("llama")
    (it.out / "model").mkdir()
    with pytest.raises(InvalidArgument, match="exists"):
        it.convert()
    assert list((it.out / "model").iterdir()) == []


def test_a_converted_model_is_no_checkpoint(case: Callable[[str], Case]) -> None:
    it = case("llama")
    it.convert()
    with pytest.raises(InvalidArgument, match="converted"):
        convert(it.out / "model", it.out / "again")


def test_progress_grows_to_the_end_and_stops_on_demand(case: Callable[[str], Case]) -> None:
    it = case("llama")
    steps: list[Progress] = []
    report = it.convert(progress=steps.append)
    done = [step.done_bytes for step in steps]
    assert done == sorted(done) and done[-1] == steps[-1].total_bytes
    assert report.total_bytes >= done[-1]
    shutil.rmtree(it.out / "model")

    for count in (0, 1, len(steps) // 2, len(steps) - 1, len(steps) + 1):
        asked = 0

        def enough(limit: int = count) -> bool:
            nonlocal asked
            asked += 1
            return asked > limit

        it.refuses(Cancelled, cancelled=enough)

    def interrupt(step: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        it.convert(progress=interrupt)
    assert list(it.out.iterdir()) == []


@pytest.mark.parametrize("layout", ["llama", "qwen2", "onevision", "original"])
def test_a_dry_run_says_what_a_run_does(case: Callable[[str], Case], layout: str) -> None:
    it = case(layout)
    dry = it.convert(dry_run=True)
    assert list(it.out.iterdir()) == [] and not dry.written
    real = it.convert()
    assert real.written
    assert dry.config == real.config
    assert [(entry.slot, entry.bytes) for entry in dry.linears] == [
        (entry.slot, entry.bytes) for entry in real.linears
    ]
    assert dry.vector_bytes == real.vector_bytes and dry.left_out == real.left_out
    stored = sum(entry.bytes for entry in real.linears) + real.vector_bytes
    files = sum(f.stat().st_size for f in (it.out / "model").glob("*.safetensors"))
    assert dry.total_bytes == stored <= real.total_bytes == files
    assert json.loads(json.dumps(real.to_json()))["effective_bits"] == real.effective_bits
    assert all(entry.relative_error is None for entry in dry.linears)


def test_every_left_out_tensor_has_its_reason(case: Callable[[str], Case]) -> None:
    it = case("original")
    report = it.convert(dry_run=True)
    dropped = [name for name in report.left_out if "encoder.layers.2." in name]
    assert len(dropped) == 16  # the last layer of the tower does not run
    assert all(report.left_out.values())
    assert any("post_layernorm" in name for name in report.left_out)


def test_a_zero_bias_fills_in_for_a_projector_without(tmp_path: Path) -> None:
    tiny.tiny_llava_onevision(tmp_path / "source", multimodal_projector_bias=False)
    convert(tmp_path / "source", tmp_path / "model", weights="bf16")
    from framequilt.model_directory import ModelDirectory

    bias = ModelDirectory(tmp_path / "model").vector("projector.layers.0.bias")
    assert bias.shape == (64,) and not bias.any()
