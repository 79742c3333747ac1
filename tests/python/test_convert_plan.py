"""What takes part in a conversion besides the checkpoint: methods, presets, schemes, reports."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("torch")
pytest.importorskip("transformers")

from oracles import tiny
from typer.testing import CliRunner

from framequilt.cli.app import app
from framequilt.convert import convert
from framequilt.convert.coded import ArrayCodes, ArrayTensor
from framequilt.convert.plan import Plan
from framequilt.convert.presets import PRESETS
from framequilt.convert.sources import SourceTensor
from framequilt.errors import Cancelled, InvalidArgument
from framequilt.model_directory import ModelDirectory
from framequilt.quantize import dequantize, parse_format, quantize_as

UP = "decoder.layers.1.mlp.up"
DOWN = "decoder.layers.1.mlp.down"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "llama"
    tiny.tiny_llama(path, seed=1, bf16=False)
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "video"
    tiny.tiny_llava_onevision(path, seed=2, bf16=False)
    return path


class Folded:
    """Folds 2 out of a norm into a linear, and quantizes another linear itself."""

    name = "folded (2)"

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.seen: list[str] = []

    def transform(self, plan: Plan, check: Callable[[], None]) -> Mapping[str, SourceTensor]:
        check()
        self.seen = plan.linears()
        self.notes.append("everything twice")
        norm = "decoder.layers.1.mlp_norm.weight"
        result: dict[str, SourceTensor] = {}
        vector = plan.tensor(norm)
        assert vector is not None
        result[norm] = ArrayTensor(norm, vector.all() / 2)
        for part in ("gate", "up"):
            target = f"decoder.layers.1.mlp.{part}.weight"
            weight = plan.tensor(target)
            assert weight is not None
            result[target] = ArrayTensor(target, weight.all() * 2)
        linear = plan.linear(DOWN)
        assert linear.form.name == "w4g32" and linear.coded is None and linear.source is not None
        form = parse_format("w3g16-f32scale")
        coded = quantize_as(linear.source.all(), form)
        result[f"{DOWN}.weight"] = ArrayCodes(DOWN, coded, form, linear.source)
        return result


def test_a_method_replaces_weights_norms_and_codes(llama: Path, tmp_path: Path) -> None:
    method = Folded()
    report = convert(llama, tmp_path / "model", weights="w4g32", method=method)
    convert(llama, tmp_path / "plain", weights="w4g32")
    exact = convert(llama, tmp_path / "exact", weights="f32")
    made, plain, whole = (ModelDirectory(tmp_path / p) for p in ("model", "plain", "exact"))
    assert len(method.seen) == len(exact.linears)
    norm = "decoder.layers.1.mlp_norm.weight"
    assert (made.vector(norm) == plain.vector(norm) / 2).all()
    # Powers of two pass through scales: the codes are those of the plain weight.
    assert (made.linear(UP) == plain.linear(UP) * 2).all()
    assert made.format_of(DOWN).name == "w3g16-f32scale"
    coded = quantize_as(whole.linear(DOWN), parse_format("w3g16-f32scale"))
    assert (made.linear(DOWN) == dequantize(coded)).all()
    same = "decoder.layers.0.mlp.down"
    assert (made.linear(same) == plain.linear(same)).all()
    assert made.config["source"]["method"] == "folded (2)" and "everything twice" in report.notes
    entry = next(linear for linear in report.linears if linear.slot == DOWN)
    lost = np.linalg.norm(dequantize(coded) - whole.linear(DOWN))
    assert entry.codes_kept and entry.relative_error == pytest.approx(
        lost / np.linalg.norm(whole.linear(DOWN)), rel=1e-5
    )


class Returns:
    """Returns what it is given."""

    name = "returns"
    notes: list[str] = []

    def __init__(self, tensors: dict[str, SourceTensor]) -> None:
        self.tensors = tensors

    def transform(self, plan: Plan, check: Callable[[], None]) -> Mapping[str, SourceTensor]:
        check()
        return self.tensors


def test_what_a_method_may_not_return_is_refused(llama: Path, tmp_path: Path) -> None:
    small = ArrayTensor("x", np.zeros((4, 4), np.float32))
    form = parse_format("w4g32")
    codes = ArrayCodes("x", quantize_as(np.zeros((1, 64), np.float32), form), form)
    for target, tensor, message in [
        ("decoder.layers.9.mlp.up.weight", small, "has no"),
        (f"{UP}.weight", small, "needs"),
        ("decoder.layers.1.mlp_norm.weight", codes, "needs"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            convert(llama, tmp_path / "out" / "model", method=Returns({target: tensor}))
        assert not (tmp_path / "out").exists()
    with pytest.raises(InvalidArgument, match="not in the format"):
        ArrayCodes("x", quantize_as(np.zeros((1, 64), np.float32), form), parse_format("w4g64"))


def test_a_dry_run_does_not_calibrate_and_cancelling_ends_it(llama: Path, tmp_path: Path) -> None:
    method = Folded()
    report = convert(llama, tmp_path / "model", method=method, dry_run=True)
    assert not method.seen and report.config["source"]["method"] == "folded (2)"
    with pytest.raises(Cancelled):
        convert(llama, tmp_path / "model", method=method, cancelled=lambda: True)
    assert not method.seen and not (tmp_path / "model").exists()


# Schemes ------------------------------------------------------------------------------------------


def test_a_pattern_that_matches_nothing_lists_the_slots(llama: Path, tmp_path: Path) -> None:
    for options in (
        {"weights": "w4g128,layers.3.*=w8"},
        {"weights": "w4g128,vision.*=w8"},
        {"activations": "a8,vision.*=a16"},
        {"overrides": {"decoder.layer.*": "w8"}},
    ):
        with pytest.raises(InvalidArgument, match=r"decoder\.layers\.0-2\.mlp\.gate"):
            convert(llama, tmp_path / "model", **options)


def test_formats_and_activations_are_recorded_linear_by_linear(video: Path, tmp_path: Path) -> None:
    weights = "w3g16,vision.*=w8row-sym,projector.*=bf16,layers.2.*=w5g32-offset,lm_head=w6"
    convert(video, tmp_path / "model", weights=weights, activations="a8,layers.0.*=a4-asym")
    directory = ModelDirectory(tmp_path / "model")
    found = {
        slot: (
            directory.format_of(slot).name,
            None if (form := directory.activations_of(slot)) is None else form.name,
        )
        for slot in directory.config["linears"]
    }
    assert found["vision.layers.1.mlp.up"] == ("w8row-sym", "a8")
    assert found["vision.patch_embedding"] == ("w8row-sym", "a8")
    assert found["projector.layers.1"] == ("bf16", None)  # there are no codes to multiply
    assert found["decoder.layers.0.attention.v"] == ("w3g16", "a4-asym")
    assert found["decoder.layers.1.attention.v"] == ("w3g16", "a8")
    assert found["decoder.layers.2.mlp.down"] == ("w5g32-offset", "a8")
    assert found["decoder.head"] == ("w6g128", None)
    assert found["decoder.embedding"] == ("w8g16", None)
    config = directory.config
    assert config["source"]["activations"] == "a8,layers.0.*=a4-asym"
    assert config["weights"].startswith("w3g16,vision.*=w8row-sym")
    assert "activations" not in config["linears"]["decoder.head"]


def test_the_last_layer_may_be_named_from_the_end(video: Path, tmp_path: Path) -> None:
    report = convert(video, tmp_path / "m", weights="w4,layers.-1.*=w8,vision.layers.-1.*=w2",
                     activations="a8,layers.-1.*=a16", dry_run=True)  # fmt: skip
    found = {entry.slot: (entry.format, entry.activations) for entry in report.linears}
    assert found["decoder.layers.2.mlp.up"] == ("w8g128", "a16")
    assert found["decoder.layers.1.mlp.up"] == ("w4g128", "a8")
    assert found["vision.layers.2.mlp.up"] == ("w2g128", "a8")
    assert found["vision.layers.1.mlp.up"] == ("w8g128", "a8")
    assert report.weights == "w4g128,layers.-1.*=w8g128,vision.layers.-1.*=w2g128"


def test_activations_asked_for_where_there_are_no_codes_are_refused(
    llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument, match="bf16 weights"):
        convert(llama, tmp_path / "m", weights="w4,layers.0.*=bf16", activations="layers.0.*=a8")
    report = convert(llama, tmp_path / "m", weights="bf16", activations="a8", dry_run=True)
    assert {entry.activations for entry in report.linears} == {"a16"}


def test_rounded_inputs_are_for_all_but_float32_weights(llama: Path, tmp_path: Path) -> None:
    mixed = "bf16,layers.0.*=w4,layers.1.*=f32"
    report = convert(llama, tmp_path / "m", weights=mixed, activations="abf16")
    directory = ModelDirectory(tmp_path / "m", verify=True)
    for entry in report.linears:
        inputs = "a16" if entry.format == "f32" or "layers" not in entry.slot else "abf16"
        assert entry.activations == inputs, entry.slot
        stored = directory.config["linears"][entry.slot].get("activations")
        assert stored == (None if inputs == "a16" else {"kind": "bf16"})
    assert not any(name.endswith(".row_sums") for name in directory.tensors)
    with pytest.raises(InvalidArgument, match="f32 weights, which take no abf16 inputs") as refused:
        convert(llama, tmp_path / "n", weights=mixed, activations="layers.1.*=abf16")
    assert "bf16 weights" in str(refused.value.hint)


def test_widths_that_a_group_does_not_divide_are_reported(llama: Path, tmp_path: Path) -> None:
    report = convert(llama, tmp_path / "model", weights="w4g32", dry_run=True)
    assert any("112 inputs" in note and "16 wide" in note for note in report.notes)
    assert not convert(llama, tmp_path / "model", weights="w4g16", dry_run=True).notes


def test_effective_bits_count_codes_scales_and_zeros(llama: Path, tmp_path: Path) -> None:
    """64 inputs, rows in whole tiles: nothing is padding."""
    for weights, bits in [
        ("w4g16", 4 + (16 + 8) / 16),
        ("w3g32-sym", 3 + 16 / 32),
        ("w2g16-offset-f32scale", 2 + 64 / 16),
        ("w4g32-offset-i8scale", 4 + 16 / 32 + 32 / 64),  # a step of 64 inputs instead of 256
        ("w6row", 6 + 24 / 64),
    ]:
        report = convert(llama, tmp_path / "model", weights=weights, dry_run=True)
        found = {entry.slot: entry.effective_bits for entry in report.linears}
        assert found["decoder.layers.0.attention.q"] == bits


def test_errors_are_reported_by_part(video: Path, tmp_path: Path) -> None:
    report = convert(video, tmp_path / "model", weights="w4g32,vision.*=w2g32,lm_head=f32")
    parts = {part.part: part for part in report.parts()}
    assert list(parts) == ["vision", "projector", "embedding", "decoder layers", "head"]
    exact = convert(video, tmp_path / "exact", weights="f32")
    made, whole = ModelDirectory(tmp_path / "model"), ModelDirectory(tmp_path / "exact")
    lost = total = 0.0
    for entry in exact.linears:
        if entry.slot.startswith("decoder.layers."):
            weight = whole.linear(entry.slot).astype(np.float64)
            lost += ((made.linear(entry.slot) - weight) ** 2).sum()
            total += (weight**2).sum()
    assert parts["decoder layers"].relative_error == pytest.approx(
        math.sqrt(lost / total), rel=1e-5
    )
    assert parts["head"].relative_error == 0 and (parts["vision"].relative_error or 0) > 0.2
    assert sum(part.bytes for part in parts.values()) == sum(e.bytes for e in report.linears)
    assert [part["part"] for part in report.to_json()["parts"]] == list(parts)
    dry = convert(video, tmp_path / "dry", dry_run=True)
    assert all(part.relative_error is None for part in dry.parts())


def test_row_sums_are_where_inputs_have_a_zero_and_are_counted(llama: Path, tmp_path: Path) -> None:
    wanted = "a8-asym,layers.0.*=a8,layers.1.mlp.up=a16,lm_head=a4-asym"
    report = convert(llama, tmp_path / "model", weights="w4g32", activations=wanted)
    directory = ModelDirectory(tmp_path / "model", verify=True)
    bytes_of = {entry.slot: entry.bytes for entry in report.linears}
    for slot in directory.config["linears"]:
        inputs = directory.activations_of(slot)
        tensors = [t for name, t in directory.tensors.items() if name.rpartition(".")[0] == slot]
        sums = f"{slot}.row_sums" in directory.tensors
        assert sums == (inputs is not None and not inputs.symmetric)
        size = sum(tensor.data.nbytes for tensor in tensors)  # this checkpoint has no biases
        assert bytes_of[slot] == directory.linear_bytes(slot) == size
    assert f"{DOWN}.row_sums" in directory.tensors
    assert "decoder.head.row_sums" in directory.tensors
    assert f"{UP}.row_sums" not in directory.tensors
    dry = convert(llama, tmp_path / "dry", weights="w4g32", activations=wanted, dry_run=True)
    assert {entry.slot: entry.bytes for entry in dry.linears} == bytes_of


# Presets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_models_with_and_without_a_tower(
    llama: Path, video: Path, tmp_path: Path, name: str
) -> None:
    preset = PRESETS[name]
    for source in (llama, video):
        report = convert(source, tmp_path / "model", preset=name, dry_run=True)
        assert report.kv == report.config["defaults"]["kv"] == preset.kv
        assert report.config["source"]["preset"] == preset.summary
        assert report.weights == preset.weights
        assert len({entry.format for entry in report.linears}) > 1 or name == "exact"


def test_presets_are_what_they_say(llama: Path, tmp_path: Path) -> None:
    sizes = {
        name: convert(llama, tmp_path / "m", preset=name, dry_run=True).effective_bits
        for name in PRESETS
    }
    assert sizes["small"] < sizes["fast"] < sizes["exact"]
    fast = convert(llama, tmp_path / "fast", preset="fast")
    assert fast.kv == "kv8"
    activations = {entry.slot: entry.activations for entry in fast.linears}
    assert activations[UP] == "a8-asym" and activations["decoder.head"] == "a16"
    assert f"{UP}.row_sums" in ModelDirectory(tmp_path / "fast").tensors
    other = convert(llama, tmp_path / "m", preset="fast", weights="w8", activations="a16", kv="kv4",
                    dry_run=True)  # fmt: skip
    assert (other.weights, other.activations, other.kv) == ("w8g128", "a16", "kv4")
    with pytest.raises(InvalidArgument, match="known: fast, small, exact"):
        convert(llama, tmp_path / "m", preset="best")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_commands_explain_the_choice(llama: Path, tmp_path: Path) -> None:
    listed = " ".join(run("convert", "--list-presets").split())
    for preset in PRESETS.values():
        assert preset.name in listed and preset.kv in listed
    made = run("convert", str(llama), str(tmp_path / "m"), "--preset", "fast", "--activations",
               "a8,lm_head=a8")  # fmt: skip
    assert "a8,lm_head=a8" in made and "decoder layers" in made
    shown = run("inspect", str(tmp_path / "m"))
    assert "fast: w4g128, a8-asym,attention=a8, kv8" in shown and "need not be symmetric" in shown
    assert "w4g128 a8" in shown and "bits each" in shown
    record = json.loads(run("inspect", str(tmp_path / "m"), "--json"))
    assert record["formats"]["w4g128 a8"]["linears"] == 21
    assert record["formats"]["w8g128 a8"]["linears"] == 1  # the head
    assert record["activations"] == "a8,lm_head=a8"
    assert record["source"]["preset"] == PRESETS["fast"].summary


def test_json_of_a_conversion_has_parts(llama: Path, tmp_path: Path) -> None:
    record: dict[str, Any] = json.loads(
        run("convert", str(llama), str(tmp_path / "m"), "--weights", "w4,head=bf16", "--json")
    )
    assert {part["part"] for part in record["parts"]} == {"embedding", "decoder layers", "head"}
    assert record["weights"] == "w4g128,head=bf16"
