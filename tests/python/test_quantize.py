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
    ActivationFormat,
    Quantized,
    WeightFormat,
    dequantize,
    from_bf16,
    pack_codes,
    pack_quantized,
    pack_rows,
    parse_activations,
    parse_format,
    quantize,
    quantize_activations,
    quantize_as,
    row_sums,
    to_bf16,
    unpack_codes,
    unpack_linear,
    unpack_quantized,
)
from framequilt.quantize.formats import ACTIVATIONS, BITS, GROUPS, round_up

sys.path.insert(0, str(Path(__file__).parent))
SHARED = Path(os.environ.get("FRAMEQUILT_SHARED", Path(__file__).parents[3] / "shared"))
GOLDEN = SHARED / "golden" / "quantization"

FORMATS = [WeightFormat("f32"), WeightFormat("bf16")] + [
    WeightFormat("affine", bits, group, symmetric, scale, offset)
    for bits in BITS
    for group in GROUPS
    for symmetric, offset in ((False, False), (True, False), (False, True))
    for scale in ("f16", "f32", "i8")
    if group or scale != "i8"
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


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_activation_codes_equal_the_reference(bits: int) -> None:
    """Per token, asymmetric, min to max: what the paper calls its activation quantizer."""
    if not GOLDEN.is_dir():
        pytest.skip("the golden vectors are not here (FRAMEQUILT_SHARED)")
    from safetensors.numpy import load_file

    x = load_file(GOLDEN / "inputs.safetensors")["activation"].reshape(10, 256)
    golden = load_file(GOLDEN / "activation_fp32.safetensors")
    made = quantize_activations(x, ActivationFormat(bits, symmetric=False), "reference")
    assert (made.codes == golden[f"a{bits}_token.q"]).all()
    assert (made.scales[:, 0] == golden[f"a{bits}_token.scale"].reshape(-1)).all()
    assert (made.zeros[:, 0] == golden[f"a{bits}_token.zero"].reshape(-1)).all()
    assert (dequantize(made) == golden[f"a{bits}_token.dq"]).all()


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    form=st.sampled_from([form for form in ACTIVATIONS.values() if form and not form.bf16]),
    shift=st.sampled_from([-40.0, -1.0, 0.0, 1.0, 40.0]),
)
def test_activations_follow_the_contract(seed: int, form: ActivationFormat, shift: float) -> None:
    """The formulas of engine/CONTRACT.md, 1.4, row by row in float32."""
    x = weights(seed, 3, 50) + np.float32(shift)
    x[0] = 0
    made = quantize_activations(x, form)
    levels = np.float32(2**form.bits - 1)
    for row, codes, scale, zero in zip(x, made.codes, made.scales, made.zeros, strict=True):
        if form.symmetric:
            step = max(np.abs(row).max(), np.float32(1e-5)) / np.float32(2 ** (form.bits - 1) - 1)
            half = 2 ** (form.bits - 1)
            expected, point = np.clip(np.rint(row / step), -half, half - 1) + half, half
        else:
            low, high = min(row.min(), np.float32(0)), max(row.max(), np.float32(0))
            step = max(high - low, np.float32(1e-5)) / levels
            point = int(np.clip(-np.rint(low / step), 0, levels))
            expected = np.clip(np.rint(row / step) + point, 0, levels)
        assert (scale == step).all() and (zero == point).all()
        assert (codes == expected).all()


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


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    inputs=st.integers(1, 200),
    bits=st.integers(2, 8),
    group=st.sampled_from(GROUPS),
    half=st.booleans(),
    exponent=st.integers(-6, 8),
    shift=st.floats(-30, 30),
)
def test_with_an_offset_no_weight_is_off_by_more_than_half_a_step(
    seed: int, inputs: int, bits: int, group: int, half: bool, exponent: int, shift: float
) -> None:
    """Whatever the group's signs: a float16 offset is rounded down and the scale up, so that the
    ends are within reach. Beyond that float32 rounds three times: at the offset, product and sum,
    each to 2^-24 of numbers no larger than the offset and the range."""
    x = weights(seed, 3, inputs, 2.0**exponent) + np.float32(shift * 2.0**exponent)
    made = quantize(x, bits=bits, group=group, offset=True, scale="f16" if half else "f32")
    owner = np.arange(inputs) // (group or inputs)
    assert made.offsets is not None and not made.zeros.any()
    step = made.scales[:, owner].astype(np.float64)
    size = np.abs(made.offsets[:, owner]) + step * (2**bits - 1)
    back = dequantize(made)
    assert (np.abs(back - x.astype(np.float64)) <= step * 0.5 + size * 2.0**-22).all()
    product = made.codes.astype(np.float32) * made.scales[:, owner]
    assert (back == product + made.offsets[:, owner]).all()


