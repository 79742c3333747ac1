"""GGUF's quantized blocks as codes in our formats, which hold every one of them exactly.

A row of a tensor is a sequence of blocks of 32 or 256 values. Sources of the layouts: the ggml
project's description of its quantized types. Types with a minimum are ours with an offset; the
scales of the K types are small integers times a float16 number of their block, which is our step.
They are multiplied out in float32, as their own dequantization does it, so that the values are bit
for bit the same.

Memory: the arrays that are returned, and a few temporaries of their size. Any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from framequilt.quantize import Quantized, WeightFormat

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
# Scales or offsets [n, groups per block], and what they are multiples of [n, 1], if stored so.
Numbers = tuple[Floats, Floats | None]
# codes [n, values per block], scales, offsets or None
Decoded = tuple[Bytes, Numbers, Numbers | None]


@dataclass(frozen=True)
class BlockKind:
    """One type of block: our format of it, and how a block [n, bytes] is read."""

    form: WeightFormat
    values: int
    bytes: int
    decode: Callable[[Bytes], Decoded]


def _half(block: Bytes, at: int) -> Floats:
    """The float16 number at a byte of each block, [n, 1]."""
    pair = np.ascontiguousarray(block[:, at : at + 2])
    return pair.view("<f2").astype(np.float32)


def _times(factors: NDArray[np.generic], step: Floats) -> Numbers:
    """Integers [n, groups] times a number of their block [n, 1]: exact."""
    return factors.astype(np.float32) * step, step


def _nibbles(part: Bytes) -> Bytes:
    """Bytes [..., k] -> low nibbles, then high nibbles [..., 2 * k]."""
    return np.concatenate([part & np.uint8(15), part >> np.uint8(4)], axis=-1)


def _q4_0(block: Bytes) -> Decoded:
    return _nibbles(block[:, 2:]), (_half(block, 0), None), None


def _q4_1(block: Bytes) -> Decoded:
    return _nibbles(block[:, 4:]), (_half(block, 0), None), (_half(block, 2), None)


def _fifth_bits(part: Bytes) -> Bytes:
    """Four bytes with the fifth bits of 32 values, in order -> [n, 32], each at its place."""
    return np.unpackbits(part, axis=1, bitorder="little") << np.uint8(4)


def _q5_0(block: Bytes) -> Decoded:
    codes = _nibbles(block[:, 6:]) | _fifth_bits(block[:, 2:6])
    return codes, (_half(block, 0), None), None


def _q5_1(block: Bytes) -> Decoded:
    codes = _nibbles(block[:, 8:]) | _fifth_bits(block[:, 4:8])
    return codes, (_half(block, 0), None), (_half(block, 2), None)


def _q8_0(block: Bytes) -> Decoded:
    return block[:, 2:] ^ np.uint8(128), (_half(block, 0), None), None  # q + 128 of a signed byte


def _k_tables(block: Bytes) -> tuple[Numbers, Numbers]:
    """Scales and offsets [n, 8] of Q4_K and Q5_K: six bits each in 12 bytes, times d and -dmin."""
    packed = block[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    low_scale, low_minimum = first & np.uint8(63), second & np.uint8(63)
    high_scale = (third & np.uint8(15)) | (first >> np.uint8(6) << np.uint8(4))
    high_minimum = (third >> np.uint8(4)) | (second >> np.uint8(6) << np.uint8(4))
    scales = np.concatenate([low_scale, high_scale], axis=1)
    minima = np.concatenate([low_minimum, high_minimum], axis=1)
    return _times(scales, _half(block, 0)), _times(minima, -_half(block, 2))


def _q4_k(block: Bytes) -> Decoded:
    codes = _nibbles(block[:, 16:].reshape(-1, 4, 32)).reshape(-1, 256)
    return codes, *_k_tables(block)


def _q5_k(block: Bytes) -> Decoded:
    low = _nibbles(block[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    high = (block[:, None, 16:48] >> shifts) & np.uint8(1)
    return (low | (high << np.uint8(4))).reshape(-1, 256), *_k_tables(block)


def _q6_k(block: Bytes) -> Decoded:
    low = _nibbles(block[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = (block[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)
    scales = np.ascontiguousarray(block[:, 192:208]).view(np.int8)
    codes = (low | (high << np.uint8(4))).reshape(-1, 256)
    return codes, _times(scales, _half(block, 208)), None


def _two_bits(part: Bytes) -> Bytes:
    """64 bytes with four values each -> [n, 256] in the order of the K types."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return ((part.reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)).reshape(-1, 256)


