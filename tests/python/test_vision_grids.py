"""Patch grids against the published vectors, and their own properties."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from oracles.shared import shared
from safetensors.numpy import load_file

from framequilt.vision.grids import position_buckets, sincos_2d, slice_picture

FOLDER = ("golden", "framefusion")


def test_fixed_positions_equal_the_published_ones() -> None:
    golden = load_file(shared(*FOLDER, "vision_units.safetensors"))
    # Angles up to 70 in float32: 70 * 2^-24 from the angle, 2^-24 from storing.
    bound = 71 * 2.0**-24
    small = golden["sincos2d.dim16_h3_w5"]
    assert np.abs(sincos_2d(16, 3, 5) - small).max() <= bound
    large = golden["sincos2d.dim3584_70x70_row2_col7"]
    assert np.abs(sincos_2d(3584, 70, 70)[2, 7] - large).max() <= bound


def test_buckets_equal_the_published_ones() -> None:
    for case in json.loads(shared(*FOLDER, "vision_units.json").read_text())[
        "navit_position_buckets"
    ]:
        side = case["grid_side"]
        assert position_buckets(case["patches_h"], side).tolist() == case["rows"]
        assert position_buckets(case["patches_w"], side).tolist() == case["cols"]


def test_slices_equal_the_published_table() -> None:
    cases = json.loads(shared(*FOLDER, "vision_units.json").read_text())["minicpmv_slicing"]
    assert cases
    for case in cases:
        cut = slice_picture(case["width"], case["height"], case["max_slice_nums"])
        found = [list(part) if part else None for part in (cut.grid, cut.overview, cut.refined)]
        assert found == [case["grid_cols_rows"], case["overview_size"], case["refine_size"]], case


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 12))
def test_every_part_is_a_whole_number_of_patches(width: int, height: int, most: int) -> None:
    cut = slice_picture(width, height, most)
    assert all(side >= 14 and side % 14 == 0 for side in cut.overview)
    if cut.grid is None:
        assert cut.refined is None
        return
    assert cut.refined is not None
    assert 1 < cut.grid[0] * cut.grid[1] <= most
    for whole, parts in zip(cut.refined, cut.grid, strict=True):
        assert whole % (14 * parts) == 0


@given(st.integers(1, 200), st.integers(1, 100))
def test_buckets_ascend_inside_the_table(count: int, table: int) -> None:
    cells = position_buckets(count, table)
    assert cells[0] == 0 and cells[-1] < table
    assert (np.diff(cells) >= 0).all()


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_2d(10, 2, 2)
    with pytest.raises(ValueError, match="0 x 5"):
        slice_picture(0, 5, 2)