@pytest.mark.parametrize("inputs", [1, 47, 64, 1100])
@pytest.mark.parametrize(
    "form", [form for form in FORMATS if form.kind == "affine"], ids=lambda form: form.name
)
def test_row_sums_are_the_float64_sums_of_the_weights(form: WeightFormat, inputs: int) -> None:
    """A weight in float32 is rounded to 2^-24 of itself, with an offset also of the product before
    that is added; the sum is rounded once."""
    coded = quantize_as(weights(11, 20, inputs), form)
    sums, stored = row_sums(coded), dequantize(coded).astype(np.float64)
    owner = np.arange(inputs) // (form.group or inputs)
    size = np.abs(stored).sum(1)
    if coded.offsets is not None:
        size += (coded.scales[:, owner].astype(np.float64) * coded.codes).sum(1)
    want = stored.sum(1)
    assert sums.dtype == np.float32
    assert (np.abs(sums - want) <= 2.0**-24 * (size + np.abs(want))).all()


def test_row_sums_are_stored_for_inputs_with_a_zero_only() -> None:
    x, form = weights(12, 21, 75), parse_format("w3g32")
    for name in ACTIVATIONS:
        packed, _ = pack_rows(x, form, activations=parse_activations(name))
        assert ("row_sums" in packed) == name.endswith("-asym")
        stored = form.stored_bytes(21, 75, parse_activations(name))
        assert sum(data.nbytes for data in packed.values()) == stored
    sums = pack_rows(x, form, activations=parse_activations("a4-asym"))[0]["row_sums"]
    assert sums.shape == (4, 8)  # padded to 32 rows
    assert (sums.reshape(-1)[:21] == row_sums(quantize_as(x, form))).all()
    assert (sums.reshape(-1)[21:] == 0).all()


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
    for offset in (False, True):
        with pytest.raises(Unsupported, match="float16"):
            quantize(x * np.float32(1e8), bits=4, group=32, offset=offset)
    with pytest.raises(Unsupported, match="offset"):
        quantize(x - np.float32(1e5), bits=4, group=32, offset=True)
    with pytest.raises(InvalidArgument, match="offset"):
        quantize(x, bits=4, group=32, symmetric=True, offset=True)
    with pytest.raises(InvalidArgument, match="no codes"):
        quantize_as(x, WeightFormat("bf16"))
    for bits in (1, 9):
        with pytest.raises(InvalidArgument):
            quantize(x, bits=bits, group=32)


STEPPED = [form for form in FORMATS if form.stepped]


