"""Converted directories mean the same model: transformers is the oracle of the logits, the numpy
forward pass of `oracles.forward` reads the directory as the engine's contract says."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from oracles import tiny
from oracles.forward import Forward

from framequilt.convert import convert
from framequilt.errors import Unsupported
from framequilt.model_directory import ModelDirectory

IDS = [0, 17, 5, 130, 42, 42, 77, 9, 63, 101, 28]

# Both sides hold the same bf16 weights; transformers computes in float32, the oracle in float64. A
# dot product over n <= 147 values errs by at most n * 2^-24 < 1e-5 of the sum of |a b|; with O(1)
# values in and out, some ten dependent products stay below 1e-4 of the largest logit.
RELATIVE = 1e-4


def close(found: Any, expected: Any) -> None:
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() <= RELATIVE * scale


def text_logits(model: Any, ids: list[int] = IDS) -> Any:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def test_longer_contexts_of_fine_tunes_are_kept(tmp_path: Path) -> None:
    tiny.tiny_llama(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_sequence_length": 8192}))
    report = convert(tmp_path / "source", tmp_path / "model", dry_run=True)
    assert report.config["decoder"]["context"] == 8192


LLAMAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 24},
    "one kv head": {"num_key_value_heads": 1},
    "no group": {"num_key_value_heads": 4},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "linear rope": {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    },
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 500000.0,
        }
    },
}


@pytest.mark.parametrize("name", LLAMAS)
def test_a_llama_keeps_its_logits(tmp_path: Path, name: str) -> None:
    model = tiny.tiny_llama(tmp_path / "source", seed=1, **LLAMAS[name])
    convert(tmp_path / "source", tmp_path / "model", weights="bf16")
    forward = Forward(tmp_path / "model")
    close(forward.logits(forward.embed(IDS)), text_logits(model))


@pytest.mark.parametrize("tied", [True, False])
def test_a_qwen2_keeps_its_logits(tmp_path: Path, tied: bool) -> None:
    model = tiny.tiny_qwen2(tmp_path / "source", seed=2, tie_word_embeddings=tied)
    convert(tmp_path / "source", tmp_path / "model", weights="bf16")
    forward = Forward(tmp_path / "model")
    close(forward.logits(forward.embed(IDS)), text_logits(model))


def test_a_mistral_keeps_its_logits_unless_it_needs_a_window(tmp_path: Path) -> None:
    model = tiny.tiny_mistral(tmp_path / "source", seed=7)
    convert(tmp_path / "source", tmp_path / "model", weights="bf16")
    forward = Forward(tmp_path / "model")
    close(forward.logits(forward.embed(IDS)), text_logits(model))
    tiny.tiny_mistral(tmp_path / "windowed", sliding_window=1024)
    with pytest.raises(Unsupported, match="sliding_window"):
        convert(tmp_path / "windowed", tmp_path / "other")


def test_older_rope_keys_mean_the_same(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    model = tiny.tiny_llama(tmp_path / "source", rope_parameters=scaling)
    file = tmp_path / "source" / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    file.write_text(json.dumps(config))
    convert(tmp_path / "source", tmp_path / "model", weights="bf16")
    forward = Forward(tmp_path / "model")
    close(forward.logits(forward.embed(IDS)), text_logits(model))


def frames(count: int, size: int = 28) -> Any:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("layer", [-1, -2, 1])
@pytest.mark.parametrize("size", [28, 35])  # a grid of 4, and an odd one of 5
def test_an_onevision_video_keeps_its_rows_and_logits(
    tmp_path: Path, layer: int, size: int
) -> None:
    model = tiny.tiny_llava_onevision(
        tmp_path / "source", seed=3, vision={"image_size": size}, vision_feature_layer=layer
    )
    convert(tmp_path / "source", tmp_path / "model", weights="bf16")
    forward = Forward(tmp_path / "model")
    pixels = frames(3, size)
    with torch.no_grad():
        expected = model.model.get_video_features(pixels[None], return_dict=True).pooler_output[0]
    rows = forward.video(pixels.numpy().astype(np.float64))
    close(rows, expected.numpy())
    ids = [1, 20, *[4] * len(rows), 33, 7]
    with torch.no_grad():
        output = model(torch.tensor([ids]), pixel_values_videos=pixels[None])
    prompt = np.concatenate([forward.embed([1, 20]), rows, forward.embed([33, 7])])
    close(forward.logits(prompt), output.logits[0].numpy())


@pytest.mark.parametrize("newline", ["grid", "frame", "one_token"])
@pytest.mark.parametrize("pool", ["bilinear", "average", "max"])
def test_an_original_video_keeps_its_rows_and_logits(
    tmp_path: Path, pool: str, newline: str
) -> None:
    model = tiny.tiny_llava_video_original(
        tmp_path / "source",
        seed=4,
        vision={"image_size": 35},
        mm_spatial_pool_mode=pool,
        mm_newline_position=newline,
    )
    convert(tmp_path / "source", tmp_path / "model", weights="bf16")
    forward = Forward(tmp_path / "model")
    pixels = frames(2, 35)
    with torch.no_grad():
        expected = model.frame_rows(pixels)
        output = model.decoder(inputs_embeds=expected[None]).logits[0]
    rows = forward.video(pixels.numpy().astype(np.float64))
    close(rows, expected.numpy())
    close(forward.logits(rows), output.numpy())


@pytest.mark.parametrize("nested", [None, {"model_type": "clip_vision_model", "hidden_size": 1024}])
def test_the_known_tower_of_an_original_config_is_found_by_name(
    tmp_path: Path, nested: dict[str, Any] | None
) -> None:
    tiny.tiny_llava_video_original(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"] = nested
    config["mm_vision_tower"] = "google/siglip-so400m-patch14-384"
    config["image_grid_pinpoints"] = [[384, 768]]
    file.write_text(json.dumps(config))
    from framequilt.convert.families import find
    from framequilt.convert.sources import open_source

    source = open_source(tmp_path / "source")
    vision = find(source).describe(source).model.vision
    assert vision is not None
    assert (vision.hidden, vision.mlp.hidden, vision.layers) == (1152, 4304, 26)
    assert (vision.image_size // vision.patch, vision.attention.head_dim) == (27, 72)
    assert vision.mlp.activation == "gelu_tanh" and not vision.post_norm


def test_the_demo_model_converts_and_keeps_its_numbers(tmp_path: Path) -> None:
    """The exporter of the demo model against its own training-side modules."""
    from framequilt.demo.export import export
    from framequilt.demo.model import DemoConfig, DemoModel
    from framequilt.demo.tokenizer import Prompts

    torch.manual_seed(0)
    model = DemoModel(DemoConfig(layers=2)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16).float())
    export(model, Prompts(), tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "model", weights="bf16")
    assert report.config["visual"]["newline"] == "grid"
    forward = Forward(tmp_path / "model")
    pixels = frames(2, 64)
    with torch.no_grad():
        rows = model.vision(pixels).reshape(1, -1, model.config.width)
        logits = model.language(rows, torch.arange(rows.shape[1])[None])[0]
    found = forward.video(pixels.numpy().astype(np.float64))
    close(found, rows[0].numpy())
    close(forward.logits(found), logits.numpy())


@pytest.mark.parametrize("weights", ["w4", "w4g32-sym", "w8row", "w8g64-f32scale", "f32"])
def test_quantized_weights_stay_within_half_a_step(tmp_path: Path, weights: str) -> None:
    """Every weight of the checkpoint, by name, against what the directory gives back."""
    model = tiny.tiny_qwen2(tmp_path / "source", seed=6)
    report = convert(tmp_path / "source", tmp_path / "model", weights=weights)
    directory = ModelDirectory(tmp_path / "model", verify=True)
    state = {name: weight.numpy() for name, weight in model.state_dict().items()}
    for entry in report.linears:
        expected = state[entry.source]
        found = directory.linear(entry.slot)
        form = directory.format_of(entry.slot)
        assert form.name == entry.format
        if form.kind == "f32":
            assert (found == expected).all()
            continue
        # A step of the whole row bounds the steps of its groups. Half a step for the rounding, and
        # 2^-11 of all steps for a scale that was rounded to float16.
        low = np.minimum(expected.min(1, keepdims=True), 0)
        high = np.maximum(expected.max(1, keepdims=True), 0)
        span = 2 * np.maximum(-low, high) if form.symmetric else high - low
        levels = 2**form.bits - (2 if form.symmetric else 1)
        bound = span / levels * (0.5 + levels * 2.0**-11) * (1 + 2.0**-10)
        assert (np.abs(found - expected) <= bound).all()
        assert entry.relative_error is not None
        measured = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert entry.relative_error == pytest.approx(measured, rel=1e-3)
    norm = state["model.layers.1.input_layernorm.weight"]
    assert (directory.vector("decoder.layers.1.attention_norm.weight") == norm).all()


def test_a_four_bit_scheme_keeps_eight_bits_where_it_matters(tmp_path: Path) -> None:
    tiny.tiny_llava_onevision(tmp_path / "source")
    report = convert(
        tmp_path / "source", tmp_path / "model", weights="w4g32", overrides={"vision.*": "bf16"}
    )
    formats = {entry.slot: entry.format for entry in report.linears}
    assert formats["decoder.layers.0.attention.q"] == "w4g32"
    assert formats["decoder.embedding"] == formats["decoder.head"] == "w8g32"
    assert formats["projector.layers.1"] == "w8g32"
    assert formats["vision.layers.0.mlp.up"] == "bf16"
    config = ModelDirectory(tmp_path / "model").config
    assert {slot: entry["format"]["kind"] for slot, entry in config["linears"].items()} == {
        slot: "affine" if name.startswith("w") else name for slot, name in formats.items()
    }


def test_sharded_checkpoints_and_sharded_directories(tmp_path: Path) -> None:
    model = tiny.tiny_llama(tmp_path / "source", save={"max_shard_size": "50KB"})
    assert (tmp_path / "source" / "model.safetensors.index.json").is_file()
    convert(tmp_path / "source", tmp_path / "model", weights="bf16", shard_bytes=60_000)
    forward = Forward(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    close(forward.logits(forward.embed(IDS)), text_logits(model))


def test_tokens_and_template_come_along(tmp_path: Path) -> None:
    tiny.tiny_llama(tmp_path / "llama")
    report = convert(tmp_path / "llama", tmp_path / "a")
    assert report.config["tokens"] == {
        "bos": 0,
        "add_bos": True,
        "eos": [2],
        "media": "",
        "tokenizer": {"kind": "huggingface", "file": "tokenizer.json"},
    }
    copied = (tmp_path / "a" / "tokenizer.json").read_bytes()
    assert copied == (tmp_path / "llama" / "tokenizer.json").read_bytes()
    assert (tmp_path / "a" / "chat_template.jinja").read_text() == tiny.CHATML

    tiny.tiny_llava_onevision(tmp_path / "ov")
    report = convert(tmp_path / "ov", tmp_path / "b")
    assert report.config["tokens"]["media"] == "<image>"
    assert not report.config["tokens"]["add_bos"]
    template = (tmp_path / "b" / "chat_template.jinja").read_text()
    assert "<video>" not in template and template.count("<image>") == 2
    preprocessor = json.loads((tmp_path / "b" / "preprocessor.json").read_text())
    assert preprocessor["size"] == 28 and preprocessor["resample"] == "bicubic"
    assert preprocessor["mean"] == [0.5] * 3 and preprocessor["std"] == [0.5] * 3
    assert preprocessor["rescale"] == 1 / 255
    assert [28, 56] in preprocessor["image_grid_pinpoints"]
    assert not preprocessor["time_instruction"]


def test_end_tokens_are_the_union_of_all_places(tmp_path: Path) -> None:
    tiny.tiny_qwen2(tmp_path / "source", eos_token_id=1)
    (tmp_path / "source" / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    report = convert(tmp_path / "source", tmp_path / "model", dry_run=True)
    assert report.config["tokens"]["eos"] == [2, 0, 1]


def test_image_grids_as_text_count_tiles(tmp_path: Path) -> None:
    tiny.tiny_llava_video_original(tmp_path / "source", image_grid_pinpoints="(1x1),...,(2x3)")
    convert(tmp_path / "source", tmp_path / "model")
    preprocessor = json.loads((tmp_path / "model" / "preprocessor.json").read_text())
    grids = sorted(preprocessor["image_grid_pinpoints"])
    assert grids == [[28, 28], [28, 56], [56, 28], [56, 56], [84, 28], [84, 56]]
    assert preprocessor["time_instruction"]


SHARED = Path(os.environ.get("FRAMEQUILT_SHARED", Path(__file__).parents[3] / "shared"))


@pytest.mark.parametrize("setting", ["fp", "W8", "W4"])
def test_reference_quantization_gives_the_published_logits(tmp_path: Path, setting: str) -> None:
    """Golden logits of the reference: groups of 32, its own range, tables as they are."""
    golden = SHARED / "golden" / "quantization" / "tiny_models" / "llama"
    if not golden.is_dir():
        pytest.skip("the golden vectors are not here (FRAMEQUILT_SHARED)")
    from safetensors.numpy import load_file

    tiny.write_tokenizer(tmp_path / "tokenizer", vocab=128)
    convert(
        golden,
        tmp_path / "model",
        weights={"fp": "f32", "W8": "w8g32-f32scale", "W4": "w4g32-f32scale"}[setting],
        overrides={"decoder.embedding": "f32", "decoder.head": "f32"},
        range_="reference",
        tokenizer=tmp_path / "tokenizer",
    )
    values = load_file(golden / "golden.safetensors")
    forward = Forward(tmp_path / "model")
    logits = forward.logits(forward.embed(values["input_ids"].tolist()))
    close(logits, values[f"{setting}.logits"])
