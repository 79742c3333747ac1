"""The tiled layouts that the kernels read (engine/CONTRACT.md, 1.3), packed and unpacked.

Rows are output rows. Tiles hold 8 of them, and a weight has an even number of tiles: `pad_rows`
appends zero rows. Packing works on any whole number of tiles, so that a large weight can be packed
piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framequilt.errors import CorruptModel, InvalidArgument
from framequilt.quantize.formats import (
    INPUT_PADDING,
    ROW_PADDING,
    TILE_ROWS,
    WeightFormat,
    round_up,
)
from framequilt.quantize.rtn import Quantized, Range, dequantize, quantize


def pad_rows(x: NDArray[Any], fill: int = 0) -> NDArray[Any]:
    """[rows, ...] with rows of `fill` appended up to a multiple of 16."""
    missing = -len(x) % ROW_PADDING
    if not missing:
        return x
    return np.concatenate([x, np.full((missing, *x.shape[1:]), fill, x.dtype)])


def to_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """bfloat16 bit patterns, rounded half to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(x), quiet, rounded).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """float32 values of bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _tile(x: NDArray[Any]) -> NDArray[Any]:
    """[rows, ...] -> [tiles, 8, ...]."""
    if len(x) % TILE_ROWS:
        raise InvalidArgument(f"{len(x)} rows are no whole number of tiles of {TILE_ROWS}")
    return x.reshape(len(x) // TILE_ROWS, TILE_ROWS, *x.shape[1:])


def pack_f32(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """[rows, inputs] -> [tiles, inputs, 8]."""
    return np.ascontiguousarray(_tile(x).transpose(0, 2, 1))


def unpack_f32(blocks: NDArray[np.float32]) -> NDArray[np.float32]:
    """[tiles, inputs, 8] -> [rows, inputs]."""
    return np.ascontiguousarray(blocks.transpose(0, 2, 1)).reshape(-1, blocks.shape[1])


def pack_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """[rows, inputs] float32 -> [tiles, ceil(inputs / 2), 8, 2] bit patterns."""
    if x.shape[1] % 2:
        x = np.pad(x, ((0, 0), (0, 1)))
    pairs = _tile(to_bf16(x)).reshape(-1, TILE_ROWS, x.shape[1] // 2, 2)
    return np.ascontiguousarray(pairs.transpose(0, 2, 1, 3))


def unpack_bf16(blocks: NDArray[np.uint16], inputs: int) -> NDArray[np.float32]:
    """[tiles, ceil(inputs / 2), 8, 2] bit patterns -> [rows, inputs] float32."""
    rows = blocks.transpose(0, 2, 1, 3).reshape(len(blocks) * TILE_ROWS, -1)
    return from_bf16(np.ascontiguousarray(rows[:, :inputs]))


def pack_codes(codes: NDArray[np.uint8], zeros: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes [rows, inputs], zeros [rows, groups] -> [tiles, blocks, 8, 4]; bits is 4 or 8.

    Padding along the input gets the zero of the last group, so that it dequantizes to 0.
    """
    rows, inputs = codes.shape
    padded = round_up(inputs, INPUT_PADDING)
    if padded != inputs:
        tail = np.broadcast_to(zeros[:, -1:], (rows, padded - inputs))
        codes = np.concatenate([codes, tail], axis=1)
    if bits == 8:
        blocks = _tile(codes).reshape(-1, TILE_ROWS, padded // 4, 4)
    elif bits == 4:
        halves = _tile(codes).reshape(-1, TILE_ROWS, padded // 8, 2, 4)
        blocks = halves[..., 0, :] | (halves[..., 1, :] << np.uint8(4))
    else:
        raise InvalidArgument(f"no packed layout for {bits} bits", "4 and 8 bits have one")
    return np.ascontiguousarray(blocks.transpose(0, 2, 1, 3))


def unpack_codes(blocks: NDArray[np.uint8], bits: int, inputs: int) -> NDArray[np.uint8]:
    """[tiles, blocks, 8, 4] -> codes [rows, inputs]."""
    if bits not in (4, 8):
        raise InvalidArgument(f"no packed layout for {bits} bits", "4 and 8 bits have one")
    by_row = blocks.transpose(0, 2, 1, 3)
    if bits == 4:
        by_row = np.stack([by_row & np.uint8(15), by_row >> np.uint8(4)], axis=3)
    return by_row.reshape(len(blocks) * TILE_ROWS, -1)[:, :inputs]


def pack_table(table: NDArray[Any]) -> NDArray[Any]:
    """Scales or zeros [rows, groups] -> [tiles, groups, 8]."""
    return np.ascontiguousarray(_tile(table).transpose(0, 2, 1))


def unpack_table(table: NDArray[Any]) -> NDArray[Any]:
    """[tiles, groups, 8] -> [rows, groups]."""
    return np.ascontiguousarray(table.transpose(0, 2, 1)).reshape(-1, table.shape[1])


def pack_rows(
    x: NDArray[np.float32], form: WeightFormat, range_: Range = "include_zero"
) -> tuple[dict[str, NDArray[Any]], NDArray[np.float32]]:
    """Stores rows [rows, inputs] in `form`.

    rows is a multiple of 16, or else the end of a weight, which is padded to one. Returns the
    tensors by
    suffix ("codes", "scales", "zeros" or "weight"), and the rows as they will be read back.
    """
    if form.kind == "f32":
        return {"weight": pack_f32(pad_rows(x))}, x
    if form.kind == "bf16":
        return {"weight": pack_bf16(pad_rows(x))}, from_bf16(to_bf16(x))
    coded = quantize(
        x,
        bits=form.bits,
        group=form.group,
        symmetric=form.symmetric,
        scale=form.scale,
        range_=range_,
    )
    neutral = 2 ** (form.bits - 1) if form.symmetric else 0
    zeros = pad_rows(coded.zeros, neutral)
    scales = pad_rows(coded.scales)
    result: dict[str, NDArray[Any]] = {
        "codes": pack_codes(pad_rows(coded.codes, neutral), zeros, form.bits),
        "scales": pack_table(scales.astype(np.float16 if form.scale == "f16" else np.float32)),
    }
    if not form.symmetric:
        result["zeros"] = pack_table(zeros)
    return result, dequantize(coded)


def unpack_linear(
    form: WeightFormat, out: int, inputs: int, tensor: Callable[[str], NDArray[Any]]
) -> NDArray[np.float32]:
    """The weight [out, inputs] in float32; `tensor` gives a stored tensor by its suffix.

    bfloat16 comes as uint16 bit patterns. Errors: CorruptModel for a tensor of the wrong shape.
    """
    parts: dict[str, NDArray[Any]] = {}
    for info in form.tensors("", out, inputs):
        suffix = info.name[1:]
        parts[suffix] = tensor(suffix)
        if parts[suffix].shape != info.shape:
            found = list(parts[suffix].shape)
            raise CorruptModel(f"{suffix}: shape {found}, expected {list(info.shape)}")
    if form.kind == "f32":
        return unpack_f32(parts["weight"])[:out]
    if form.kind == "bf16":
        return unpack_bf16(parts["weight"], inputs)[:out]
    scales = unpack_table(parts["scales"]).astype(np.float32)
    if form.symmetric:
        zeros = np.full(scales.shape, 2 ** (form.bits - 1), np.uint8)
    else:
        zeros = unpack_table(parts["zeros"])
    codes = unpack_codes(parts["codes"], form.bits, inputs)
    return dequantize(Quantized(codes, scales, zeros, form.bits, form.group))[:out]
