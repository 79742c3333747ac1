"""The weight quantizer and the tiled layouts, against golden vectors, torch and the contract."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framequilt.errors import CorruptModel, InvalidArgument, Unsupported
from framequilt.quantize import (
    WeightFormat,
    dequantize,
    from_bf16,
    pack_rows,
    parse_format,
    parse_scheme,
    quantize,
    to_bf16,
    unpack_linear,
)
from framequilt.quantize.formats import GROUPS, round_up

sys.path.insert(0, str(Path(__file__).parent))
SHARED = Path(os.environ.get("FRAMEQUILT_SHARED", Path(__file__).parents[3] / "shared"))
GOLDEN = SHARED / "golden" / "quantization"

FORMATS = [WeightFormat("f32"), WeightFormat("bf16")] + [
    WeightFormat("affine", bits, group, symmetric, scale)
    for bits in (4, 8)
    for group in GROUPS
    for symmetric in (False, True)
    for scale in ("f16", "f32")
]


def weights(seed: int, rows: int, inputs: int, scale: float = 1.0) -> Any:
    return (np.random.default_rng(seed).standard_normal((rows, inputs)) * scale).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_codes_scales_and_zeros_equal_the_reference(bits: int, symmetric: bool, group: int) -> None:
    if not GOLDEN.is_dir():
        pytest.skip("the golden vectors are not here (FRAMEQUILT_SHARED)")
    from safetensors.numpy import load_file

    x = load_file(GOLDEN / "inputs.safetensors")["weight"]
    golden = load_file(GOLDEN / "weight_fp32.safetensors")
    case = f"w{bits}_{'sym' if symmetric else 'asym'}_g{group or 'row'}"
    made = quantize(x, bits=bits, group=group, symmetric=symmetric, scale="f32", range_="reference")
    offset = 2 ** (bits - 1) if symmetric else 0
    codes = made.codes.astype(int) - offset
    assert (codes == golden[f"{case}.q"].reshape(x.shape)).all()
    assert (made.scales.reshape(-1) == golden[f"{case}.scale"].reshape(-1)).all()
    if not symmetric:
        assert (made.zeros.reshape(-1) == golden[f"{case}.zero"].reshape(-1)).all()
    if f"{case}.dq" in golden:
        assert (dequantize(made) == golden[f"{case}.dq"].reshape(x.shape)).all()


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 5),
    inputs=st.integers(1, 200),
    bits=st.integers(2, 8),
    group=st.sampled_from(GROUPS),
    symmetric=st.booleans(),
    half=st.booleans(),
    exponent=st.integers(-20, 8),
    shift=st.floats(-3, 3),
)
def test_no_weight_is_off_by_more_than_half_a_step(
    seed: int,
    rows: int,
    inputs: int,
    bits: int,
    group: int,
    symmetric: bool,
    half: bool,
    exponent: int,
    shift: float,
) -> None:
    """|x - stored| <= scale / 2, and for a float16 scale that was rounded down by up to 2^-11 of
    itself, that much more of the range. Range extended to zero; exact in the absence of rounding:
    max / scale + zero <= 2^bits - 1 + 1/2, so clamping costs half a step at most."""
    x = weights(seed, rows, inputs, 2.0**exponent) + np.float32(shift * 2.0**exponent)
    made = quantize(x, bits=bits, group=group, symmetric=symmetric, scale="f16" if half else "f32")
    size = group or inputs
    owner = np.arange(inputs) // size
    step = made.scales[:, owner].astype(np.float64)
    levels = 2**bits - 1
    bound = step * (0.5 + (levels * 2.0**-11 if half else 0)) + np.abs(x) * 2.0**-22
    assert (np.abs(dequantize(made) - x.astype(np.float64)) <= bound).all()


def test_zero_stays_exactly_zero() -> None:
    x = weights(1, 4, 64)
    x[:, ::3] = 0
    for symmetric in (False, True):
        back = dequantize(quantize(x, bits=4, group=32, symmetric=symmetric))
        assert (back[x == 0] == 0).all()


def test_the_production_range_keeps_groups_without_a_sign_change() -> None:
    x = np.linspace(2.0, 2.25, 32, dtype=np.float32)[None]
    kept = dequantize(quantize(x, bits=8, group=32))
    assert np.abs(kept - x).max() <= 2.25 / 255 * 0.51 + 2.25 * 2**-11
    lost = dequantize(quantize(x, bits=8, group=32, range_="reference"))
    assert lost.max() < 0.26  # what the reference does: documented, and not the default


def test_tiny_weights_survive_float16_scales() -> None:
    """Scales below float16's normal range are rounded up: nothing is clipped."""
    x = weights(2, 8, 128, 3e-6)
    made = quantize(x, bits=8, group=128)
    assert (made.scales > 0).all()
    assert (np.abs(dequantize(made) - x) <= made.scales * 0.5 * (1 + 1e-5)).all()


