"""Frame selection against tables made by the published code, and its edges."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framequilt.errors import InvalidArgument
from framequilt.vision import selection

SHARED = Path(os.environ.get("FRAMEQUILT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
GOLDEN = SHARED / "golden/framefusion/vision_units.json"


def golden(model):
    if not GOLDEN.is_file():
        pytest.skip(f"no golden vectors at {GOLDEN}")
    cases = json.loads(GOLDEN.read_text())["frame_sampling"]
    return [c for c in cases if c["model"] == model]


def test_fps_rule_reproduces_the_published_tables():
    cases = golden("llava_video")
    assert len(cases) >= 6
    for case in cases:
        got = selection.select_fps(
            case["total_frames"], case["avg_fps"], case["max_frames"], 1.0, case["force_sample"]
        )
        assert list(got.indices) == case["frame_idx"]
        assert ",".join(f"{t:.2f}s" for t in got.times) == case["frame_time_string"]
        assert f"{got.duration:.2f}" == case["video_time"]


def test_centres_rule_reproduces_the_published_tables():
    cases = golden("minicpmv")
    assert len(cases) >= 3
    for case in cases:
        got = selection.select_centres(case["total_frames"], case["avg_fps"], case["max_frames"])
        assert list(got.indices) == case["frame_idx"]


def test_uniform_includes_both_ends_and_repeats_nothing():
    assert selection.select_uniform(100, 10.0, 5).indices == (0, 24, 49, 74, 99)
    assert selection.select_uniform(3, 10.0, 64).indices == (0, 1, 2)


@given(
    total=st.integers(1, 5000),
    fps=st.floats(0.5, 240),
    limit=st.integers(1, 128),
    wanted=st.floats(0.05, 60),
    rule=st.sampled_from(["fps", "force", "centres", "uniform"]),
)
def test_every_rule_stays_inside_the_clip_and_in_order(total, fps, limit, wanted, rule):
    got = {
        "fps": lambda: selection.select_fps(total, fps, limit, wanted, force=False),
        "force": lambda: selection.select_fps(total, fps, limit, wanted, force=True),
        "centres": lambda: selection.select_centres(total, fps, limit, wanted),
        "uniform": lambda: selection.select_uniform(total, fps, limit),
    }[rule]()
    assert 1 <= len(got.indices) <= limit and len(got.times) == len(got.indices)
    assert list(got.indices) == sorted(got.indices)
    assert got.indices[0] >= 0 and got.indices[-1] < total
    assert list(got.times) == sorted(got.times)


@pytest.mark.parametrize(
    "total,fps,limit", [(0, 25.0, 8), (10, 0.0, 8), (10, float("nan"), 8), (10, 25.0, 0)]
)
def test_impossible_requests_are_refused(total, fps, limit):
    with pytest.raises(InvalidArgument):
        selection.select_fps(total, fps, limit)


def test_frames_on_screen_is_the_last_that_has_started():
    starts = [0.0, 0.1, 0.5, 0.9]
    assert selection.frames_on_screen(starts, [0.0, 0.0999, 0.1, 0.4, 0.5, 7.0]) == (
        (0, 0, 1, 1, 2, 3)
    )
