"""The main job as a user runs it: the shipped checkpoint, converted, asked about generated and real
clips, against the training side's own implementation of model and token reduction."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
torch = pytest.importorskip("torch")
pytest.importorskip("av")

from framequilt import Engine, FrameFusion, Sampling
from framequilt.convert import convert
from framequilt.demo import evaluate, fusion, show
from framequilt.demo.export import load_checkpoint
from framequilt.demo.scenes import make_scene
from framequilt.errors import FramequiltError
from framequilt.resources import real_clip

GREEDY = Sampling(temperature=0.0, max_tokens=8)
FRAMES = 16


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "f32"
    convert(show.CHECKPOINT, path, weights="f32", kv="kv32")
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "w4"
    convert(show.CHECKPOINT, path, weights="w4g128", kv="kv8")
    return path


@pytest.fixture(scope="module")
def clip() -> Path:
    try:
        return real_clip()
    except FramequiltError as error:
        pytest.skip(f"the package with the clip cannot be had here: {error}")


@pytest.mark.parametrize("cost", [None, 0.5, 0.3])
def test_answers_and_rows_per_layer_equal_the_training_side(
    exact: Path, cost: float | None
) -> None:
    """Two implementations of one model, with and without reduction, on unseen scenes."""
    model, prompts = load_checkpoint(show.CHECKPOINT)
    asker = evaluate.Asker(model, prompts)
    threshold = 0.9
    ratio = 0.1
    layers = model.config.layers
    with Engine(exact, memory="256MiB") as engine, torch.inference_mode():
        for seed in (3, 4, 5):
            scene = make_scene(seed, FRAMES, model.config.image_size)
            rows = evaluate.visual(model, scene.frames)
            for qa in scene.questions[:3]:
                params = fusion.Params(cost, threshold, ratio, layers) if cost else None
                text, state = asker.answer(rows, qa.question, params)
                way: Any = None
                if cost:
                    way = FrameFusion(
                        cost=cost, similarity_lower_bound=threshold, ratio_lower_bound=ratio
                    )
                ours = engine.generate(
                    qa.question, video=scene.frames, reduction=way, sampling=GREEDY
                )
                assert ours.text.strip() == text.strip()
                if state is not None:
                    assert list(ours.usage.kept_per_layer) == state.lengths[:layers]


def test_a_real_clip_goes_through_the_whole_path(packed: Path, clip: Path) -> None:
    """Decode, tower, projector, layer-major prefill, w4 weights, kv8, streamed text, usage."""
    with Engine(packed, kv="kv8", memory="256MiB") as engine:
        answers = {}
        for cost in (None, 0.3):
            way = FrameFusion(cost=cost) if cost else None
            result = engine.generate(
                "what colour is the circle?",
                video=str(clip),
                frames=32,
                reduction=way,
                sampling=GREEDY,
            )
            usage = result.usage
            assert result.finish_reason in ("stop", "length")
            assert usage.visual_tokens == 32 * 20  # 4 x 4 pooled patches and 4 newlines a frame
            assert usage.timings.vision_ms > 0 and usage.timings.prefill_ms > 0
            answers[cost] = usage
        plain, fused = answers[None], answers[0.3]
        assert set(plain.visual_per_layer) == {640}
        shares = np.array(fused.visual_per_layer) / 640
        # Layer l's attention still sees the rows that are removed after it, so the mean over layers
        # may exceed the budget by one layer's share.
        assert shares.mean() <= 0.3 + 1 / len(shares)
        assert fused.kv_bytes < plain.kv_bytes == fused.kv_bytes_unreduced
        again = engine.generate(
            "what colour is the circle?", video=str(clip), frames=32, sampling=GREEDY
        )
        assert again.usage.visual_per_layer == plain.visual_per_layer
        engine.check_integrity()


def test_the_demo_page_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = show.main(["--output", str(tmp_path / "out"), "--no-text-model"])
    printed = capsys.readouterr().out
    assert code == 0
    assert "layer 11" in printed and "FrameFusion" in printed
    assert (tmp_path / "out" / "clip.mp4").stat().st_size > 0
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
    # A second run replaces what the first one made.
    assert show.main(["--output", str(tmp_path / "out"), "--no-text-model"]) == 0
