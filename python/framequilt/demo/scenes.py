"""Public face of the generator: a seed in, a video with questions and answers out.

Seeds below HELD_OUT_END are never used for training; `evaluate` and the engine's own evaluation
draw from them. Needs numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from framequilt.demo.questions import KINDS, QA, all_questions, pick
from framequilt.demo.render import render
from framequilt.demo.world import World, sample_world

__all__ = ["HELD_OUT_END", "KINDS", "QA", "Scene", "make_scene", "make_world"]

HELD_OUT_END = 1_000_000_000


@dataclass(frozen=True)
class Scene:
    """A generated video, uint8 [frames, size, size, 3] RGB, and questions about it."""

    seed: int
    frames: npt.NDArray[np.uint8]
    questions: list[QA]


def make_world(seed: int, frames: int) -> tuple[World, list[QA]]:
    """The world of a seed and at most one question of each kind."""
    rng = np.random.default_rng(seed)
    world = sample_world(rng, frames)
    return world, pick(all_questions(world, rng), rng, 1, len(KINDS))


def make_scene(seed: int, frames: int = 32, size: int = 64) -> Scene:
    """Draws the video of `seed` with square frames of `size` pixels.

    Not every kind of question fits every video; `questions` holds at most one of each kind.
    The content does not depend on `size`, the pixel noise does.
    """
    if seed < 0 or frames < 1 or size < 16:
        raise ValueError(
            f"make_scene: seed {seed}, frames {frames}, size {size}; "
            "wants seed >= 0, frames >= 1, size >= 16"
        )
    world, questions = make_world(seed, frames)
    return Scene(seed, render(world, size), questions)
