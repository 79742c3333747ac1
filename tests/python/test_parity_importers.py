"""Quantized checkpoints in the engine, against transformers with the dequantized weights.

The bound is that of test_parity.py: the distance of float32 from float64 in the reference itself.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from oracles import tiny
from oracles.native import NativeEngine
from test_convert_gguf import FORMATS, HALVES, random_blocks, write_gguf
from test_convert_quantized import EXACT, KEPT, SIZES, make
from test_parity import both, check
from test_quantized_engine import quantizing

from framequilt.convert import convert
from framequilt.model_directory import ModelDirectory

PROMPT = [int(token) for token in np.random.default_rng(3).integers(5, 131, 50)]
WITHOUT_INPUTS = [name for name, (_, options, _) in KEPT.items() if "inputs" not in options]


def engine_logits(path: Path, **options: Any) -> Any:
    engine = NativeEngine(path, kv="kv32", chunk_rows=16, **options)
    answer = engine.run(PROMPT, return_prompt_logits=True)
    assert answer.error is None, answer.error
    return answer.prompt_logits


@pytest.mark.parametrize("name", WITHOUT_INPUTS)
def test_logits_of_quantized_checkpoints_equal_transformers(tmp_path: Path, name: str) -> None:
    model, _, _ = make(tmp_path / "src", name)
    convert(tmp_path / "src", tmp_path / "model", overrides=EXACT, kv="kv16")
    exact, noise = both(model, input_ids=torch.tensor([PROMPT]))
    check(engine_logits(tmp_path / "model"), exact, noise)


def test_recorded_activations_are_used(tmp_path: Path) -> None:
    """As in test_quantized_engine.py: rows are equal to rounding, but where a code flips."""
    model, _, _ = make(tmp_path / "src", "int-8")
    convert(tmp_path / "src", tmp_path / "model", overrides=EXACT, kv="kv16")
    exact, noise = both(model, input_ids=torch.tensor([PROMPT]))
    with torch.no_grad():
        want = quantizing(model, 8, True)(torch.tensor([PROMPT])).logits[0].numpy()
    got = engine_logits(tmp_path / "model")
    error = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    assert np.median(error) < 1e-5 and error.max() < 0.05, error
    check(engine_logits(tmp_path / "model", activations="a16"), exact, noise)
    assert np.abs(got - exact).max() > 100 * noise  # without them it would be another model


@pytest.mark.parametrize("symmetric", [True, False])
def test_folding_activation_order_changes_nothing(tmp_path: Path, symmetric: bool) -> None:
    from oracles import quantized

    model = tiny.tiny_llama(tmp_path / "src", seed=8, bf16=False, mlp_bias=True, **SIZES)
    quantized.write_gptq(tmp_path / "src", model, symmetric=symmetric, act_order=5)
    changed = {**EXACT, "*.attention.*": "f32", "*.mlp.gate": "f32", "*.mlp.up": "f32"}
    convert(tmp_path / "src", tmp_path / "model", overrides=changed, kv="kv16")
    exact, noise = both(model, input_ids=torch.tensor([PROMPT]))
    check(engine_logits(tmp_path / "model"), exact, noise)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_logits_of_gguf_blocks_equal_transformers(tmp_path: Path, kind: str) -> None:
    model = tiny.tiny_llama(tmp_path / "hf", seed=5, intermediate_size=96)
    write_gguf(tmp_path / "x.gguf", model, "llama", kind)
    report = convert(tmp_path / "x.gguf", tmp_path / "model", kv="kv16")
    assert {entry.format for entry in report.linears} == {FORMATS[kind]}
    load_gguf(model, tmp_path / "x.gguf")
    exact, noise = both(model, input_ids=torch.tensor([PROMPT]))
    check(engine_logits(tmp_path / "model"), exact, noise)


def load_gguf(model: Any, path: Path) -> None:
    """Dequantized by the package, and q and k in the order of halves, as transformers rotates."""
    from test_convert_gguf import gguf_name

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            tensor = tensors[gguf_name(name)]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            count = next((n for part, n in heads.items() if part in name), 0)
            if count:
                half = values.shape[0] // count // 2
                values = values.reshape(count, half, 2, -1).swapaxes(1, 2).reshape(values.shape)
            weight.copy_(torch.from_numpy(values.copy()))


@pytest.mark.parametrize("kind", HALVES)
def test_logits_of_k_quants_equal_transformers(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package has no quantizer for them: every matrix is random blocks of plausible size."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    model = tiny.tiny_llama(tmp_path / "hf", seed=6, **sizes)
    number = gguf.GGMLQuantizationType[kind]
    plain = gguf.quants.quantize
    seeds = iter(range(100, 200))

    def blocks(data: Any, wanted: Any) -> Any:
        if wanted != number:
            return plain(data, wanted)
        made = random_blocks(kind, data.shape[0], data.shape[1] // 256, next(seeds))
        spread = float(gguf.quants.dequantize(made, number).std())
        for at in HALVES[kind]:  # bring the weights to the size of those that they replace
            size = gguf.GGML_QUANT_SIZES[number][1]
            flat = made.reshape(-1, size)
            scales = np.ascontiguousarray(flat[:, at : at + 2]).view(np.float16)
            smaller = (scales.astype(np.float32) * (data.std() / spread)).astype(np.float16)
            flat[:, at : at + 2] = smaller.view(np.uint8)
        return made

    monkeypatch.setattr(gguf.quants, "quantize", blocks)
    write_gguf(tmp_path / "x.gguf", model, "llama", kind)
    report = convert(tmp_path / "x.gguf", tmp_path / "model", kv="kv16")
    assert {entry.format for entry in report.linears} == {FORMATS[kind]}
    load_gguf(model, tmp_path / "x.gguf")
    stored = ModelDirectory(tmp_path / "model").linear("decoder.layers.0.mlp.up")
    assert (stored == model.model.layers[0].mlp.up_proj.weight.detach().numpy()).all()
    exact, noise = both(model, input_ids=torch.tensor([PROMPT]))
    check(engine_logits(tmp_path / "model"), exact, noise)
