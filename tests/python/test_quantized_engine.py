"""Quantized weights and activations as the engine runs them.

Two oracles: the published reference's own logits for its tiny models, and transformers on weights
that were dequantized with the converter's numbers.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from oracles import tiny
from oracles.native import NativeEngine
from oracles.shared import manifest, shared
from safetensors.numpy import load_file

from framequilt.convert import convert
from framequilt.model_directory import ModelDirectory

GOLDEN = ("golden", "quantization")
TABLES = {"decoder.embedding": "f32", "decoder.head": "f32"}


def golden_settings() -> list[tuple[str, str]]:
    """Family and setting of every golden with weights and activations only, of known families."""
    settings = ("fp", "W8", "W6", "W4", "W3", "W2", "W8A8", "W6A6", "W4A8", "W4A4")
    return [(family, setting) for family in ("llama",) for setting in settings]


@pytest.mark.parametrize(("family", "setting"), golden_settings())
def test_logits_equal_the_reference_implementation(
    tmp_path: Path, family: str, setting: str
) -> None:
    """The published quantizer (groups of 32, its own range), per-token asymmetric activations."""
    source = shared(*GOLDEN, "tiny_models", family)
    about = manifest(*GOLDEN)["tiny_models"]["families"][family]["settings"].get(setting)
    if about is None:
        pytest.skip(f"no golden {setting} for {family}")
    golden = load_file(str(source / "golden.safetensors"))
    tiny.write_tokenizer(tmp_path / "tokenizer", 128)
    bits, inputs = about.get("w_bit"), about.get("a_bit")
    convert(
        source,
        tmp_path / "model",
        weights="f32" if bits is None else f"w{bits}g32-f32scale",
        overrides=TABLES,
        range_="reference",
        tokenizer=tmp_path / "tokenizer",
        kv="kv16",
    )
    engine = NativeEngine(
        tmp_path / "model", kv="kv32", activations="" if inputs is None else f"a{inputs}-asym"
    )
    answer = engine.run(golden["input_ids"].tolist(), return_prompt_logits=True)
    assert answer.error is None
    got, want = answer.prompt_logits, golden[f"{setting}.logits"]
    assert got is not None
    if inputs is None:
        # Codes are equal bit by bit (C++ and Python tests say so), so only float32 sums differ.
        assert np.abs(got - want).max() <= 2e-3 * np.abs(want).max()
    else:
        # A row's scale may differ in its last bit, and one code in thousands then flips.
        assert np.linalg.norm(got - want) <= 2e-2 * np.linalg.norm(want)


def dequantized(model: Any, directory: Path) -> Any:
    """`model` with the weights that the model directory holds."""
    stored = ModelDirectory(directory)
    names = {
        "self_attn.q_proj": "attention.q", "self_attn.k_proj": "attention.k",
        "self_attn.v_proj": "attention.v", "self_attn.o_proj": "attention.o",
        "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down",
    }  # fmt: skip
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            for ours, slot in names.items():
                weight = stored.linear(f"decoder.layers.{index}.{slot}")
                layer.get_submodule(ours).weight.copy_(torch.from_numpy(weight))
    return model


def quantizing(model: Any, bits: int, symmetric: bool) -> Any:
    """Makes every linear but the head quantize its inputs as the contract says, in float32."""

    def rounded(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].float()
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        half = 2 ** (bits - 1)
        if symmetric:
            scale = torch.maximum(-low, high).clamp(min=1e-5) / (half - 1)
            q = (x / scale).round().clamp(-half, half - 1)
        else:
            scale = (high - low).clamp(min=1e-5) / (2 * half - 1)
            zero = (-(low / scale).round()).clamp(0, 2 * half - 1)
            q = ((x / scale).round() + zero).clamp(0, 2 * half - 1) - zero
        return ((q * scale).to(args[0].dtype), *args[1:])

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            module.register_forward_pre_hook(rounded)
    return model


FORMATS = ("w2g16", "w3g32-sym", "w4g32-offset", "w4g128", "w5g64", "w6row", "w8row-sym")


@pytest.mark.parametrize("activations", ["a16", "a8", "a4", "a8-asym"])
@pytest.mark.parametrize("weights", FORMATS)
def test_logits_equal_transformers_with_the_same_codes(
    tmp_path: Path, weights: str, activations: str
) -> None:
    model = tiny.tiny_qwen2(tmp_path / "src", seed=5)
    convert(tmp_path / "src", tmp_path / "model", weights=weights, overrides=TABLES, kv="kv16")
    exact = dequantized(model, tmp_path / "model")
    if activations != "a16":
        exact = quantizing(exact, int(activations[1]), not activations.endswith("-asym"))
    prompt = np.random.default_rng(4).integers(0, 120, 40).tolist()
    with torch.no_grad():
        want = exact(torch.tensor([prompt])).logits[0].numpy()
    engine = NativeEngine(tmp_path / "model", kv="kv32", activations=activations)
    got = engine.run(prompt, return_prompt_logits=True).prompt_logits
    assert got is not None
    error = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    # Float32 sums differ by about 1e-6. A quantized input amplifies that only where a value lies
    # within as much of a border between two codes: then one code of a row flips, which moves this
    # row (and what attends to it) by up to a step. Most rows must be equal to rounding.
    assert np.median(error) < 1e-5, error
    assert error.max() < (1e-5 if activations == "a16" else 0.05), error


def logits_of_tokens(engine: NativeEngine, tokens: list[int]) -> Any:
    """Logits [tokens, vocab] of prompts of one token: what happens to one does not reach others."""
    found = [engine.run([token], return_prompt_logits=True).prompt_logits for token in tokens]
    return np.concatenate([rows for rows in found if rows is not None])


@pytest.mark.parametrize("weights", ["bf16", *FORMATS])
def test_logits_equal_transformers_with_inputs_rounded_to_bfloat16(
    tmp_path: Path, weights: str
) -> None:
    """The inputs of every linear of a layer, in torch's own bfloat16; products in float64."""
    model = tiny.tiny_qwen2(tmp_path / "src", seed=5)
    convert(tmp_path / "src", tmp_path / "model", weights=weights, overrides=TABLES, kv="kv16")

    def rounded(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].to(torch.bfloat16).to(inputs[0].dtype), *inputs[1:])

    exact = dequantized(model, tmp_path / "model").double()
    for name, module in exact.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            module.register_forward_pre_hook(rounded)
    tokens = list(range(40))
    with torch.no_grad():
        want = exact(torch.tensor([[token] for token in tokens])).logits[:, 0].numpy()
    error = {}
    for asked in ("abf16", "a16"):
        engine = NativeEngine(tmp_path / "model", kv="kv32", activations=asked)
        got = logits_of_tokens(engine, tokens)
        error[asked] = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    # Float32 sums differ by about 1e-7, and where one lies that near to a border it is rounded to
    # another bfloat16 number: a step of 2^-8 of one input in some 2^15. Most rows have none.
    assert np.median(error["abf16"]) < 1e-5 and error["abf16"].max() < 0.02, error
    assert np.median(error["a16"]) > 1e-4, error  # float32 inputs are something else


