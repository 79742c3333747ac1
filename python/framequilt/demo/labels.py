"""Dense labels that the generator knows for free: what is in each cell of each frame.

`IGNORE` marks cells that show too little of a thing to be fair either way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from framequilt.demo.render import shake_offsets
from framequilt.demo.world import CANVAS, COLOURS, PLATE_HEIGHT, PLATE_WIDTH, SHAPES, World

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

IGNORE = -100
PATCH_CLASSES = len(COLOURS) * len(SHAPES) + 1


@dataclass
class DenseLabels:
    """Labels of one video; G = patches per side, C = pooled cells per side."""

    patch: Ints  # [F, G, G] 0 none, 1 + colour * shapes + shape
    patch_digit: Ints  # [F, G, G] 0 none, 1 + digit
    cell_shape: Ints  # [F, C, C, colours] 0 none, 1 + shape
    cell_digit: Ints  # [F, C, C] 0 none, 1 + digit
    cell_share: npt.NDArray[np.float32]  # [F, C, C, colours] share of the shape inside the cell
    cell_touch: Ints  # [F, C, C] 1 where a touching shape is


def _overlap(centre: Floats, half: Floats, grid: int) -> Floats:
    """Length of [centre - half, centre + half] inside each of `grid` equal bins, [..., grid]."""
    edge = CANVAS / grid * np.arange(grid + 1)
    high = np.minimum(centre[..., None] + half[..., None], edge[1:])
    low = np.maximum(centre[..., None] - half[..., None], edge[:-1])
    out: Floats = np.clip(high - low, 0.0, None)
    return out


def _areas(centres: Floats, half_w: Floats, half_h: Floats, grid: int) -> Floats:
    """Overlap area of boxes with grid cells, [..., row, column]."""
    across = _overlap(centres[..., 0], half_w, grid)
    down = _overlap(centres[..., 1], half_h, grid)
    return down[..., :, None] * across[..., None, :]


def dense_labels(world: World, patches: int, cells: int) -> DenseLabels:
    """Computes the labels of every frame from the world's geometry."""
    frames = world.frames
    shake = shake_offsets(world).astype(np.float64)
    patch = np.zeros((frames, patches, patches), np.int64)
    patch_digit = np.zeros_like(patch)
    cell_shape = np.zeros((frames, cells, cells, len(COLOURS)), np.int64)
    cell_digit = np.zeros((frames, cells, cells), np.int64)
    cell_share = np.zeros((frames, cells, cells, len(COLOURS)), np.float32)
    cell_touch = np.zeros((frames, cells, cells), np.int64)
    tracks = world.tracks() + shake
    visible = world.visible()
    times = world.times
    patch_area = (CANVAS / patches) ** 2
    touching = np.zeros((len(world.actors), frames), bool)
    if world.touch is not None:
        now = (times >= world.touch.begin) & (times <= world.touch.end)
        touching[world.touch.mover] = now
        touching[world.touch.target] = now
    for k, actor in enumerate(world.actors):
        half = np.full(frames, 0.85 * actor.radius)
        area = _areas(tracks[k], half, half, patches) * visible[k][:, None, None]
        part = area / patch_area
        patch[(part > 0.05) & (part < 0.4) & (patch == 0)] = IGNORE
        patch[part >= 0.4] = 1 + actor.colour * len(SHAPES) + actor.shape
        inside = _areas(tracks[k], half, half, cells) * visible[k][:, None, None]
        share = inside / (2 * half[0]) ** 2
        target = cell_shape[..., actor.colour]
        target[share > 0.08] = IGNORE
        target[share >= 0.3] = 1 + actor.shape
        cell_share[..., actor.colour] = share
        cell_touch[(share >= 0.3) & touching[k][:, None, None]] = 1
    half_w, half_h = np.array([PLATE_WIDTH / 2]), np.array([PLATE_HEIGHT / 2])
    for plate in world.plates:
        f = plate.frame
        centre = np.array([[plate.x, plate.y]]) + shake[f]
        part = _areas(centre, half_w, half_h, patches)[0] / patch_area
        patch_digit[f][part > 0.2] = IGNORE
        patch_digit[f][part >= 0.5] = 1 + plate.digit
        patch[f][part > 0.2] = IGNORE
        share = _areas(centre, half_w, half_h, cells)[0] / (PLATE_WIDTH * PLATE_HEIGHT)
        cell_digit[f][share > 0.08] = IGNORE
        cell_digit[f][share >= 0.3] = 1 + plate.digit
        cell_shape[f][(share > 0.2)[..., None] & (cell_shape[f] > 0)] = IGNORE
    return DenseLabels(patch, patch_digit, cell_shape, cell_digit, cell_share, cell_touch)