def _q2_k(block: Bytes) -> Decoded:
    tables = block[:, :16]
    scales = _times(tables & np.uint8(15), _half(block, 80))
    return _two_bits(block[:, 16:80]), scales, _times(tables >> np.uint8(4), -_half(block, 82))


def _q3_k(block: Bytes) -> Decoded:
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    high = ((block[:, None, :32] >> shifts) & np.uint8(1)).reshape(-1, 256)
    packed = block[:, 96:108]
    low = _nibbles(packed[:, :8])
    pairs = np.array([0, 2, 4, 6], np.uint8)[:, None]
    top = ((packed[:, None, 8:] >> pairs) & np.uint8(3)).reshape(-1, 16)
    scales = _times((low | (top << np.uint8(4))).astype(np.int8) - np.int8(32), _half(block, 108))
    # A set bit means that 4 is not taken away: code - 4 with the bit as the third one.
    return _two_bits(block[:, 32:96]) | (high << np.uint8(2)), scales, None


def _form(bits: int, group: int, *, offset: bool = False, stepped: bool = False) -> WeightFormat:
    return WeightFormat(
        "affine", bits, group, symmetric=not offset, scale="i8" if stepped else "f16", offset=offset
    )


BLOCK_KINDS: dict[str, BlockKind] = {
    "Q4_0": BlockKind(_form(4, 32), 32, 18, _q4_0),
    "Q4_1": BlockKind(_form(4, 32, offset=True), 32, 20, _q4_1),
    "Q5_0": BlockKind(_form(5, 32), 32, 22, _q5_0),
    "Q5_1": BlockKind(_form(5, 32, offset=True), 32, 24, _q5_1),
    "Q8_0": BlockKind(_form(8, 32), 32, 34, _q8_0),
    "Q2_K": BlockKind(_form(2, 16, offset=True, stepped=True), 256, 84, _q2_k),
    "Q3_K": BlockKind(_form(3, 16, stepped=True), 256, 110, _q3_k),
    "Q4_K": BlockKind(_form(4, 32, offset=True, stepped=True), 256, 144, _q4_k),
    "Q5_K": BlockKind(_form(5, 32, offset=True, stepped=True), 256, 176, _q5_k),
    "Q6_K": BlockKind(_form(6, 16, stepped=True), 256, 210, _q6_k),
}


def decode(kind: str, stored: Bytes) -> Quantized:
    """Stored rows [rows, bytes] -> codes [rows, values]; every row is a whole number of blocks."""
    entry = BLOCK_KINDS[kind]
    rows = len(stored)
    codes, scales, offsets = entry.decode(stored.reshape(-1, entry.bytes))

    def by_row(numbers: Numbers | None) -> tuple[Floats | None, Floats | None]:
        both = numbers or (None, None)
        table, steps = (None if part is None else part.reshape(rows, -1) for part in both)
        return table, steps

    table, scale_steps = by_row(scales)
    offset_table, offset_steps = by_row(offsets)
    assert table is not None
    return Quantized(
        codes.reshape(rows, -1),
        table,
        np.full(table.shape, entry.form.neutral, np.uint8),
        entry.form.bits,
        entry.form.group,
        offset_table,
        scale_steps,
        offset_steps,
    )
