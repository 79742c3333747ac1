"""Logits and greedy tokens of the engine against transformers.

The oracle runs twice, in float64 and in float32. Their difference is the rounding that float32
arithmetic brings to this very model and input; another float32 program with another order of
summation may differ from the float64 result by a small multiple of it. SLACK is that multiple: two
independent roundings of the same size add up to 2, and the largest of thousands of logits varies by
less than a factor of 4 between orders.
"""

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
from oracles.native import NativeEngine

from framequilt.convert import convert

SLACK = 8.0


def both(model: Any, **inputs: Any) -> tuple[np.ndarray, float]:
    """Logits [rows, vocab] in float64, and how far float32 is from them."""
    with torch.no_grad():
        single = model(**inputs).logits[0].double().numpy()
        wide = copy.deepcopy(model).double()
        cast = {
            k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in inputs.items()
        }
        double = wide(**cast).logits[0].numpy()
    return double, float(np.abs(single - double).max())


def check(ours: np.ndarray, exact: np.ndarray, noise: float) -> None:
    assert ours.shape == exact.shape
    assert np.abs(ours - exact).max() <= SLACK * noise, (np.abs(ours - exact).max(), noise)


TEXT_MODELS: dict[str, Any] = {
    "llama": (tiny.tiny_llama, {}),
    "llama-linear-rope": (
        tiny.tiny_llama,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "llama3-rope": (
        tiny.tiny_llama,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen2": (tiny.tiny_qwen2, {}),
    "qwen2-untied": (tiny.tiny_qwen2, {"tie_word_embeddings": False}),
}


@pytest.mark.parametrize("weights", ["bf16", "f32"])
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_text_logits_and_64_greedy_tokens_equal_transformers(
    tmp_path: Path, name: str, weights: str
) -> None:
    make, changes = TEXT_MODELS[name]
    model = make(tmp_path / "src", seed=3, bf16=weights == "bf16", **changes)
    convert(tmp_path / "src", tmp_path / "model", weights=weights, kv="kv32")
    engine = NativeEngine(tmp_path / "model", kv="kv32", chunk_rows=16)
    prompt = [int(i) for i in np.random.default_rng(0).integers(5, 131, 90)]
    ours = engine.run(prompt, tokens=64, return_prompt_logits=True)
    exact, noise = both(model, input_ids=torch.tensor([prompt]))
    check(ours.prompt_logits, exact, noise)

    with torch.no_grad():
        theirs = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
    assert ours.tokens == theirs
    # Decode logits too: teacher-forced over prompt and answer.
    exact, noise = both(model, input_ids=torch.tensor([prompt + theirs[:-1]]))
    check(ours.logits, exact[len(prompt) - 1 :], noise)


def video_pixels(frames: int, size: int, seed: int) -> Any:
    return torch.randn(frames, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [28, 31])  # 31: no whole number of patches, as 384 / 14 is none
def test_video_of_several_frames_equals_transformers(tmp_path: Path, size: int) -> None:
    model = tiny.tiny_llava_onevision(tmp_path / "src", seed=5, vision={"image_size": size})
    convert(tmp_path / "src", tmp_path / "model", weights="bf16", kv="kv32")
    engine = NativeEngine(tmp_path / "model", kv="kv32", chunk_rows=13)
    pixels = video_pixels(7, size, 1)
    rows = 7 * 4 + 1  # 4x4 patches pooled to 2x2, one closing newline
    before, after = [10, 11, 12], [13, 14, 15, 16]
    ours = engine.run(
        [*before, -1, *after],
        tokens=64,
        media=[{"kind": "video", "data": pixels.numpy()}],
        return_prompt_logits=True,
    )
    ids = torch.tensor([before + [4] * rows + after])
    exact, noise = both(model, input_ids=ids, pixel_values_videos=pixels[None])
    check(ours.prompt_logits, exact, noise)
    assert ours.usage["visual_tokens"] == rows
    with torch.no_grad():
        theirs = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values_videos=pixels[None],
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0].tolist()[-64:]
    assert ours.tokens == theirs


@pytest.mark.parametrize(
    ("width", "height", "most"),
    [(28, 28, 9), (84, 50, 9), (30, 84, 9), (25, 70, 9), (84, 84, 9), (84, 84, 2)],
    ids=str,
)
def test_one_image_with_tiles_equals_transformers(
    tmp_path: Path, width: int, height: int, most: int
) -> None:
    # `most` tiles: larger grids are shrunk.
    from PIL import Image
    from transformers import LlavaOnevisionImageProcessorPil

    from framequilt.vision.processors import Preprocessor

    model = tiny.tiny_llava_onevision(
        tmp_path / "src", seed=6, vision_aspect_ratio=f"anyres_max_{most}"
    )
    convert(tmp_path / "src", tmp_path / "model", weights="bf16", kv="kv32")
    engine = NativeEngine(tmp_path / "model", kv="kv32")
    array = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(array)
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28},
        image_grid_pinpoints=model.config.image_grid_pinpoints,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    theirs = processor(picture, return_tensors="pt")
    item = Preprocessor.open(tmp_path / "model", 7).image(picture)
    with torch.no_grad():
        features = model.model.get_image_features(
            theirs["pixel_values"], theirs["image_sizes"]
        ).pooler_output
    rows = features[0].shape[0]
    before, after = [10, 11], [13, 14, 15]
    ours = engine.run(
        [*before, -1, *after],
        media=[{"kind": "image", "data": item.data, "tiles": item.tiles}],
        return_prompt_logits=True,
    )
    assert ours.usage["visual_tokens"] == rows
    exact, noise = both(
        model,
        input_ids=torch.tensor([before + [3] * rows + after]),
        pixel_values=theirs["pixel_values"],
        image_sizes=theirs["image_sizes"],
    )
    check(ours.prompt_logits, exact, noise)


