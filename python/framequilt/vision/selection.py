"""Which frames of a clip are looked at: the published sampling rules, as pure functions.

Every function maps (frames in the clip, average frame rate) to indices in presentation order and
times in seconds. Nothing is decoded here.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from framequilt.errors import InvalidArgument


@dataclass(frozen=True)
class Selection:
    """Chosen frames: indices into the clip, their times and the clip's length, in seconds."""

    indices: tuple[int, ...]
    times: tuple[float, ...]
    duration: float


def _check(total: int, avg_fps: float, max_frames: int) -> None:
    if total < 1:
        raise InvalidArgument(f"a clip of {total} frames has nothing to sample")
    if not avg_fps > 0 or avg_fps == float("inf"):
        raise InvalidArgument(f"frame rate must be positive and finite, got {avg_fps}")
    if max_frames < 1:
        raise InvalidArgument(f"max_frames must be at least 1, got {max_frames}")


def uniform_indices(total: int, count: int) -> tuple[int, ...]:
    """`count` indices from 0 to total-1 inclusive at equal distances, truncated to integers."""
    return tuple(int(i) for i in np.linspace(0, total - 1, count, dtype=int))


def select_fps(
    total: int, avg_fps: float, max_frames: int = 64, fps: float = 1.0, force: bool = True
) -> Selection:
    """Every round(avg_fps / fps)-th frame; `max_frames` uniform ones if there are too many.

    `force` takes exactly `max_frames` uniform frames in any case. Times are index / avg_fps when
    uniform frames replaced the steps, index / step (at fps 1) otherwise, which is what the
    LLaVA-Video models saw in training. A clip shorter than `max_frames` is not blown up by
    repetition unless `force` asks for it.
    """
    _check(total, avg_fps, max_frames)
    if not fps > 0:
        raise InvalidArgument(f"fps must be positive, got {fps}")
    step = max(1, round(avg_fps / fps))
    indices = tuple(range(0, total, step))
    duration = total / avg_fps
    if force or len(indices) > max_frames:
        indices = uniform_indices(total, max_frames)
        return Selection(indices, tuple(i / avg_fps for i in indices), duration)
    return Selection(indices, tuple(i / (step * fps) for i in indices), duration)


def select_uniform(total: int, avg_fps: float, max_frames: int = 64) -> Selection:
    """`max_frames` frames at equal distances, first and last included (lmms-eval's rule)."""
    _check(total, avg_fps, max_frames)
    indices = uniform_indices(total, min(max_frames, total))
    return Selection(indices, tuple(i / avg_fps for i in indices), total / avg_fps)


def select_centres(total: int, avg_fps: float, max_frames: int = 64, fps: float = 1.0) -> Selection:
    """Steps of round(avg_fps / fps); too many are thinned to the middles of equal stretches.

    The thinning takes candidate int(i * gap + gap / 2) with gap = candidates / max_frames, as
    MiniCPM-V 2.6 does.
    """
    _check(total, avg_fps, max_frames)
    if not fps > 0:
        raise InvalidArgument(f"fps must be positive, got {fps}")
    indices = tuple(range(0, total, max(1, round(avg_fps / fps))))
    if len(indices) > max_frames:
        gap = len(indices) / max_frames
        indices = tuple(indices[int(i * gap + gap / 2)] for i in range(max_frames))
    return Selection(indices, tuple(i / avg_fps for i in indices), total / avg_fps)


def frames_on_screen(presentation: Sequence[float], times: Sequence[float]) -> tuple[int, ...]:
    """For each time (seconds) the index of the frame shown then: the last one that has started.

    `presentation` is sorted; a time before the first frame gives the first one. One microsecond
    of slack keeps a time that was rounded when it was printed on its own frame.
    """
    if not presentation:
        raise InvalidArgument("a clip of 0 frames has nothing to sample")
    return tuple(max(0, bisect.bisect_right(presentation, t + 1e-6) - 1) for t in times)
