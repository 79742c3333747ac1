"""Calibration's forward pass: each layer equals the layer of transformers."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from oracles import tiny

from framequilt.errors import CorruptModel, InvalidArgument
from framequilt.quantize import (
    dequantize,
    from_bf16,
    parse_activations,
    quantize_activations,
    to_bf16,
)
from framequilt.quantize.calibration import visual
from framequilt.quantize.calibration.blocks import Linears, fake_quantize_rows, halves
from framequilt.quantize.calibration.checkpoint import Checkpoint
from framequilt.quantize.calibration.rows import RowStore
from framequilt.quantize.calibration.samples import Sample, TextCodec, digest, text_samples
from framequilt.quantize.methods.runner import advance, projected, prompt_rows, tower_rows

# Two float32 programs differ by a small multiple of float32's own error (see test_parity.py).
SLACK = 8.0
IDS = [5, 17, 90, 3, 44, 101, 8, 8, 60, 2, 33]
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8, "rope_theta": 1000.0,
}  # fmt: skip


def noise_of(model: Any, call: Any) -> tuple[Any, Any]:
    """Results in float64, and for each the largest error of float32."""
    with torch.no_grad():
        single = call(model, torch.float32)
        double = call(copy.deepcopy(model).double(), torch.float64)
    return double, [
        float((a.double() - b).abs().max()) for a, b in zip(single, double, strict=True)
    ]


@pytest.mark.parametrize(
    "make, changes",
    [
        (tiny.tiny_llama, {"attention_bias": True, "mlp_bias": True}),
        (tiny.tiny_llama, {"rope_parameters": LLAMA3, "num_key_value_heads": 4}),
        (tiny.tiny_qwen2, {"num_key_value_heads": 1}),
    ],
)
def test_every_decoder_layer_equals_transformers(make: Any, changes: Any, tmp_path: Path) -> None:
    model = make(tmp_path / "m", **changes)
    double, noise = noise_of(
        model,
        lambda m, _: m(torch.tensor([IDS]), output_hidden_states=True).hidden_states[:-1],
    )
    checkpoint = Checkpoint.open(tmp_path / "m")
    store = prompt_rows(checkpoint, [Sample((np.array(IDS),))], [], tmp_path / "rows", 1 << 20)
    with torch.no_grad():
        for n, (expected, error) in enumerate(zip(double, noise, strict=True)):
            assert float((store.get(0).double() - expected).abs().max()) <= SLACK * max(error, 1e-9)
            weights = checkpoint.layer("decoder", n)
            for half in halves(checkpoint.model.decoder):
                advance(half, store, Linears(weights))


def test_the_tower_and_the_rows_of_a_video_equal_transformers(tmp_path: Path) -> None:
    for pool, newline in (("bilinear", "grid"), ("average", "frame"), ("max", "one_token")):
        path = tmp_path / pool
        model = tiny.tiny_llava_video_original(
            path, mm_spatial_pool_mode=pool, mm_newline_position=newline
        )
        checkpoint = Checkpoint.open(path)
        vision = checkpoint.model.vision
        assert vision is not None
        size = (vision.channels, vision.image_size, vision.image_size)
        pixels = np.random.default_rng(3).standard_normal((2, *size)).astype(np.float32)

        def call(m: Any, dtype: Any, pixels: Any = pixels) -> list[Any]:
            given = torch.from_numpy(pixels).to(dtype)
            states = m.tower(given, output_hidden_states=True).hidden_states[-2]
            return [states, m.frame_rows(given)]

        (states, rows), noise = noise_of(model, call)
        samples = [Sample((np.array(IDS[:2]), pixels, np.array(IDS[2:])))]
        with torch.no_grad():
            store = tower_rows(checkpoint, samples, tmp_path / "rows", 1 << 20)
            for n in range(vision.layers):
                weights = checkpoint.layer("vision", n)
                for half in halves(vision):
                    advance(half, store, Linears(weights))
            assert float((store.get(0) - states).abs().max()) <= SLACK * noise[0]
            [ours] = projected(checkpoint, samples, store)
            assert ours.shape == rows.shape
            assert float((ours - rows).abs().max()) <= SLACK * noise[1]
            plain = prompt_rows(checkpoint, samples, [ours], tmp_path / "rows", 1 << 20)
            weighted = prompt_rows(
                checkpoint, samples, [ours], tmp_path / "rows", 1 << 20, media_weight=0.25
            )
        prompt = plain.get(0)[0]
        assert torch.equal(weighted.get(0)[0], prompt)
        expected = [1.0] * 2 + [0.25] * len(ours) + [1.0] * (len(IDS) - 2)
        counts = weighted.weights_of(0)
        assert counts is not None and counts.tolist() == expected
        assert plain.weights_of(0) is None
        assert torch.equal(prompt[2 : 2 + len(ours)], ours)
        assert torch.equal(prompt[:2], checkpoint.lookup(np.array(IDS[:2])))
        assert torch.equal(prompt[2 + len(ours) :], checkpoint.lookup(np.array(IDS[2:])))


def test_frames_of_another_size_are_refused(tmp_path: Path) -> None:
    tiny.tiny_llava_video_original(tmp_path / "m")
    checkpoint = Checkpoint.open(tmp_path / "m")
    with pytest.raises(InvalidArgument, match="the tower takes"):
        visual.embed_patches(torch.zeros(1, 3, 5, 5), checkpoint.model, {})
    with pytest.raises(CorruptModel, match="vocabulary"):
        checkpoint.lookup(np.array([1 << 20]))


@pytest.mark.parametrize("name", ["a8", "a4", "a8-asym", "a4-asym"])
def test_quantized_inputs_equal_the_engines(name: str) -> None:
    form = parse_activations(name)
    assert form is not None
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 96)) * np.exp(rng.standard_normal((64, 1)) * 3)).astype(
        np.float32
    )
    x[0], x[1], x[2], x[3, 5] = 0, np.abs(x[1]), -np.abs(x[2]), 120
    ours = fake_quantize_rows(torch.from_numpy(x), form).numpy()
    assert np.array_equal(ours, dequantize(quantize_activations(x, form)))


def test_inputs_in_bfloat16_are_rounded_as_converted_weights_are() -> None:
    form = parse_activations("abf16")
    assert form is not None
    x = np.random.default_rng(0).standard_normal((64, 96), np.float32)
    x[0, :4] = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF818000], np.uint32).view(
        np.float32
    )
    ours = fake_quantize_rows(torch.from_numpy(x), form)
    assert ours.dtype == torch.float32 and np.array_equal(ours.numpy(), from_bf16(to_bf16(x)))
    assert ours[0, :4].tolist() == [1, 1 + 2**-6, 1 + 2**-7, -1 - 2**-6]  # ties to even


def test_linears_sharing_their_input_quantize_it_as_if_alone() -> None:
    form = parse_activations("a4")
    x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    weights = {"a.weight": torch.eye(8), "b.weight": torch.eye(8)}
    linears = Linears(weights, {"a": form, "b": form})
    expected = fake_quantize_rows(x, form)
    assert torch.equal(linears("a", x), expected) and torch.equal(linears("b", x), expected)
    assert torch.equal(linears("b", x * 2), fake_quantize_rows(x * 2, form))
    assert torch.equal(Linears(weights, {"a": form, "b": None})("b", x), x)


def test_rows_are_the_same_in_memory_and_in_a_file(tmp_path: Path) -> None:
    shapes = [(1, 5, 4), (2, 3, 4), (1, 1, 4)]
    values = [torch.randn(shape) for shape in shapes]
    for limit in (0, 1 << 20):
        store = RowStore(shapes, tmp_path / "spill", limit)
        assert (store.path is not None) == (limit == 0)
        for n, rows in enumerate(values):
            store.put(n, rows)
        assert all(torch.equal(store.get(n), rows) for n, rows in enumerate(values))
        assert store.tokens == 5 + 6 + 1
        store.close()
        assert not (tmp_path / "spill").exists()


def test_text_becomes_samples_that_do_not_overlap(tmp_path: Path) -> None:
    tiny.tiny_llama(tmp_path / "m")
    codec = TextCodec(Checkpoint.open(tmp_path / "m"), tmp_path / "tok")
    text = "abcdefgh " * 40
    whole = codec.ids(text)
    samples = text_samples(text, codec, 4, 33)
    assert [len(sample.parts[0]) for sample in samples] == [33] * 4
    # This tokenizer wants a start token, which counts.
    assert {int(sample.parts[0][0]) for sample in samples} == {codec.start[0]}
    windows = [bytes(whole[i : i + 32]) for i in range(len(whole) - 31)]
    assert all(bytes(sample.parts[0][1:]) in windows for sample in samples)
    assert digest(samples) == digest(text_samples(text, codec, 4, 33))
    assert digest(samples) != digest(samples[::-1])
    with pytest.raises(InvalidArgument, match="give more text"):
        text_samples("ab", codec, 4, 33)


def test_prompts_are_what_the_engine_would_encode(tmp_path: Path) -> None:
    tiny.tiny_llava_video_original(tmp_path / "m")
    checkpoint = Checkpoint.open(tmp_path / "m")
    codec = TextCodec(checkpoint, tmp_path / "tok")
    pixels = np.zeros((1, 3, 4, 4), np.float32)
    content = [{"type": "video", "video": "clip"}, {"type": "text", "text": "what"}]
    sample = codec.prompt([{"role": "user", "content": content}], [pixels], "this")
    before, frames, after = sample.parts
    assert frames is pixels
    answer = [*codec.ids("this"), checkpoint.tokens().eos[0]]
    assert sample.scored == len(answer) and list(after[-len(answer) :]) == answer
    text = codec.tokenizer.decode(list(before) + list(after), skip_special=False)
    assert text.startswith("<|im_start|>user\n") and "what<|im_end|>" in text
    with pytest.raises(InvalidArgument, match="more media"):
        codec.prompt([{"role": "user", "content": content}], [])