@pytest.mark.parametrize("pool", ["bilinear", "average", "max"])
@pytest.mark.parametrize("newline", ["grid", "frame", "one_token", "no_token"])
def test_original_video_layout_equals_its_modules(tmp_path: Path, pool: str, newline: str) -> None:
    model = tiny.tiny_llava_video_original(
        tmp_path / "src", seed=7, mm_spatial_pool_mode=pool, mm_newline_position=newline
    )
    model.pool, model.newline = pool, newline
    convert(tmp_path / "src", tmp_path / "model", weights="bf16", kv="kv32")
    engine = NativeEngine(tmp_path / "model", kv="kv32")
    pixels = video_pixels(5, 28, 3)
    before, after = [10, 11, 12], [13, 14]

    def embeds(dtype: Any) -> tuple[Any, Any]:
        m = copy.deepcopy(model).to(dtype)
        table = m.decoder.get_input_embeddings()
        parts = [table(torch.tensor(before)), m.frame_rows(pixels.to(dtype))]
        return m.decoder, torch.cat([*parts, table(torch.tensor(after))])[None]

    with torch.no_grad():
        decoder, single = embeds(torch.float32)
        rough = decoder(inputs_embeds=single).logits[0].double().numpy()
        decoder, double = embeds(torch.float64)
        exact = decoder(inputs_embeds=double).logits[0].numpy()
    ours = engine.run(
        [*before, -1, *after],
        media=[{"kind": "video", "data": pixels.numpy()}],
        return_prompt_logits=True,
    )
    check(ours.prompt_logits, exact, float(np.abs(rough - exact).max()))


@pytest.mark.parametrize("weights", ["w4g32", "w4g64-sym", "w8g128", "w4row", "w8row-sym"])
def test_packed_weights_equal_their_dequantized_values(tmp_path: Path, weights: str) -> None:
    """The packed path is the dequantized model: same numbers put into transformers agree."""
    from framequilt.model_directory import ModelDirectory

    model = tiny.tiny_llama(tmp_path / "src", seed=9)
    convert(tmp_path / "src", tmp_path / "model", weights=weights, kv="kv32")
    directory = ModelDirectory(tmp_path / "model")
    names = {
        "decoder.embedding": "model.embed_tokens",
        "decoder.head": "lm_head",
        "attention": "self_attn",
    }
    state = model.state_dict()
    for slot in directory.config["linears"]:
        name = names.get(slot)
        if name is None:
            _, _, layer, block, part = slot.split(".")
            name = f"model.layers.{layer}.{names.get(block, block)}.{part}_proj"
        state[f"{name}.weight"].copy_(torch.from_numpy(directory.linear(slot).copy()))
    prompt = [int(i) for i in np.random.default_rng(4).integers(5, 131, 50)]
    ours = NativeEngine(tmp_path / "model", kv="kv32").run(prompt, return_prompt_logits=True)
    exact, noise = both(model, input_ids=torch.tensor([prompt]))
    check(ours.prompt_logits, exact, noise)


def test_quantized_kv_gets_closer_with_more_bits(tmp_path: Path) -> None:
    model = tiny.tiny_qwen2(tmp_path / "src", seed=11)
    convert(tmp_path / "src", tmp_path / "model", weights="bf16", kv="kv32")
    prompt = [int(i) for i in np.random.default_rng(5).integers(5, 131, 80)]
    exact, noise = both(model, input_ids=torch.tensor([prompt]))
    error = {}
    for kv in ("kv32", "kv16", "kv8", "kv6", "kv4", "kv3", "kv2", "kv32+rotate"):
        ours = NativeEngine(tmp_path / "model", kv=kv).run(prompt, return_prompt_logits=True)
        error[kv] = float(np.sqrt(np.mean((ours.prompt_logits - exact) ** 2)))
    assert error["kv32"] <= SLACK * noise
    assert error["kv32+rotate"] <= SLACK * noise
    # Half has 11 significant bits, b bit codes 2^b - 1 steps over a group: the order is theirs,
    # and formats of twice the bits are more than a factor of 2 apart.
    assert error["kv32"] * 2 < error["kv16"] and error["kv16"] * 2 < error["kv8"]
    assert error["kv8"] < error["kv6"] < error["kv4"] < error["kv3"] < error["kv2"]
    assert error["kv8"] * 2 < error["kv4"] < float(np.sqrt(np.mean(exact**2)))
    assert error["kv4"] * 2 < error["kv2"]