def test_the_model_says_how_its_inputs_are_quantized(tmp_path: Path) -> None:
    tiny.tiny_llama(tmp_path / "src", seed=5)
    convert(
        tmp_path / "src",
        tmp_path / "model",
        weights="w4g32",
        activations="a8",
        overrides=TABLES,
        kv="kv16",
    )
    prompt = list(range(7, 40))
    asked = NativeEngine(tmp_path / "model", activations="a8").run(prompt, 4).logits
    model_own = NativeEngine(tmp_path / "model").run(prompt, 4).logits
    exact = NativeEngine(tmp_path / "model", activations="a16").run(prompt, 4).logits
    assert asked is not None and model_own is not None and exact is not None
    assert np.array_equal(asked, model_own)
    assert not np.array_equal(exact, model_own)


@pytest.mark.parametrize("activations", ["a8", "a8-asym", "a4"])
def test_integer_products_equal_exact_numerics(tmp_path: Path, activations: str) -> None:
    tiny.tiny_qwen2(tmp_path / "src", seed=6)
    convert(tmp_path / "src", tmp_path / "model", weights="w4g32", overrides=TABLES, kv="kv16")
    prompt = np.random.default_rng(5).integers(0, 120, 40).tolist()
    logits = {}
    for numerics in ("int", "exact"):
        engine = NativeEngine(
            tmp_path / "model", kv="kv32", activations=activations, numerics=numerics
        )
        logits[numerics] = engine.run(prompt, return_prompt_logits=True).prompt_logits
    got, want = logits["int"], logits["exact"]
    assert got is not None and want is not None
    error = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    # As above: equal to rounding but where a code of a later layer flips at a border.
    assert np.median(error) < 1e-5, error
    assert error.max() < 0.05, error
    assert not np.array_equal(got, want)  # two ways indeed


