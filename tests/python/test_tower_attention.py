"""`attention=a8`: the vision tower's attention with 8-bit queries and keys, in the whole engine.

The oracle is transformers with its attention replaced by a simulation in float64 of what the
contract says (engine/CONTRACT.md, 1.5).
"""

from __future__ import annotations

import copy
import re
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
from framequilt.errors import InvalidArgument
from framequilt.model_directory import ModelDirectory


def rounded(x: Any, dim: int, levels: int) -> Any:
    """Symmetric, one scale over `dim`, half to even."""
    step = x.abs().amax(dim, keepdim=True).clamp_min(1e-5) / levels
    return torch.round(x / step) * step


def simulated(
    module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Any, None]:
    """Of [batch, heads, tokens, dims]; returns [batch, tokens, heads, dims]."""
    assert mask is None and scaling is not None
    scores = rounded(q, -1, 127) @ rounded(k - k.mean(-2, keepdim=True), -1, 127).mT * scaling
    p = torch.round(torch.exp(scores - scores.amax(-1, keepdim=True)) * 2**13)
    out = p @ rounded(v, -2, 1023) / p.sum(-1, keepdim=True)
    return out.transpose(1, 2), None


def test_the_engine_computes_what_the_contract_says(tmp_path: Path) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny.tiny_llava_onevision(tmp_path / "src", seed=5)
    asked = "a16,attention=a8"
    convert(tmp_path / "src", tmp_path / "plain", weights="bf16", kv="kv32")
    convert(tmp_path / "src", tmp_path / "model", weights="bf16", kv="kv32", activations=asked)
    pixels = torch.randn(7, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    rows = 7 * 4 + 1  # 4x4 patches pooled to 2x2, one closing newline

    def ours(name: str, activations: str = "") -> np.ndarray:
        engine = NativeEngine(tmp_path / name, kv="kv32", activations=activations)
        answer = engine.run(
            [10, 11, -1, 13, 14],
            media=[{"kind": "video", "data": pixels.numpy()}],
            return_prompt_logits=True,
        )
        assert answer.prompt_logits is not None
        kernels = engine.engine.describe_kernels()
        eight = "vision attention: a8 queries and keys, integer products" in kernels
        assert eight == (name == "model" and activations == "" or activations == asked)
        return answer.prompt_logits

    def theirs(attention: str) -> np.ndarray:
        wide = copy.deepcopy(model).double()
        wide.model.vision_tower.config._attn_implementation = attention
        ids = torch.tensor([[10, 11] + [4] * rows + [13, 14]])
        with torch.no_grad():
            return wide(input_ids=ids, pixel_values_videos=pixels[None].double()).logits[0].numpy()

    ALL_ATTENTION_FUNCTIONS.register("a8", simulated)
    want, plain = theirs("a8"), theirs("sdpa")
    got = ours("model")
    assert np.array_equal(got, ours("plain", asked))  # an engine is asked for the same
    assert np.array_equal(ours("plain"), ours("model", "a16"))
    # A code near a tie may be another one in float32; that is rare beside what all the codes do.
    moved = np.linalg.norm(want - plain)
    assert moved > 1e-4 * np.linalg.norm(plain)
    assert np.linalg.norm(got - want) < 0.1 * moved
    # And what they do is small: 16 tokens of 8 bits.
    assert moved < 0.02 * np.linalg.norm(plain)


def test_models_without_a_tower_refuse_it(tmp_path: Path) -> None:
    from framequilt import _framequilt

    tiny.tiny_llama(tmp_path / "src", seed=5)
    with pytest.raises(InvalidArgument, match="no vision tower whose attention"):
        convert(tmp_path / "src", tmp_path / "no", activations="a8,attention=a8")
    assert not (tmp_path / "no").exists()
    with pytest.raises(InvalidArgument, match="attention takes no a4 queries and keys"):
        convert(tmp_path / "src", tmp_path / "no", activations="a8,attention=a4")
    # A preset is for all models: what one lacks is passed over.
    convert(tmp_path / "src", tmp_path / "model", preset="fast")
    assert ModelDirectory(tmp_path / "model").config["vision"] is None
    model = _framequilt.Model.open(str(tmp_path / "model"))
    with pytest.raises(Exception, match="no vision tower whose attention could be a8"):
        _framequilt.Engine(model, activations="a8,attention=a8")
    for text in ("a8,attention=a4", "a8,attention=a8-asym", "attention=a8"):
        with pytest.raises(Exception, match=f"no activation format '{re.escape(text)}'"):
            _framequilt.Engine(model, activations=text)


def test_the_fast_preset_takes_it_where_there_is_a_tower(tmp_path: Path) -> None:
    tiny.tiny_llava_onevision(tmp_path / "src", seed=5)
    convert(tmp_path / "src", tmp_path / "model", preset="fast")
    config: dict[str, Any] = ModelDirectory(tmp_path / "model").config
    assert config["vision"]["attention_activations"] == {"bits": 8, "symmetric": True}
    assert config["source"]["activations"] == "a8-asym,attention=a8"
