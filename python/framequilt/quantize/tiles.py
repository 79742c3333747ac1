"""The tiled layouts that the kernels read (engine/CONTRACT.md, 1.3), packed and unpacked.

Rows are output rows. Tiles hold 8 of them, and a weight has an even number of tiles: `pad_rows`
appends zero rows. Packing works on any whole number of tiles, so that a large weight can be packed
piece by piece.

Codes come in superblocks of 32 inputs: for a width of b bits b blocks of 32 bytes, which are cut
into planes of 1, 2, 4 or 8 bits of each code (`PLANES`).

Memory: the arrays that are returned, and a few temporaries of their size. Any thread.
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
    STEP_INPUTS,
    TILE_ROWS,
    ActivationFormat,
    WeightFormat,
    round_up,
)
from framequilt.quantize.rtn import (
    Quantized,
    Range,
    dequantize,
    per_group,
    quantize_as,
    row_sums,
)


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


# Width -> planes of a superblock, in order: (first bit of the code, bits).
PLANES: dict[int, tuple[tuple[int, int], ...]] = {
    2: ((0, 2),),
    3: ((0, 2), (2, 1)),
    4: ((0, 4),),
    5: ((0, 4), (4, 1)),
    6: ((0, 4), (4, 2)),
    8: ((0, 8),),
}


def _planes(bits: int) -> tuple[tuple[int, int], ...]:
    if bits not in PLANES:
        known = ", ".join(str(width) for width in PLANES)
        raise InvalidArgument(f"no packed layout for {bits} bits", f"known: {known}")
    return PLANES[bits]


def pack_codes(codes: NDArray[np.uint8], zeros: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes [rows, inputs], zeros [rows, groups] -> [tiles, blocks, 8, 4].

    Padding along the input gets the zero of the last group, so that it dequantizes to 0 (to the
    offset, in formats that have one). Errors: InvalidArgument for a width without a layout.
    """
    planes = _planes(bits)
    rows, inputs = codes.shape
    padded = round_up(inputs, INPUT_PADDING)
    if padded != inputs:
        tail = np.broadcast_to(zeros[:, -1:], (rows, padded - inputs))
        codes = np.concatenate([codes, tail], axis=1)
    tiled = _tile(codes).transpose(0, 2, 1)  # [tiles, inputs, 8]
    tiles, supers = len(tiled), padded // INPUT_PADDING
    result = np.empty((tiles, supers, bits, TILE_ROWS, 4), np.uint8)
    at = 0
    for first, width in planes:
        per_byte = 8 // width
        # Input 32/p * b + 4 * j + i of a superblock is byte i of block b, at bits p * j.
        part = tiled.reshape(tiles, supers, width, per_byte, 4, TILE_ROWS)
        block = result[:, :, at : at + width]
        block[...] = 0
        for j in range(per_byte):
            piece = (part[:, :, :, j] >> np.uint8(first)) & np.uint8(2**width - 1)
            block |= (piece << np.uint8(width * j)).swapaxes(-1, -2)
        at += width
    return result.reshape(tiles, supers * bits, TILE_ROWS, 4)


def unpack_codes(blocks: NDArray[np.uint8], bits: int, inputs: int) -> NDArray[np.uint8]:
    """[tiles, blocks, 8, 4] -> codes [rows, inputs]. Errors: InvalidArgument."""
    planes = _planes(bits)
    tiles, supers = len(blocks), blocks.shape[1] // bits
    source = blocks.reshape(tiles, supers, bits, TILE_ROWS, 4)
    codes = np.zeros((tiles, TILE_ROWS, supers, INPUT_PADDING), np.uint8)
    at = 0
    for first, width in planes:
        per_byte = 8 // width
        block = source[:, :, at : at + width].transpose(0, 3, 1, 2, 4)  # [tiles, 8, supers, b, 4]
        part = codes.reshape(tiles, TILE_ROWS, supers, width, per_byte, 4)
        for j in range(per_byte):
            piece = (block >> np.uint8(width * j)) & np.uint8(2**width - 1)
            part[..., j, :] |= piece << np.uint8(first)
        at += width
    return codes.reshape(tiles * TILE_ROWS, supers * INPUT_PADDING)[:, :inputs]


def pack_table(table: NDArray[Any]) -> NDArray[Any]:
    """Scales or zeros [rows, groups] -> [tiles, groups, 8]."""
    return np.ascontiguousarray(_tile(table).transpose(0, 2, 1))


def unpack_table(table: NDArray[Any]) -> NDArray[Any]:
    """[tiles, groups, 8] -> [rows, groups]."""
    return np.ascontiguousarray(table.transpose(0, 2, 1)).reshape(-1, table.shape[1])