@settings(deadline=None, max_examples=100)
@given(
    form=st.sampled_from(STEPPED),
    seed=st.integers(0, 2**32 - 1),
    inputs=st.integers(1, 700),
    exponent=st.integers(-16, 12),
    spread=st.integers(0, 12),
    shift=st.floats(-3, 3),
)
def test_with_steps_no_weight_is_off_by_more_than_half_its_scale(
    form: WeightFormat, seed: int, inputs: int, exponent: int, spread: int, shift: float
) -> None:
    """Groups of very different sizes share a step. Scales are rounded up and offsets down, so that
    every value is within reach; factors are integers of at most 127, and no larger than needed: one
    less would not reach the group's own range (an offset may have added one step of offsets)."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((3, inputs)) + shift
    owner = np.arange(inputs) // form.group
    groups = int(owner[-1]) + 1
    x *= 2.0 ** (exponent - generator.integers(0, spread + 1, (3, groups)))[:, owner]
    x = x.astype(np.float32)
    made = quantize_as(x, form)
    step = made.scales[:, owner].astype(np.float64)
    size = step * (2**form.bits - 1)
    if made.offsets is not None:
        size += np.abs(made.offsets[:, owner])
    back = dequantize(made)
    assert (np.abs(back - x.astype(np.float64)) <= step * 0.5 + size * 2.0**-21).all()

    share, count = 256 // form.group, -(-inputs // 256)
    of_group = np.arange(groups) // share
    assert made.scale_steps is not None and made.scale_steps.shape == (3, count)
    factors = made.scales / made.scale_steps[:, of_group]
    assert (factors == np.rint(factors)).all() and factors.min() >= 1 and factors.max() <= 127
    low, high = (
        np.stack([f(x[:, owner == g], 1) for g in range(groups)], 1) for f in (np.min, np.max)
    )
    if form.symmetric:
        peak = np.maximum(np.maximum(-low, high), 1e-5)  # no group is taken to be smaller
        width = 2 * peak * (2**form.bits - 1) / (2**form.bits - 2)
    elif form.offset:
        assert made.offset_steps is not None
        width = high - low + made.offset_steps[:, of_group]
    else:
        width = np.maximum(high, 0) - np.minimum(low, 0)
    needed = np.maximum(width, 1e-5) * (1 + 2.0**-20) / (2**form.bits - 1)
    assert (made.scales <= needed + made.scale_steps[:, of_group]).all()


@settings(deadline=None, max_examples=60)
@given(
    form=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**32 - 1),
    out=st.integers(1, 40),
    inputs=st.integers(1, 300),
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
@pytest.mark.parametrize("out, inputs", [(1, 1), (16, 64), (21, 75), (9, 300)])
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
    blocks = packed["codes"].reshape(-1)
    supers = -(-inputs // 32)
    groups = -(-inputs // form.group) if form.group else 1
    types = {"f16": np.float16, "f32": np.float32, "i8": np.int8}
    assert packed["scales"].dtype == types[form.scale]

    def number(kind: str, tile: int, group: int, r: int) -> Any:
        value = np.float32(packed[f"{kind}s"].reshape(-1)[(tile * groups + group) * 8 + r])
        if form.scale != "i8":
            return value
        place = (tile * -(-inputs // 256) + group * form.group // 256) * 8 + r
        return value * np.float32(packed[f"{kind}_steps"].reshape(-1)[place])

    assert ("zeros" in packed) == (not form.symmetric and not form.offset)
    assert ("offsets" in packed) == form.offset
    planes = {
        8: [(0, 8)], 6: [(0, 4), (4, 2)], 5: [(0, 4), (4, 1)],
        4: [(0, 4)], 3: [(0, 2), (2, 1)], 2: [(0, 2)],
    }[form.bits]  # fmt: skip
    assert blocks.size == rows // 8 * supers * form.bits * 32
    for row in range(rows):
        tile, r = divmod(row, 8)
        for col in range(supers * 32):
            group = min(col // form.group if form.group else 0, groups - 1)
            table = (tile * groups + group) * 8 + r
            superblock, at = divmod(col, 32)
            code, first = 0, (tile * supers + superblock) * form.bits
            for low, p in planes:
                block, rest = divmod(at, 32 // p)
                j, i = divmod(rest, 4)
                byte = int(blocks[(first + block) * 32 + r * 4 + i])
                code |= (byte >> (p * j) & (2**p - 1)) << low
                first += p
            if form.symmetric or form.offset:
                zero = 2 ** (form.bits - 1) if form.symmetric else 0
            else:
                zero = int(packed["zeros"].reshape(-1)[table])
            scale = number("scale", tile, group, r)
            value = np.float32(code - zero) * scale
            if form.offset:
                value += number("offset", tile, group, r)
            if row >= out:
                assert scale == 0 and code == zero and value == 0
            elif col >= inputs:
                assert code == zero
            else:
                assert value == stored[row, col]


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 4),
    inputs=st.integers(1, 200),
)
def test_any_code_survives_packing(bits: int, seed: int, rows: int, inputs: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows * 8, inputs), np.uint8)
    blocks = pack_codes(codes, np.zeros((rows * 8, 1), np.uint8), bits)
    assert blocks.nbytes == rows * round_up(inputs, 32) * bits  # 8 rows, 8 bits in a byte
    assert (unpack_codes(blocks, bits, inputs) == codes).all()


@settings(deadline=None, max_examples=40)
@given(
    form=st.sampled_from([form for form in FORMATS if form.kind == "affine"]),
    seed=st.integers(0, 2**32 - 1),
    out=st.integers(1, 40),
    inputs=st.integers(1, 200),
)
def test_codes_made_elsewhere_come_back_as_they_were(
    form: WeightFormat, seed: int, out: int, inputs: int
) -> None:
    """Any codes, zeros and scales of either sign, not only those that our quantizer makes."""
    generator = np.random.default_rng(seed)
    table = (out, form.groups(inputs))
    kind = np.float32 if form.scale == "f32" else np.float16

    def numbers() -> tuple[Any, Any]:
        if not form.stepped:
            return generator.standard_normal(table).astype(kind).astype(np.float32), None
        steps = generator.standard_normal((out, -(-inputs // 256))).astype(kind).astype(np.float32)
        steps[generator.random(steps.shape) < 0.1] = 0
        factors = generator.integers(-128, 128, table).astype(np.float32)
        return factors * np.repeat(steps, 256 // form.group, axis=1)[:, : table[1]], steps

    (scales, scale_steps), (offsets, offset_steps) = numbers(), numbers()
    zeros = np.full(table, form.neutral, np.uint8)
    if not (form.symmetric or form.offset):
        zeros = generator.integers(0, 2**form.bits, table, np.uint8)
    codes = generator.integers(0, 2**form.bits, (out, inputs), np.uint8)
    if not form.offset:
        offsets = offset_steps = None
    coded = Quantized(
        codes, scales, zeros, form.bits, form.group, offsets, scale_steps, offset_steps
    )
    packed = pack_quantized(coded, form)
    back = unpack_quantized(form, out, inputs, lambda suffix: packed[suffix])
    assert (back.codes == codes).all() and (back.scales == scales).all()
    assert (back.zeros == zeros).all()
    assert not form.offset or (back.offsets == offsets).all()
    whole = unpack_linear(form, out, inputs, lambda suffix: packed[suffix])
    assert (whole == dequantize(coded)).all()


def test_codes_of_another_format_are_refused() -> None:
    form = parse_format("w4g32")
    coded = quantize_as(weights(8, 16, 64), form)
    for other in ("w4g16", "w4g32-sym", "w4g32-offset", "w3g32", "w8g32", "f32"):
        with pytest.raises(InvalidArgument, match="format"):
            pack_quantized(coded, parse_format(other))
    exact = quantize_as(weights(8, 16, 64), parse_format("w4g32-f32scale"))
    with pytest.raises(InvalidArgument, match="float16"):
        pack_quantized(exact, form)
    with pytest.raises(InvalidArgument, match="need steps"):
        pack_quantized(coded, parse_format("w4g32-i8scale"))
    stepped = quantize_as(weights(8, 16, 64), parse_format("w4g32-i8scale"))
    stepped.scales[2, 1] *= np.float32(1.001)
    with pytest.raises(InvalidArgument, match="int8, times a step"):
        pack_quantized(stepped, parse_format("w4g32-i8scale"))
    coded.codes[3, 3] = 16
    with pytest.raises(InvalidArgument, match="more than 4 bits"):
        pack_quantized(coded, form)
    exact.scales[0, 0] = np.nan
    with pytest.raises(CorruptModel, match="finite"):
        pack_quantized(exact, parse_format("w4g32-f32scale"))
    for bits in (1, 7, 9):
        with pytest.raises(InvalidArgument, match="layout"):
            pack_codes(coded.codes, coded.zeros, bits)


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
    for bad in (
        "",
        "w7",
        "w1",
        "w4g8",
        "w4-f16scale",
        "w4g128-f32scale-sym",
        "W4",
        "int4",
        "w4 ",
        "w4-sym-offset",
        "w4-i8scale-f32scale",
        "w4row-i8scale",
    ):
        with pytest.raises(InvalidArgument, match="format|part of 256 inputs"):
            parse_format(bad)
    assert parse_format("w3g16-offset").name == "w3g16-offset"
    entry = parse_format("w4").to_json()
    for wrong in (
        None,
        {"kind": "affine", "bits": 4},
        {**entry, "bits": 7},
        {**entry, "bits": 4.0},
        {**entry, "symmetric": 0},
        {**entry, "symmetric": True, "offset": True},
        {**entry, "offset": 1},
        {**entry, "scale": "i8", "group": 0},
        {**entry, "more": 1},
        {"kind": "bf16", "offset": False},
    ):
        with pytest.raises(CorruptModel, match="here"):
            WeightFormat.from_json(wrong, "here")
    assert WeightFormat.from_json({**entry, "offset": False}, "here") == parse_format("w4")


def test_inputs_that_weights_take() -> None:
    rounded, codes = parse_activations("abf16"), parse_activations("a8")
    assert rounded is not None and codes is not None
    for name, both in (("f32", (False, False)), ("bf16", (True, False)), ("w4", (True, True))):
        assert (rounded.fits(parse_format(name)), codes.fits(parse_format(name))) == both


def test_names_of_activations() -> None:
    for name, form in ACTIVATIONS.items():
        assert parse_activations(name) == form
        if form is not None:
            assert form.name == name and ActivationFormat.from_json(form.to_json(), "x") == form
    with pytest.raises(InvalidArgument, match="a16, abf16, a8.*a8-asym"):
        parse_activations("a5")
    with pytest.raises(InvalidArgument, match="abf16 has no codes"):
        quantize_activations(np.ones((1, 4), np.float32), ACTIVATIONS["abf16"])
    assert ActivationFormat.from_json({"kind": "bf16"}, "x").name == "abf16"
    for wrong in (
        None,
        {"bits": 8},
        {"bits": 5, "symmetric": True},
        {"bits": 8, "symmetric": 1},
        {"bits": 16, "symmetric": True},
        {"kind": "f16"},
        {"kind": "bf16", "bits": 16},
    ):
        with pytest.raises(CorruptModel, match="here"):
            ActivationFormat.from_json(wrong, "here")
