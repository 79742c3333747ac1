"""Draws a `World` at any resolution: textured backgrounds, shapes, signs, dots, noise.

All shapes are signed distance functions, so that a 64 pixel training frame and a 256 pixel demo
frame show the same video. Work arrays are float32 [frames, height, width, 3].
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from framequilt.demo.world import (
    CANVAS,
    COLOUR_RGB,
    PLATE_HEIGHT,
    PLATE_WIDTH,
    Plate,
    World,
)

Image = npt.NDArray[np.float32]

_GLYPHS = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111",
    "11110 00001 00001 01110 00001 00001 11110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)
_CELL = 2.2  # canvas units per glyph pixel
_RIM = 1.2  # canvas units of light rim around every shape
_RIM_GREY = np.float32(245.0)
_PAD = 14.0  # canvas units drawn around the visible part


@functools.cache
def _glyph(digit: int) -> npt.NDArray[np.float32]:
    rows = _GLYPHS[digit].split()
    return np.array([[float(c) for c in row] for row in rows], np.float32)


def _texture(seed: int, pixels: int, scale: float) -> Image:
    """A periodic muted texture, [pixels, pixels, 3] in grey levels."""
    rng = np.random.default_rng(seed)
    cells = int(rng.integers(3, 12))
    base = rng.uniform(45.0, 165.0) + rng.uniform(-18.0, 18.0, 3)
    strength = rng.uniform(2.0, 26.0)
    grid = (base + rng.normal(0.0, strength, (cells, cells, 1))).astype(np.float32)
    grid = grid + rng.normal(0.0, 5.0, (cells, cells, 3)).astype(np.float32)
    at = np.arange(pixels, dtype=np.float32) * (cells / pixels)
    low = at.astype(np.int64)
    part = at - low
    high = (low + 1) % cells
    rows = grid[low] * (1 - part)[:, None, None] + grid[high] * part[:, None, None]
    out: Image = rows[:, low] * (1 - part)[:, None] + rows[:, high] * part[:, None]
    for _ in range(int(rng.integers(0, 5))):  # furniture: muted boxes
        x, y, w, h = rng.uniform(0, 110, 2).tolist() + rng.uniform(3, 30, 2).tolist()
        shade = np.float32(rng.uniform(-35, 35))
        ys, xs = (
            slice(int(y * scale), int((y + h) * scale)),
            slice(int(x * scale), int((x + w) * scale)),
        )
        out[ys, xs] += shade
    return out


def _distance(shape: int, dx: Image, dy: Image, r: float) -> Image:
    """Signed distance in pixels, negative inside; dx, dy broadcast to [frames, w, w]."""
    ax, ay = np.abs(dx), np.abs(dy)
    if shape == 0:
        out = np.sqrt(dx * dx + dy * dy) - r
    elif shape == 1:
        out = np.maximum(ax, ay) - 0.86 * r
    elif shape == 2:
        side = (ax * 1.7 - (dy + r) * 0.95) / 1.947
        out = np.maximum(side, dy - 0.7 * r)
    else:
        arm = 0.38 * r
        out = np.minimum(np.maximum(ax - r, ay - arm), np.maximum(ax - arm, ay - r))
    result: Image = out.astype(np.float32)
    return result


def _stamp(
    canvas: Image,
    frames: npt.NDArray[np.int64],
    centres: Image,
    shape: int,
    r: float,
    rgb: Image,
    mask: Image | None = None,
    rim: float = 0.0,
) -> None:
    """Blends one shape into `canvas` [F, H, W, 3] at pixel `centres` [len(frames), 2].

    `mask` [F, H, W] receives the coverage of the shape; `rim` pixels at its edge are light.
    """
    w = int(np.ceil(2 * (r + 1.5)))
    corner = np.floor(centres - w / 2).astype(np.int64)
    corner = np.clip(corner, 0, np.array([canvas.shape[2] - w, canvas.shape[1] - w]))
    xs = corner[:, :1] + np.arange(w)
    ys = corner[:, 1:] + np.arange(w)
    dx = (xs + 0.5 - centres[:, :1]).astype(np.float32)[:, None, :]
    dy = (ys + 0.5 - centres[:, 1:]).astype(np.float32)[:, :, None]
    distance = _distance(shape, dx, dy, r)
    alpha = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    if rim > 0.0:
        edge = np.clip(0.5 + distance + rim, 0.0, 1.0)[..., None]
        rgb = rgb + edge * (_RIM_GREY - rgb)
    where = (frames[:, None, None], ys[:, :, None], xs[:, None, :])
    old = canvas[where]
    canvas[where] = old + alpha * (rgb - old)
    if mask is not None:
        mask[where] = np.maximum(mask[where], alpha[..., 0])


def _stamp_plate(canvas: Image, plate: Plate, offset: Image, scale: float) -> None:
    cx, cy = plate.x * scale + float(offset[0]), plate.y * scale + float(offset[1])
    half_w, half_h = PLATE_WIDTH * scale / 2, PLATE_HEIGHT * scale / 2
    x0, x1 = int(cx - half_w) - 1, int(cx + half_w) + 2
    y0, y1 = int(cy - half_h) - 1, int(cy + half_h) + 2
    sub = 3
    fine = (np.arange(sub) + 0.5) / sub
    xs = (np.arange(x0, x1)[:, None] + fine).ravel() - cx
    ys = (np.arange(y0, y1)[:, None] + fine).ravel() - cy
    inside = (np.abs(ys) <= half_h)[:, None] & (np.abs(xs) <= half_w)[None]
    col = np.floor(xs / (_CELL * scale) + 2.5).astype(np.int64)
    row = np.floor(ys / (_CELL * scale) + 3.5).astype(np.int64)
    glyph = np.zeros((9, 7), np.float32)
    glyph[1:8, 1:6] = _glyph(plate.digit)
    ink = glyph[np.clip(row + 1, 0, 8)[:, None], np.clip(col + 1, 0, 6)[None]]
    value = (245.0 - 225.0 * ink) * inside

    def shrink(a: npt.NDArray[np.floating[Any]]) -> Image:
        out: Image = a.reshape(y1 - y0, sub, x1 - x0, sub).mean((1, 3)).astype(np.float32)
        return out

    alpha, colour = shrink(inside.astype(np.float64)), shrink(value)
    region = canvas[plate.frame, y0:y1, x0:x1]
    region *= (1.0 - alpha)[..., None].astype(np.float32)
    region += colour[..., None].astype(np.float32)


@functools.cache
def _noise_bank() -> Image:
    return np.random.default_rng(7).standard_normal((4, 320, 320, 3)).astype(np.float32)


def shake_offsets(world: World) -> Image:
    """Camera offset of each frame in canvas units, [frames, 2]."""
    rng = np.random.default_rng(world.look)
    jitter = rng.normal(0.0, 0.7, (world.frames, 2)).clip(-1.5, 1.5) * world.shake
    return jitter.astype(np.float32)


def render(world: World, size: int) -> npt.NDArray[np.uint8]:
    """Draws every frame of `world`, uint8 [frames, size, size, 3], RGB."""
    return render_with_mask(world, size)[0]


def render_with_mask(
    world: World, size: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """`render` and how far each pixel is covered by shapes, float32 [frames, size, size]."""
    frames, scale = world.frames, size / CANVAS
    rng = np.random.default_rng(world.look + 1)
    pad = int(np.ceil(_PAD * scale))
    full = size + 2 * pad
    shake = shake_offsets(world) * scale
    times = world.times
    canvas = np.empty((frames, full, full, 3), np.float32)
    mask = np.zeros((frames, full, full), np.float32)
    period = int(128 * scale)
    sheets = []
    for seed in world.backgrounds:
        sheet = _texture(seed, period, scale)
        sheets.append(np.concatenate([sheet, sheet[:full]], 0))
    sheets = [np.concatenate([s, s[:, :full]], 1) for s in sheets]
    slide = times[:, None] * np.array(world.scroll) * scale
    start = np.round(slide - shake).astype(np.int64) % period
    gain = 1.0 + rng.normal(0.0, 0.02, frames)
    for f in range(frames):
        sheet = sheets[1 if times[f] >= world.cut else 0]
        x, y = start[f]
        canvas[f] = sheet[y : y + full, x : x + full]
    shift = shake + pad
    for _ in range(world.dots):  # distractors: small grey dots that drift
        at = rng.uniform(0, CANVAS, 2) + times[:, None] * rng.uniform(-30, 30, 2)
        at = (at % CANVAS) * scale + shift
        grey = np.full(3, rng.uniform(20, 235), np.float32)
        radius = float(rng.uniform(0.8, 1.7)) * scale
        _stamp(canvas, np.arange(frames), at.astype(np.float32), 0, radius, grey)
    tracks, visible = world.tracks(), world.visible()
    for k, actor in enumerate(world.actors):
        rgb = np.array(COLOUR_RGB[actor.colour], np.float32)
        rgb = (rgb * rng.uniform(0.85, 1.08) + rng.normal(0, 8, 3)).astype(np.float32)
        shown = np.flatnonzero(visible[k])
        if shown.size:
            at = tracks[k, shown] * scale + shift[shown]
            r, rim = actor.radius * scale, _RIM * scale
            _stamp(canvas, shown, at.astype(np.float32), actor.shape, r, rgb, mask, rim)
    for plate in world.plates:
        _stamp_plate(canvas, plate, shift[plate.frame], scale)
    view = canvas[:, pad : pad + size, pad : pad + size]
    if world.blur:
        view = 0.5 * view + 0.25 * (
            canvas[:, pad - 1 : pad + size - 1, pad : pad + size]
            + canvas[:, pad : pad + size, pad - 1 : pad + size - 1]
        )
    view = view * gain[:, None, None, None].astype(np.float32)
    if world.noise > 0.5:
        bank = _noise_bank()
        limit = bank.shape[1] - size + 1
        for f in range(frames):
            x, y = rng.integers(limit, size=2)
            view[f] += world.noise * bank[f % 4, y : y + size, x : x + size]
    out: npt.NDArray[np.uint8] = np.clip(view + 0.5, 0, 255).astype(np.uint8)
    return out, mask[:, pad : pad + size, pad : pad + size]