def test_what_cannot_be_quantized_is_refused() -> None:
    x = weights(3, 2, 32)
    for value in (np.nan, np.inf, -np.inf):
        bad = x.copy()
        bad[1, 7] = value
        with pytest.raises(CorruptModel):
            quantize(bad, bits=4, group=32)
    with pytest.raises(Unsupported, match="float16"):
        quantize(x * np.float32(1e8), bits=4, group=32)
    for bits in (1, 9):
        with pytest.raises(InvalidArgument):
            quantize(x, bits=bits, group=32)


@settings(deadline=None, max_examples=60)
@given(
    form=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**32 - 1),
    out=st.integers(1, 40),
    inputs=st.integers(1, 200),
)
def test_packing_loses_nothing(form: WeightFormat, seed: int, out: int, inputs: int) -> None:
    x = weights(seed, out, inputs)
    packed, stored = pack_rows(x, form)
    infos = {info.name[1:]: info for info in form.tensors("", out, inputs)}
    assert set(packed) == set(infos)
    for suffix, data in packed.items():
        assert data.shape == infos[suffix].shape and data.nbytes == infos[suffix].bytes
    assert sum(data.nbytes for data in packed.values()) == form.stored_bytes(out, inputs)
    assert (unpack_linear(form, out, inputs, lambda suffix: packed[suffix]) == stored).all()


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("out, inputs", [(1, 1), (16, 64), (21, 75), (40, 129)])
def test_bytes_lie_where_the_contract_says(form: WeightFormat, out: int, inputs: int) -> None:
    """Reads single weights by the formulas of engine/CONTRACT.md, 1.3, and pads as it says."""
    x = weights(7, out, inputs)
    packed, stored = pack_rows(x, form)
    rows = round_up(out, 16)
    assert all(len(data) == rows // 8 for data in packed.values())
    if form.kind != "affine":
        flat = packed["weight"].reshape(-1)
        for row in range(rows):
            for col in range(inputs):
                tile, r = divmod(row, 8)
                if form.kind == "f32":
                    value = flat[(tile * inputs + col) * 8 + r]
                else:
                    pair = (tile * -(-inputs // 2) + col // 2) * 16 + r * 2 + col % 2
                    value = from_bf16(flat[pair : pair + 1])[0]
                assert value == (stored[row, col] if row < out else 0)
        return
    blocks = packed["codes"].reshape(-1).view(np.uint8)
    padded = round_up(inputs, 32)
    groups = -(-inputs // form.group) if form.group else 1
    scales = packed["scales"].reshape(-1)
    assert scales.dtype == (np.float16 if form.scale == "f16" else np.float32)
    assert ("zeros" in packed) == (not form.symmetric)
    for row in range(rows):
        tile, r = divmod(row, 8)
        for col in range(padded):
            group = min(col // form.group if form.group else 0, groups - 1)
            table = (tile * groups + group) * 8 + r
            if form.bits == 8:
                code = int(blocks[(tile * padded // 4 + col // 4) * 32 + r * 4 + col % 4])
            else:
                half, i = divmod(col % 8, 4)
                byte = int(blocks[(tile * padded // 8 + col // 8) * 32 + r * 4 + i])
                code = byte >> 4 if half else byte & 15
            zero = (
                2 ** (form.bits - 1) if form.symmetric else int(packed["zeros"].reshape(-1)[table])
            )
            value = np.float32(code - zero) * np.float32(scales[table])
            if row >= out:
                assert scales[table] == 0 and code == zero
            elif col >= inputs:
                assert code == zero
            else:
                assert value == stored[row, col]


def test_bfloat16_rounds_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(5).integers(0, 2**32, 100_000, dtype=np.uint32)
    bits[:4] = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00008000]  # ties, overflow, subnormal
    x = bits.view(np.float32)
    x = x[~np.isnan(x)]
    expected = torch.from_numpy(x.copy()).to(torch.bfloat16).float().numpy()
    assert (from_bf16(to_bf16(x)) == expected).all()
    assert np.isnan(from_bf16(to_bf16(np.array([np.nan], np.float32)))).all()


def test_names_of_formats() -> None:
    for form in FORMATS:
        assert parse_format(form.name) == form
        assert WeightFormat.from_json(form.to_json(), "here") == form
    assert parse_format("w4") == parse_format("w4g128")
    assert parse_format("w8-sym").name == "w8g128-sym"
    for bad in ("", "w3", "w4g16", "w4-f16scale", "w4g128-f32scale-sym", "W4", "int4", "w4 "):
        with pytest.raises(InvalidArgument, match="format"):
            parse_format(bad)
    with pytest.raises(CorruptModel, match="here"):
        WeightFormat.from_json({"kind": "affine", "bits": 4}, "here")


def test_the_last_override_that_matches_wins() -> None:
    scheme = parse_scheme("w4", {"decoder.*": "w8", "*.attention.v": "bf16"})
    assert scheme.format_of("decoder.layers.3.attention.v").name == "bf16"
    assert scheme.format_of("decoder.layers.3.attention.q").name == "w8g128"
    assert scheme.format_of("projector.layers.0").name == "w8g128"
    with pytest.raises(InvalidArgument):
        parse_scheme("w4", {"decoder.*": "w5"})
