"""Checkpoints that are quantized already: codes stay as they are, bit for bit, or are refused.

The oracles are packed and dequantized in plain loops (oracles/quantized.py), GGUF blocks by the
package `gguf`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from oracles import quantized, tiny
from safetensors.torch import load_file, save_file

from framequilt.convert import convert
from framequilt.errors import CorruptModel, FramequiltError, Unsupported
from framequilt.model_directory import ModelDirectory

SIZES = {"intermediate_size": 128, "num_hidden_layers": 2}
W8A8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}

# Name -> how the checkpoint is written, and our format of its codes.
KEPT: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "awq": (quantized.write_awq, {}, "w4g32"),
    "awq-row": (quantized.write_awq, {"group": 0}, "w4row"),
    "gptq-2": (quantized.write_gptq, {"bits": 2, "symmetric": False}, "w2g32"),
    "gptq-3": (quantized.write_gptq, {"bits": 3, "symmetric": False, "group": 64}, "w3g64"),
    "gptq-3-sym": (quantized.write_gptq, {"bits": 3}, "w3g32-sym"),
    "gptq-4": (quantized.write_gptq, {"symmetric": False}, "w4g32"),
    "gptq-4-sym": (quantized.write_gptq, {}, "w4g32-sym"),
    "gptq-4-v2": (quantized.write_gptq, {"symmetric": False, "version": 2}, "w4g32"),
    "gptq-8": (quantized.write_gptq, {"bits": 8, "group": 0, "symmetric": False}, "w8row"),
    "gptq-8-sym": (quantized.write_gptq, {"bits": 8, "group": 16}, "w8g16-sym"),
    "packed-4": (quantized.write_compressed, {}, "w4g32-sym"),
    "packed-4-asym": (quantized.write_compressed, {"symmetric": False}, "w4g32"),
    "packed-4-channel": (quantized.write_compressed, {"group": 0}, "w4row-sym"),
    "packed-3-asym": (quantized.write_compressed, {"bits": 3, "symmetric": False}, "w3g32"),
    "packed-7": (quantized.write_compressed, {"bits": 7}, "w8g32-sym"),
    "packed-8": (quantized.write_compressed, {"bits": 8, "group": 64}, "w8g64-sym"),
    "packed-f32": (quantized.write_compressed, {"scale": np.float32}, "w4g32-sym-f32scale"),
    "int-8": (
        quantized.write_compressed,
        {"bits": 8, "group": 0, "form": "int-quantized", "inputs": W8A8},
        "w8row-sym",
    ),
    "int-8-asym": (
        quantized.write_compressed,
        {"bits": 8, "group": 0, "form": "naive-quantized", "symmetric": False},
        "w8row",
    ),
}

EXACT = {"decoder.embedding": "f32", "decoder.head": "f32"}


def slot_of(name: str) -> str:
    """Ours from "model.layers.0.self_attn.q_proj.weight"."""
    _, _, layer, block, module, _ = name.split(".")
    kind = {"self_attn": "attention", "mlp": "mlp"}[block]
    return f"decoder.layers.{layer}.{kind}.{module.removesuffix('_proj')}"


def make(path: Path, name: str) -> tuple[Any, dict[str, Any], str]:
    writer, options, form = KEPT[name]
    model = tiny.tiny_llama(path, seed=7, bf16=False, **SIZES)
    return model, writer(path, model, **options), form


@pytest.mark.parametrize("name", KEPT)
def test_codes_stay_as_they_are(tmp_path: Path, name: str) -> None:
    _, weights, form = make(tmp_path / "src", name)
    report = convert(tmp_path / "src", tmp_path / "model", overrides=EXACT)
    directory = ModelDirectory(tmp_path / "model")
    assert len(weights) == 14
    for source, expected in weights.items():
        slot = slot_of(source)
        assert directory.format_of(slot).name == form
        assert (directory.linear(slot) == expected).all(), slot
    assert report.weights.startswith("keep,")
    assert any("14 x" in note and f"as {form}" in note for note in report.notes)
    kept = [entry for entry in report.linears if entry.codes_kept]
    assert len(kept) == 14 and all(entry.relative_error == 0 for entry in kept)
    assert directory.config["source"]["quantization"]
    asked = {"bits": 8, "symmetric": True} if "inputs" in KEPT[name][1] else None
    for slot, entry in directory.config["linears"].items():
        assert entry.get("activations") == (asked if ".layers." in slot else None)


def test_another_format_quantizes_anew_and_says_so(tmp_path: Path) -> None:
    _, weights, _ = make(tmp_path / "src", "awq")
    report = convert(tmp_path / "src", tmp_path / "model", weights="w8g32", overrides=EXACT)
    assert any("quantized again" in note and "14 x AWQ to w8g32" in note for note in report.notes)
    directory = ModelDirectory(tmp_path / "model")
    for source, expected in weights.items():
        found = directory.linear(slot_of(source))
        assert 0 < np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    some = convert(tmp_path / "src", tmp_path / "some", weights="keep,layers.0.*=w8g64")
    formats = {entry.slot: entry.format for entry in some.linears}
    assert formats["decoder.layers.0.mlp.up"] == "w8g64"
    assert formats["decoder.layers.1.mlp.up"] == "w4g32"
    assert formats["decoder.embedding"] == "w8g128"  # not quantized in the checkpoint


def test_the_same_format_is_the_same_codes(tmp_path: Path) -> None:
    _, weights, form = make(tmp_path / "src", "awq")
    report = convert(tmp_path / "src", tmp_path / "model", weights=form)
    assert sum(entry.codes_kept for entry in report.linears) == 14
    directory = ModelDirectory(tmp_path / "model")
    for source, expected in weights.items():
        assert (directory.linear(slot_of(source)) == expected).all()


def test_asking_for_activations_replaces_those_of_the_checkpoint(tmp_path: Path) -> None:
    make(tmp_path / "src", "int-8")
    report = convert(tmp_path / "src", tmp_path / "model", activations="a4,layers.1.*=a16")
    found = {entry.slot: entry.activations for entry in report.linears}
    assert found["decoder.layers.0.mlp.up"] == "a4" and found["decoder.layers.1.mlp.up"] == "a16"
    plain = convert(tmp_path / "src", tmp_path / "other", weights="w8g32", dry_run=True)
    assert {entry.activations for entry in plain.linears} == {"a16"}


@pytest.mark.parametrize("symmetric", [True, False])
def test_activation_order_is_folded_away_where_it_can_be(tmp_path: Path, symmetric: bool) -> None:
    """Down projections keep their codes: the outputs that feed them move along. The others are
    quantized anew, from the exact float32 values."""
    model = tiny.tiny_llama(tmp_path / "src", seed=8, bf16=False, mlp_bias=True, **SIZES)
    weights = quantized.write_gptq(tmp_path / "src", model, symmetric=symmetric, act_order=5)
    changed = {**EXACT, "*.attention.*": "f32", "*.mlp.gate": "f32", "*.mlp.up": "f32"}
    report = convert(tmp_path / "src", tmp_path / "model", overrides=changed)
    directory = ModelDirectory(tmp_path / "model")
    state = model.state_dict()
    for layer in range(2):
        at, body = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        assert directory.format_of(at + "mlp.down").name == "w4g32" + "-sym" * symmetric
        stored = load_file(tmp_path / "src" / "model.safetensors")
        order = np.argsort(stored[body + "mlp.down_proj.g_idx"].numpy(), kind="stable")
        expected = weights[body + "mlp.down_proj.weight"][:, order]
        assert (directory.linear(at + "mlp.down") == expected).all()
        for part in ("gate", "up"):
            expected = weights[body + f"mlp.{part}_proj.weight"][order]
            assert (directory.linear(at + f"mlp.{part}") == expected).all()
            bias = state[body + f"mlp.{part}_proj.bias"].numpy()[order]
            assert (directory.vector(at + f"mlp.{part}.bias") == bias).all()
        for part in "qkvo":
            expected = weights[body + f"self_attn.{part}_proj.weight"]
            assert (directory.linear(at + f"attention.{part}") == expected).all()
    assert any("down projections" in note for note in report.notes)
    assert any("activation order" in note and "2 x q_proj" in note for note in report.notes)


def test_a_trivial_group_index_is_no_activation_order(tmp_path: Path) -> None:
    model = tiny.tiny_llama(tmp_path / "src", seed=8, bf16=False, **SIZES)
    quantized.write_gptq(tmp_path / "src", model, desc_act=True)  # static groups
    report = convert(tmp_path / "src", tmp_path / "model", dry_run=True)
    assert sum(entry.codes_kept for entry in report.linears) == 14
    assert not any("activation order" in note for note in report.notes)


def test_large_groups_become_several_equal_ones(tmp_path: Path) -> None:
    model = tiny.tiny_llama(
        tmp_path / "src", seed=9, bf16=False, **{**SIZES, "intermediate_size": 640}
    )
    weights = quantized.write_gptq(tmp_path / "src", model, group=256, symmetric=False)
    convert(tmp_path / "src", tmp_path / "model", overrides=EXACT)
    directory = ModelDirectory(tmp_path / "model")
    down = "decoder.layers.1.mlp.down"  # 640 inputs: groups of 256, 256 and 128
    assert directory.format_of(down).name == "w4g128"
    assert directory.format_of("decoder.layers.1.mlp.up").name == "w4row"
    for source, expected in weights.items():
        assert (directory.linear(slot_of(source)) == expected).all()


def test_older_packing_with_gaps_is_read(tmp_path: Path) -> None:
    """Ten codes of 3 bits in a word, two bits unused."""
    model = tiny.tiny_llama(tmp_path / "src", seed=9, bf16=False, **SIZES)
    weights = quantized.write_compressed(tmp_path / "src", model, bits=3)
    file = tmp_path / "src" / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("weight_packed")]:
        out, inputs = (int(n) for n in tensors[name.replace("packed", "shape")])
        dense = tensors[name].numpy().view(np.uint32)
        packed = np.zeros((out, -(-inputs // 10)), np.int64)
        for row in range(out):
            number = sum(int(word) << (32 * k) for k, word in enumerate(dense[row]))
            for k in range(inputs):
                packed[row, k // 10] |= (number >> (3 * k) & 7) << (3 * (k % 10))
        tensors[name] = quantized.words(packed)
    save_file(tensors, file)
    convert(tmp_path / "src", tmp_path / "model", overrides=EXACT)
    directory = ModelDirectory(tmp_path / "model")
    for source, expected in weights.items():
        assert (directory.linear(slot_of(source)) == expected).all()


def test_the_compressed_tensors_package_agrees(tmp_path: Path) -> None:
    package = pytest.importorskip("compressed_tensors.compressors", reason="no compressed-tensors")
    values = np.random.default_rng(3).integers(-8, 8, (5, 77))
    for bits in (3, 4, 5, 8):
        signed = np.clip(values, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        for axis in (0, 1):
            theirs = package.pack_to_int32(torch.from_numpy(signed.astype(np.int8)), bits, axis)
            rows = signed + 2 ** (bits - 1)
            ours = quantized.stream_rows(rows if axis else rows.T, bits)
            assert (theirs == quantized.words(ours if axis else ours.T)).all()


def test_the_tensor_strategy_is_one_scale_for_all_rows(tmp_path: Path) -> None:
    model = tiny.tiny_llama(tmp_path / "src", bf16=False, **SIZES)
    quantized.write_compressed(tmp_path / "src", model, bits=8, group=0, form="int-quantized")
    file = tmp_path / "src" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight_scale"] = torch.tensor([0.0625], dtype=torch.float16)
    tensors[f"{name}.input_scale"] = torch.tensor([0.5])
    save_file(tensors, file)
    report = convert(tmp_path / "src", tmp_path / "model")
    found = ModelDirectory(tmp_path / "model").linear("decoder.layers.0.mlp.up")
    assert (found == tensors[f"{name}.weight"].numpy().astype(np.float32) * 0.0625).all()
    assert any("input_scale" in note for note in report.notes)


# Hostile input ------------------------------------------------------------------------------------


def damaged(path: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    make(path, name)
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


Q = "model.layers.0.self_attn.q_proj"


def narrowed(tensors: dict[str, Any], out: int) -> None:
    """The linear Q with fewer outputs, in itself consistent."""
    for part, columns in (("qweight", out // 8), ("qzeros", out // 8), ("scales", out)):
        tensors[f"{Q}.{part}"] = tensors[f"{Q}.{part}"][:, :columns].contiguous()


DAMAGED: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "awq without zeros": ("awq", lambda t: t.pop(f"{Q}.qzeros"), "qzeros is missing"),
    "awq without scales": ("awq", lambda t: t.pop(f"{Q}.scales"), "scales is missing"),
    "awq with short zeros": (
        "awq", lambda t: t.update({f"{Q}.qzeros": t[f"{Q}.qzeros"][:1]}), "shape"),
    "awq with float codes": (
        "awq", lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].float()}), "F32, not I32"),
    "awq with flat codes": (
        "awq", lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].reshape(-1)}), "dimensions"),
    "awq of another width": ("awq", lambda t: narrowed(t, 32), "needs"),
    "gptq without zeros": ("gptq-4", lambda t: t.pop(f"{Q}.qzeros"), "qzeros is missing"),
    "gptq with a group too many": (
        "gptq-4", lambda t: t[f"{Q}.g_idx"].fill_(2), "not in 0..1"),
    "gptq with a negative group": (
        "gptq-4", lambda t: t[f"{Q}.g_idx"][:1].fill_(-5), "not in 0..1"),
    "gptq with a short index": (
        "gptq-4", lambda t: t.update({f"{Q}.g_idx": t[f"{Q}.g_idx"][:9]}), "shape"),
    "gptq with an infinite scale": (
        "gptq-4", lambda t: t[f"{Q}.scales"].fill_(float("inf")), "finite"),
    "gptq without codes": (
        "gptq-4", lambda t: [t.pop(n) for n in list(t) if n.endswith("qweight")], "no qweight"),
    "packed without a shape": (
        "packed-4", lambda t: t.pop(f"{Q}.weight_shape"), "weight_shape is missing"),
    "packed with a large shape": (
        "packed-4", lambda t: t[f"{Q}.weight_shape"].fill_(2**40), "shape"),
    "packed with other codes": (
        "packed-4",
        lambda t: t.update({f"{Q}.weight_packed": t[f"{Q}.weight_packed"][:, :3].contiguous()}),
        "codes of 4 bits"),
    "packed without scales": (
        "packed-4", lambda t: t.pop(f"{Q}.weight_scale"), "weight_scale is missing"),
    "int8 with float codes": (
        "int-8", lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].float()}), "F32, not I8"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_checkpoints_are_refused(tmp_path: Path, name: str) -> None:
    kind, change, message = DAMAGED[name]
    damaged(tmp_path / "src", kind, change)
    with pytest.raises(CorruptModel, match=message):
        convert(tmp_path / "src", tmp_path / "out" / "model")
    assert not (tmp_path / "out").exists()


def weights_of(settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = settings["config_groups"]["group_0"]["weights"]
    return found


SETTINGS: dict[str, tuple[str, Callable[[dict[str, Any]], object], type[FramequiltError]]] = {
    "an unknown method": ("awq", lambda s: s.update(quant_method="bitsandbytes"), Unsupported),
    "no method": ("awq", lambda s: s.pop("quant_method"), Unsupported),
    "a list as method": ("awq", lambda s: s.update(quant_method=["awq"]), Unsupported),
    "awq for another kernel": ("awq", lambda s: s.update(version="gemv"), Unsupported),
    "awq in 3 bits": ("awq", lambda s: s.update(bits=3), Unsupported),
    "awq without zeros": ("awq", lambda s: s.update(zero_point=False), Unsupported),
    "awq in groups of 0": ("awq", lambda s: s.update(group_size=0), CorruptModel),
    "awq in groups of 48": ("awq", lambda s: s.update(group_size=48), CorruptModel),
    "awq in groups of text": ("awq", lambda s: s.update(group_size="32"), CorruptModel),
    "gptq in 5 bits": ("gptq-4", lambda s: s.update(bits=5), Unsupported),
    "gptq for another kernel": (
        "gptq-4", lambda s: s.update(checkpoint_format="marlin"), Unsupported),
    "gptq with exceptions": (
        "gptq-4", lambda s: s.update(dynamic={"+:.*down.*": {"bits": 8}}), Unsupported),
    "packed floats": ("packed-4", lambda s: s.update(format="float-quantized"), Unsupported),
    "float weights": ("packed-4", lambda s: weights_of(s).update(type="float"), Unsupported),
    "blocks": ("packed-4", lambda s: weights_of(s).update(strategy="block"), Unsupported),
    "sparsity": (
        "packed-4", lambda s: s.update(sparsity_config={"format": "sparse-24-bitmask"}),
        Unsupported),
    "rotations": (
        "packed-4", lambda s: s.update(transform_config={"config_groups": {"u": {}}}), Unsupported),
    "no groups": ("packed-4", lambda s: s.pop("config_groups"), CorruptModel),
    "a group that names nothing": (
        "packed-4",
        lambda s: s["config_groups"]["group_0"].update(targets=["re:.*nothing"]), CorruptModel),
    "a broken pattern": (
        "packed-4", lambda s: s["config_groups"]["group_0"].update(targets=["re:("]), CorruptModel),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_not_understood_are_refused(tmp_path: Path, name: str) -> None:
    kind, change, error = SETTINGS[name]
    make(tmp_path / "src", kind)
    file = tmp_path / "src" / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))
    with pytest.raises(error) as caught:
        convert(tmp_path / "src", tmp_path / "out" / "model")
    assert caught.value.hint or error is CorruptModel
    assert not (tmp_path / "out").exists()


JUNK: list[Any] = [None, -1, 0, 3, 7, 10**12, 0.5, "x", "", True, [], {}, [1], {"a": 1}]


def shuffled(settings: dict[str, Any], random: Any) -> None:
    """Replaces or removes one value anywhere in the settings."""
    at = settings
    while True:
        key = random.choice(list(at))
        if isinstance(at[key], dict) and at[key] and random.random() < 0.7:
            at = at[key]
            continue
        if random.random() < 0.2:
            del at[key]
        else:
            at[key] = random.choice(JUNK)
        return


def broken(tensors: dict[str, Any], random: Any) -> None:
    """Damages one of the tensors of a quantized linear."""
    name = random.choice([name for name in tensors if "_proj." in name])
    tensor = tensors[name]
    kind = random.randrange(5)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name] = tensor[: random.randrange(len(tensor))].contiguous()
    elif kind == 2:
        tensors[name] = tensor.reshape(-1)
    elif kind == 3:
        tensors[name] = tensor.to(random.choice([torch.int64, torch.float16, torch.int8]))
    else:
        value = random.choice([-(2**31), -1, 2**31 - 1, 0, 100])
        small = max(-128, min(value, 127))
        tensors[name] = torch.full_like(tensor, small if tensor.itemsize < 4 else value)


@pytest.mark.parametrize("name", ["awq", "gptq-3", "packed-4-asym", "int-8-asym"])
def test_random_damage_gives_our_errors_or_a_model(tmp_path: Path, name: str) -> None:
    import random as randomness
    import shutil

    random = randomness.Random(name)
    make(tmp_path / "src", name)
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    tensors = load_file(tmp_path / "src" / "model.safetensors")
    refused = 0
    for _ in range(60):
        settings = json.loads(json.dumps(config))
        changed = dict(tensors)
        if random.random() < 0.5:
            shuffled(settings["quantization_config"], random)
        else:
            broken(changed, random)
        (tmp_path / "src" / "config.json").write_text(json.dumps(settings))
        save_file(changed, tmp_path / "src" / "model.safetensors")
        try:
            convert(tmp_path / "src", tmp_path / "out" / "model")
            shutil.rmtree(tmp_path / "out" / "model")
        except FramequiltError:
            refused += 1
            assert not list((tmp_path / "out").glob("*"))
    assert 20 < refused < 60
