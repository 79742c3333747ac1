"""Patch grids of any size: fixed 2-D positions, buckets of a learned table, slices of a picture.

Pure functions of sizes, for towers and resamplers that take pictures in their own proportions. The
definitions are those that FrameFusion was published with for MiniCPM-V 2.6 (arXiv 2501.01986).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Size = tuple[int, int]


def sincos_2d(width: int, rows: int, cols: int) -> Floats:
    """Positions [rows, cols, width]: the first half of the channels encodes the column, the second
    the row, each as sines and then cosines of `width / 4` frequencies.

    Raises ValueError when 4 does not divide `width`.
    """
    if width % 4:
        raise ValueError(f"sincos_2d: width {width} is not a multiple of 4")
    quarter = width // 4
    frequencies = 10000.0 ** (-np.arange(quarter) / quarter)

    def axis(count: int) -> npt.NDArray[np.float64]:
        angle = np.arange(count)[:, None] * frequencies
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    out = np.empty((rows, cols, width), np.float32)
    out[:, :, : width // 2] = axis(cols)[None]
    out[:, :, width // 2 :] = axis(rows)[:, None]
    return out


def position_buckets(count: int, table: int) -> npt.NDArray[np.int64]:
    """Cell of a learned table of `table` positions for each of `count` patches along one side.

    Patch i stands at i / count of the side; its cell is the number of boundaries k / table that are
    not above that, both rounded to float32.
    """
    boundaries = (np.arange(1, table) / table).astype(np.float32)
    places = (np.arange(count) / count).astype(np.float32)
    return np.searchsorted(boundaries, places, side="right")


@dataclass(frozen=True)
class Slices:
    """How a picture is cut. Sizes are (width, height) in pixels.

    `overview` is the size of the whole picture; with a `grid` of (columns, rows), the picture is
    resized to `refined` as well and cut into slices of refined / grid.
    """

    overview: Size
    grid: tuple[int, int] | None = None
    refined: Size | None = None


def _multiple(length: float, patch: int) -> int:
    return max(round(length / patch) * patch, patch)


def _fitted(size: tuple[float, float], side: int, patch: int, enlarge: bool) -> Size:
    """Sides that are multiples of `patch`, of an area near side^2, in proportion."""
    width, height = size
    if width * height > side * side or enlarge:
        ratio = width / height
        height = int(side / math.sqrt(ratio))
        width = int(height * ratio)
    return _multiple(width, patch), _multiple(height, patch)


def slice_picture(width: int, height: int, most: int, side: int = 448, patch: int = 14) -> Slices:
    """Cuts a picture of width x height into at most about `most` slices of area side^2.

    Raises ValueError for sizes below 1.
    """
    if min(width, height, most) < 1:
        raise ValueError(f"slice_picture: {width} x {height}, {most} slices")
    wanted = min(math.ceil(width * height / (side * side)), most)
    if wanted <= 1:
        return Slices(_fitted((width, height), side, patch, enlarge=True))
    proportion = math.log(width / height)
    grids = [
        (columns, total // columns)
        for total in (wanted - 1, wanted, wanted + 1)
        if 1 < total <= most
        for columns in range(1, total + 1)
        if total % columns == 0
    ]
    grid = min(grids, key=lambda g: abs(proportion - math.log(g[0] / g[1])))
    cell = (_multiple(width, grid[0]) / grid[0], _multiple(height, grid[1]) / grid[1])
    slice_width, slice_height = _fitted(cell, side, patch, enlarge=True)
    return Slices(
        _fitted((width, height), side, patch, enlarge=False),
        grid,
        (slice_width * grid[0], slice_height * grid[1]),
    )