def pack_rows(
    x: NDArray[np.float32],
    form: WeightFormat,
    range_: Range = "include_zero",
    activations: ActivationFormat | None = None,
) -> tuple[dict[str, NDArray[Any]], NDArray[np.float32]]:
    """Stores rows [rows, inputs] in `form`, to be multiplied with inputs in `activations`.

    rows is a multiple of 16, or else the end of a weight, which is padded to one. Returns the
    tensors by suffix (those of `WeightFormat.tensors`, and "row_sums"), and the rows as they will
    be read back.
    """
    if form.kind == "f32":
        return {"weight": pack_f32(pad_rows(x))}, x
    if form.kind == "bf16":
        return {"weight": pack_bf16(pad_rows(x))}, from_bf16(to_bf16(x))
    coded = quantize_as(x, form, range_)
    return pack_quantized(coded, form, activations), dequantize(coded)


def pack_quantized(
    coded: Quantized, form: WeightFormat, activations: ActivationFormat | None = None
) -> dict[str, NDArray[Any]]:
    """Codes of an affine format as they are stored, by suffix; rows as in `pack_rows`.

    Errors: InvalidArgument for codes that are not of this format.
    """
    rows, inputs = coded.codes.shape
    table = (rows, form.groups(inputs))
    offsets = coded.offsets
    if (
        form.kind != "affine"
        or (coded.bits, coded.group) != (form.bits, form.group)
        or coded.scales.shape != table
        or coded.zeros.shape != table
        or (offsets is not None) != form.offset
        or (offsets is not None and offsets.shape != table)
    ):
        raise InvalidArgument(f"these codes are not in the format {form.name}")
    if int(coded.codes.max(initial=0)) >> form.bits:
        raise InvalidArgument(f"a code of {int(coded.codes.max())} has more than {form.bits} bits")
    zeros = pad_rows(coded.zeros, form.neutral)
    result: dict[str, NDArray[Any]] = {
        "codes": pack_codes(pad_rows(coded.codes, form.neutral), zeros, form.bits),
        **_stored_table("scale", coded.scales, coded.scale_steps, form),
    }
    if offsets is not None:
        result |= _stored_table("offset", offsets, coded.offset_steps, form)
    elif not form.symmetric:
        result["zeros"] = pack_table(zeros)
    elif (coded.zeros != form.neutral).any():
        raise InvalidArgument(f"codes in the format {form.name} have the zero {form.neutral}")
    if activations is not None and not activations.symmetric:
        result["row_sums"] = pad_rows(row_sums(coded)).reshape(-1, TILE_ROWS)
    return result


def _stored_table(
    kind: str, table: NDArray[np.float32], steps: NDArray[np.float32] | None, form: WeightFormat
) -> dict[str, NDArray[Any]]:
    """The tensors of scales or offsets, which have to hold them exactly, by suffix."""
    if not np.isfinite(table).all():
        raise CorruptModel("a scale is not a finite number")
    result: dict[str, NDArray[Any]] = {}
    with np.errstate(over="ignore"):
        if not form.stepped:
            stored = table.astype(np.float16 if form.scale == "f16" else np.float32)
            held = stored.astype(np.float32)
        else:
            halves, of_groups = _steps_of(table, steps, form)
            factors = np.divide(table, of_groups, out=np.zeros_like(table), where=of_groups != 0)
            stored = np.clip(np.rint(factors), -128, 127).astype(np.int8)
            held = stored.astype(np.float32) * of_groups
            result[f"{kind}_steps"] = pack_table(pad_rows(halves))
    if (held != table).any():
        what = "int8, times a step," if form.stepped else "float16"
        raise InvalidArgument(
            f"{what} does not hold these {kind}s: {form.name} is not their format"
        )
    return {f"{kind}s": pack_table(pad_rows(stored)), **result}


def _steps_of(
    table: NDArray[np.float32], steps: NDArray[np.float32] | None, form: WeightFormat
) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """The steps of a table [rows, groups] as they are stored, and those of each group."""
    share = STEP_INPUTS // form.group
    shape = (len(table), -(-table.shape[1] // share))
    if steps is None or steps.shape != shape:
        raise InvalidArgument(f"codes in the format {form.name} need steps {list(shape)}")
    halves = steps.astype(np.float16)
    return halves, per_group(halves.astype(np.float32), share, table.shape[1])


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
    return dequantize(unpack_quantized(form, out, inputs, lambda suffix: parts[suffix]))


def unpack_quantized(
    form: WeightFormat, out: int, inputs: int, tensor: Callable[[str], NDArray[Any]]
) -> Quantized:
    """Codes and parameters of an affine weight [out, inputs], from stored tensors by suffix."""

    def numbers(kind: str) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        table = unpack_table(tensor(f"{kind}s")).astype(np.float32)
        if not form.stepped:
            return table, None
        steps = unpack_table(tensor(f"{kind}_steps")).astype(np.float32)
        return table * per_group(steps, STEP_INPUTS // form.group, table.shape[1]), steps

    scales, scale_steps = numbers("scale")
    zeros = np.full(scales.shape, form.neutral, np.uint8)
    offsets = offset_steps = None
    if form.offset:
        offsets, offset_steps = numbers("offset")
    elif not form.symmetric:
        zeros = unpack_table(tensor("zeros"))
    codes = unpack_codes(tensor("codes"), form.bits, inputs)
    return Quantized(
        codes, scales, zeros, form.bits, form.group, offsets, scale_steps, offset_steps
    )[:out]
