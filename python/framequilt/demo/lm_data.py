"""Batches for the language model: videos, several questions each, dense auxiliary labels."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from framequilt.demo.labels import IGNORE
from framequilt.demo.model import DemoConfig
from framequilt.demo.questions import KINDS, QA, all_questions, pick
from framequilt.demo.render import render_with_mask, shake_offsets
from framequilt.demo.tokenizer import Prompts
from framequilt.demo.world import (
    CANVAS,
    PLATE_HEIGHT,
    PLATE_WIDTH,
    STILL,
    World,
    sample_world,
)

Ints = npt.NDArray[np.int64]

LM_SEED_BASE = 2_000_000_000
LATE = 32  # classes of the frame-index label
SHAPES_OF_BATCH = {1: (28, 5), 2: (18, 7), 4: (12, 9), 8: (8, 10), 16: (5, 12), 32: (3, 14)}


@dataclass
class Plan:
    """What may be changed while a run goes on: RUN/control.json, read before every batch."""

    lr: float = 1.5e-3
    mix: dict[str, float] = field(default_factory=lambda: {"1": 0.5, "4": 0.5})
    merge: float = 0.0  # share of batches with merged visual tokens
    drop: float = 0.0  # share of those whose survivors are thinned at random
    fused: float = 0.0  # share of batches under FrameFusion itself, drawn before `merge`
    fused_questions: int = 8  # questions per video in those
    rank: float = 0.0  # weight of the loss that teaches the pruning layer where things are
    aux: float = 0.5  # weight of the dense auxiliary loss
    vision_lr: float = 0.0  # 0 keeps the projector fixed
    train_tower: bool = False  # else the tower is fixed even when the projector is not
    follow_tower: bool = False  # reload RUN/tower.pt whenever it is newer
    skip: dict[str, float] = field(default_factory=dict)  # kind -> chance to leave it out
    each: int = 2  # questions of a kind per video

    @classmethod
    def read(cls, run: Path) -> Plan:
        """The plan in RUN, defaults where the file or a key is missing."""
        path = run / "control.json"
        if not path.exists():
            return cls()
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass
class VideoBatch:
    """B videos of F frames with up to Q questions of up to T tokens each."""

    frames: npt.NDArray[np.uint8]  # [B, F, size, size, 3]
    tokens: Ints  # [B, Q, T] question, answer, padding
    targets: Ints  # [B, Q, T] next token where it belongs to the answer, else IGNORE
    kinds: Ints  # [B, Q] index into KINDS, -1 padding
    motion: Ints  # [B, F, C, C] direction or STILL of the shape centred here, IGNORE elsewhere
    partner: Ints  # [B, F, C, C] colour that the shape centred here touches now
    origin: Ints  # [B, F, C, C] cell (row * C + column) where the shape centred here began
    thing: Ints  # [B, F, C, C] 1 where a shape or the sign covers part of the cell
    plan: Plan


def auxiliary_labels(world: World, cells: int) -> tuple[Ints, Ints, Ints]:
    """`motion`, `partner` and `origin` of one video, [F, C, C] each; frames up to now decide."""
    frames = world.frames
    motion = np.full((frames, cells, cells), IGNORE, np.int64)
    partner = np.full_like(motion, IGNORE)
    origin = np.full_like(motion, IGNORE)
    tracks, visible = world.tracks(), world.visible()
    at = ((tracks + shake_offsets(world)) * (cells / CANVAS)).astype(np.int64)
    at = np.clip(at, 0, cells - 1)
    times, index = world.times, np.arange(frames)
    for k, actor in enumerate(world.actors):
        shown = visible[k]
        if not shown.any():
            continue
        begin = int(shown.argmax())
        start = tracks[k, begin]
        far = np.abs(tracks[k] - start).max(-1)
        x, y = at[k, :, 0], at[k, :, 1]
        origin[index[shown], y[shown], x[shown]] = y[begin] * cells + x[begin]
        if actor.motion == STILL:
            rows = shown & (index >= 2)
            motion[index[rows], y[rows], x[rows]] = STILL
        elif actor.motion < STILL:
            rows = shown & (far >= 7.0)
            motion[index[rows], y[rows], x[rows]] = actor.motion
        if world.touch is not None and k in (world.touch.mover, world.touch.target):
            other = world.touch.target if k == world.touch.mover else world.touch.mover
            rows = (times >= world.touch.begin) & (times <= world.touch.end)
            partner[index[rows], y[rows], x[rows]] = world.actors[other].colour
    return motion, partner, origin


def things(world: World, mask: npt.NDArray[np.float32], cells: int) -> Ints:
    """1 where shapes (`mask` [F, size, size]) or the sign cover a tenth of a cell, [F, C, C]."""
    frames, size = mask.shape[:2]
    step = size // cells
    share = mask.reshape(frames, cells, step, cells, step).mean((2, 4))
    out: Ints = (share > 0.1).astype(np.int64)
    edges = np.arange(cells) * (CANVAS / cells)
    for plate in world.plates:
        x, y = np.array([plate.x, plate.y]) + shake_offsets(world)[plate.frame]
        across, down = (
            np.minimum(edges + CANVAS / cells, at + length / 2) - np.maximum(edges, at - length / 2)
            for at, length in ((x, PLATE_WIDTH), (y, PLATE_HEIGHT))
        )
        area = np.maximum(down, 0.0)[:, None] * np.maximum(across, 0.0)
        out[plate.frame] |= area > 0.1 * (CANVAS / cells) ** 2
    return out


def encode(prompts: Prompts, rows: list[list[QA]]) -> tuple[Ints, Ints, Ints]:
    """tokens, targets and kinds of a batch of question lists."""
    wide = max(len(r) for r in rows)
    pairs = [[(prompts.question(q.question), prompts.answer(q.answer)) for q in r] for r in rows]
    long = max(len(a) + len(b) for r in pairs for a, b in r) - 1
    tokens = np.full((len(rows), wide, long), prompts.pad, np.int64)
    targets = np.full_like(tokens, IGNORE)
    kinds = np.full((len(rows), wide), -1, np.int64)
    for i, row in enumerate(pairs):
        for j, (question, answer) in enumerate(row):
            ids = question + answer
            tokens[i, j, : len(ids) - 1] = ids[:-1]
            targets[i, j, len(question) - 1 : len(ids) - 1] = answer
            kinds[i, j] = KINDS.index(rows[i][j].kind)
    return tokens, targets, kinds


def video_batch(
    config: DemoConfig, prompts: Prompts, plan: Plan, index: int, scale: float = 1.0
) -> VideoBatch:
    """Batch `index` of a run: the frame count is drawn from the plan's mix."""
    rng = np.random.default_rng([LM_SEED_BASE, index])
    names = list(plan.mix)
    share = np.array([plan.mix[n] for n in names])
    frames = int(names[int(rng.choice(len(names), p=share / share.sum()))])
    videos, wide = SHAPES_OF_BATCH[frames]
    videos = max(1, int(videos * scale))
    pictures, questions, motion, partner, origin, thing = [], [], [], [], [], []
    for k in range(videos):
        seed = LM_SEED_BASE + index * 64 + k
        world_rng = np.random.default_rng(seed)
        world = sample_world(world_rng, frames)
        known = all_questions(world, world_rng)
        left = [q for q in known if world_rng.random() >= plan.skip.get(q.kind, 0.0)]
        asked = pick(left or known, world_rng, plan.each, wide)
        picture, mask = render_with_mask(world, config.image_size)
        pictures.append(picture)
        thing.append(things(world, mask, config.cells))
        questions.append(asked)
        labels = auxiliary_labels(world, config.cells)
        motion.append(labels[0])
        partner.append(labels[1])
        origin.append(labels[2])
    tokens, targets, kinds = encode(prompts, questions)
    return VideoBatch(
        np.stack(pictures),
        tokens,
        targets,
        kinds,
        np.stack(motion),
        np.stack(partner),
        np.stack(origin),
        np.stack(thing),
        plan,
    )