@pytest.mark.parametrize("weights", ["bf16", "w4g32"])
def test_bfloat16_products_equal_exact_numerics(tmp_path: Path, weights: str) -> None:
    tiny.tiny_qwen2(tmp_path / "src", seed=6)
    convert(
        tmp_path / "src",
        tmp_path / "model",
        weights=weights,
        activations="abf16",
        overrides=TABLES,
        kv="kv16",
    )
    logits, kernels = {}, {}
    for numerics in ("int", "exact"):
        engine = NativeEngine(tmp_path / "model", kv="kv32", numerics=numerics)
        logits[numerics] = logits_of_tokens(engine, list(range(40)))
        kernels[numerics] = engine.engine.describe_kernels()
    got, want = logits["int"], logits["exact"]
    error = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    # As above.
    assert np.median(error) < 1e-5 and error.max() < 0.02, error
    # Two ways indeed, where the processor has the other.
    multiplies = any(target in kernels["int"] for target in ("avx3_zen4", "avx3_bf16", "avx3_amx"))
    assert np.array_equal(got, want) != multiplies
    assert "abf16, bfloat16 products" in kernels["int"]
    assert "abf16, float32 products" in kernels["exact"]


@pytest.mark.parametrize("weights", FORMATS)
def test_stored_row_sums_are_those_that_the_engine_computes(tmp_path: Path, weights: str) -> None:
    """Bit by bit: the same model without them gives the same logits."""
    tiny.tiny_qwen2(tmp_path / "src", seed=8)
    asked = {"weights": weights, "overrides": TABLES, "kv": "kv16"}
    convert(tmp_path / "src", tmp_path / "with", activations="a8-asym", **asked)
    convert(tmp_path / "src", tmp_path / "without", activations="a16", **asked)
    stored, bare = ModelDirectory(tmp_path / "with"), ModelDirectory(tmp_path / "without")
    sums = {name for name in stored.tensors if name.endswith(".row_sums")}
    assert sums == set(stored.tensors) - set(bare.tensors)
    assert sums == {f"{slot}.row_sums" for slot in stored.config["linears"] if ".layers." in slot}
    prompt = np.random.default_rng(6).integers(0, 120, 40).tolist()
    engines = (
        NativeEngine(tmp_path / "with"),
        NativeEngine(tmp_path / "with", activations="a8-asym"),
        NativeEngine(tmp_path / "without", activations="a8-asym"),
    )
    logits = [engine.run(prompt, return_prompt_logits=True).prompt_logits for engine in engines]
    assert logits[0] is not None
    assert np.array_equal(logits[0], logits[1]) and np.array_equal(logits[0], logits[2])


@pytest.mark.parametrize("tied", [False, True])
def test_an_engine_quantizes_the_inputs_that_a_conversion_would(tmp_path: Path, tied: bool) -> None:
    """The head's stay float32 unless it is named, the embedding as a lookup has none."""
    make = tiny.tiny_qwen2 if tied else tiny.tiny_llama
    make(tmp_path / "src", seed=9)
    prompt = list(range(7, 40))

    def logits(path: Path, activations: str = "") -> tuple[Any, str]:
        engine = NativeEngine(path, kv="kv32", activations=activations)
        answer = engine.run(prompt, return_prompt_logits=True)
        return answer.prompt_logits, engine.engine.describe_kernels()

    # What the model says itself is replaced, its head's format too.
    convert(tmp_path / "src", tmp_path / "base", weights="w4g32", activations="a6,head=a6")
    assert (ModelDirectory(tmp_path / "base").config["decoder"]["tied_embedding"]) == tied
    found = {}
    for text in ("a16", "a8", "a8-asym", "a8,head=a8", "a4-asym,lm_head=a8-asym", "a8,head=a16",
                 "abf16", "a8,head=abf16"):  # fmt: skip
        converted = tmp_path / text
        convert(tmp_path / "src", converted, weights="w4g32", activations=text)
        want, kernels = logits(converted)
        found[text], asked = logits(tmp_path / "base", text)
        assert want is not None and np.array_equal(found[text], want), text
        assert asked == kernels, text
    assert np.array_equal(found["a8"], found["a8,head=a16"])
    assert not np.array_equal(found["a8"], found["a8,head=a8"])


def test_an_unknown_activation_format_is_refused(tmp_path: Path) -> None:
    from framequilt import _framequilt

    tiny.tiny_llama(tmp_path / "src", seed=5)
    convert(tmp_path / "src", tmp_path / "model", weights="w4g32,head=bf16", kv="kv16")
    model = _framequilt.Model.open(str(tmp_path / "model"))
    for text in ("a9", "a8,", "a8,head=", "a8,head=a9", "a8,vision.*=a8", "head=a8", "a8,head=a8,"):
        with pytest.raises(Exception, match=f"no activation format '{re.escape(text)}'"):
            _framequilt.Engine(model, activations=text)
    with pytest.raises(Exception, match=r"decoder\.head has bf16 weights, which take no a8 inputs"):
        _framequilt.Engine(model, activations="a8,head=a8")
