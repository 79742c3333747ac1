"""Uniform round-to-nearest quantization of groups, vectorised.

Formulas: the quantizer of "Evaluating Quantized Large Language Models" (arXiv 2402.18158), section
2, in float32, rounding half to even. Two changes for production, both of which can be switched off:
the range of a group is extended to contain zero (`include_zero`), since otherwise groups without a
sign change are destroyed by the clamped zero point; and a scale may be stored as float16, in which
case it is rounded before the codes are computed, so that nothing is lost afterwards.

With an offset (w = code * scale + offset) there is no zero to clamp, and the range of a group is
exactly that of its values.

Memory: the arrays it returns, and a few temporaries of their size. Any thread.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from framequilt.errors import CorruptModel, InvalidArgument, Unsupported
from framequilt.quantize.formats import ActivationFormat, WeightFormat

Range = Literal["include_zero", "reference"]
ScaleType = Literal["f16", "f32"]
RANGES: tuple[Range, ...] = ("include_zero", "reference")

# The least range (asymmetric) or largest magnitude (symmetric) that a group is taken to have.
RANGE_FLOOR = np.float32(1e-5)
_F16_NORMAL = np.float32(2.0**-14)


@dataclass(frozen=True)
class Quantized:
    """Codes and parameters of rows [rows, inputs]; w = (code - zero) * scale.

    Symmetric codes are stored with an offset of 2^(bits-1), which is then their zero. With
    `offsets`, w = code * scale + offset, and the zeros are 0.
    """

    codes: NDArray[np.uint8]  # [rows, inputs]
    scales: NDArray[np.float32]  # [rows, groups], already rounded to their stored type
    zeros: NDArray[np.uint8]  # [rows, groups]
    bits: int
    group: int  # inputs per group; 0: the whole row
    offsets: NDArray[np.float32] | None = None  # [rows, groups], rounded like the scales

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Quantized:
        """Some of the rows, in another order if `rows` says so."""
        offsets = None if self.offsets is None else self.offsets[rows]
        return replace(
            self,
            codes=self.codes[rows],
            scales=self.scales[rows],
            zeros=self.zeros[rows],
            offsets=offsets,
        )


def quantize(
    x: NDArray[np.float32],
    *,
    bits: int,
    group: int,
    symmetric: bool = False,
    scale: ScaleType = "f16",
    offset: bool = False,
    range_: Range = "include_zero",
) -> Quantized:
    """Quantizes rows [rows, inputs] in groups of `group` consecutive inputs.

    A last group is shorter where the group does not divide the inputs; group 0 is the whole row.
    bits is 2..8; `range_` means nothing with `offset`. Errors: InvalidArgument; CorruptModel for
    values that are not finite; Unsupported for scales that float16 cannot hold.
    """
    if not 2 <= bits <= 8:
        raise InvalidArgument(f"{bits} bits: weights take 2 to 8")
    if symmetric and offset:
        raise InvalidArgument("symmetric codes have no offset")
    if range_ not in RANGES:
        raise InvalidArgument(f"unknown range {range_!r}", f"known: {', '.join(RANGES)}")
    if x.ndim != 2 or x.dtype != np.float32:
        raise InvalidArgument(f"expected float32 [rows, inputs], not {x.dtype} {list(x.shape)}")
    rows, inputs = x.shape
    size = group or max(inputs, 1)
    whole = inputs // size
    count = -(-inputs // size)
    codes = np.empty((rows, inputs), np.uint8)
    scales = np.empty((rows, count), np.float32)
    zeros = np.zeros((rows, count), np.uint8)
    offsets = np.empty((rows, count), np.float32) if offset else None
    split = whole * size
    parts = [(x[:, :split].reshape(rows, whole, size), slice(0, split), slice(0, whole))]
    if count > whole:
        parts.append((x[:, None, split:], slice(split, inputs), slice(whole, count)))
    for values, columns, owners in parts:
        if offsets is not None:
            part_scale, part_offset = _offset_parameters(values, bits, scale)
            steps = np.rint((values - part_offset[..., None]) / part_scale[..., None])
            offsets[:, owners] = part_offset
        else:
            part_scale, part_zero = _parameters(values, bits, symmetric, scale, range_)
            steps = np.rint(values / part_scale[..., None])
            steps += part_zero[..., None]
            zeros[:, owners] = part_zero
        np.clip(steps, 0, 2**bits - 1, out=steps)
        codes[:, columns] = steps.reshape(rows, -1)
        scales[:, owners] = part_scale
    return Quantized(codes, scales, zeros, bits, group, offsets)


def quantize_as(
    x: NDArray[np.float32], form: WeightFormat, range_: Range = "include_zero"
) -> Quantized:
    """Rows [rows, inputs] in an affine format. Errors: those of `quantize`."""
    if form.kind != "affine":
        raise InvalidArgument(f"{form.name} has no codes")
    return quantize(
        x,
        bits=form.bits,
        group=form.group,
        symmetric=form.symmetric,
        scale=form.scale,
        offset=form.offset,
        range_=range_,
    )


def quantize_activations(
    x: NDArray[np.float32], form: ActivationFormat, range_: Range = "include_zero"
) -> Quantized:
    """Input rows [rows, inputs] as the engine quantizes them before a product: each row on its own,
    with float32 scales (engine/CONTRACT.md, 1.4). Errors: those of `quantize`, and InvalidArgument
    for a format without codes."""
    if form.bf16:
        raise InvalidArgument(f"{form.name} has no codes", "inputs are only rounded to bfloat16")
    return quantize(
        x, bits=form.bits, group=0, symmetric=form.symmetric, scale="f32", range_=range_
    )


def _finite_range(
    values: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Least and greatest value [rows, groups] of groups [rows, groups, size]."""
    low, high = values.min(axis=-1), values.max(axis=-1)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise CorruptModel("a weight is not a finite number")
    return low, high


def _parameters(
    values: NDArray[np.float32],
    bits: int,
    symmetric: bool,
    scale_type: ScaleType,
    range_: Range,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and zero, both [rows, groups] float32, of groups [rows, groups, size]."""
    low, high = _finite_range(values)
    if symmetric:
        span: NDArray[np.float32] = np.maximum(np.maximum(-low, high), RANGE_FLOOR)
        scale = _stored(span / np.float32(2 ** (bits - 1) - 1), scale_type)
        return scale, np.full_like(scale, 2 ** (bits - 1))
    if range_ == "include_zero":
        low = np.minimum(low, np.float32(0))
        high = np.maximum(high, np.float32(0))
    steps: NDArray[np.float32] = np.maximum(high - low, RANGE_FLOOR) / np.float32(2**bits - 1)
    scale = _stored(steps, scale_type)
    zero = np.clip(-np.rint(low / scale), 0, 2**bits - 1)
    return scale, zero.astype(np.float32)


def _offset_parameters(
    values: NDArray[np.float32], bits: int, scale_type: ScaleType
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and offset, both [rows, groups] float32, of groups [rows, groups, size].

    A float16 offset is rounded down and its scale up: no value lies outside what they reach.
    """
    low, high = _finite_range(values)
    if scale_type == "f16":
        with np.errstate(over="ignore"):
            half = low.astype(np.float16)
        above = half.astype(np.float32) > low
        half[above] = np.nextafter(half[above], np.float16(-np.inf))
        if not np.isfinite(half).all():
            raise _too_large(float(low.min()), "an offset")
        low = half.astype(np.float32)
    steps: NDArray[np.float32] = np.maximum(high - low, RANGE_FLOOR) / np.float32(2**bits - 1)
    return _stored(steps, scale_type, up=True), low


def _too_large(value: float, what: str) -> Unsupported:
    return Unsupported(
        f"{what} of {value:g} is too large for float16",
        "use a format with the suffix -f32scale",
    )


def _stored(
    scale: NDArray[np.float32], scale_type: ScaleType, *, up: bool = False
) -> NDArray[np.float32]:
    """The scale as its stored type will give it back.

    Below float16's normal range its steps are coarse: there the scale is rounded up, because one
    that is too small by several percent would clip the ends of the group. `up`: everywhere.
    """
    if scale_type == "f32":
        return scale
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if not np.isfinite(half).all():
        raise _too_large(float(scale.max()), "a scale")
    short = half.astype(np.float32) < scale
    if not up:
        short &= scale < _F16_NORMAL
    if short.any():
        half[short] = np.nextafter(half[short], np.float16(np.inf))
    return half.astype(np.float32)


def row_sums(quantized: Quantized) -> NDArray[np.float32]:
    """Sums [rows] of the weights of each row (engine/CONTRACT.md, 1.3), bit by bit the engine's.

    The products are exact in float64, and groups are added in ascending order.
    """
    inputs = quantized.codes.shape[1]
    first = np.arange(quantized.scales.shape[1]) * (quantized.group or max(inputs, 1))
    width = np.diff(first, append=inputs)
    codes = np.add.reduceat(quantized.codes, first, axis=1, dtype=np.int64)
    sums = quantized.scales.astype(np.float64) * (codes - width * quantized.zeros.astype(np.int64))
    if quantized.offsets is not None:
        sums += quantized.offsets.astype(np.float64) * width
    total: NDArray[np.float64] = np.add.accumulate(sums, axis=1)[:, -1]  # not pairwise, as sum is
    return total.astype(np.float32)


def dequantize(quantized: Quantized) -> NDArray[np.float32]:
    """Rows [rows, inputs] in float32: float(code - zero) * scale, or code * scale + offset with
    product and sum each rounded."""
    inputs = quantized.codes.shape[1]
    size = quantized.group or max(inputs, 1)
    owner = np.arange(inputs) // size
    if quantized.offsets is not None:
        product = quantized.codes.astype(np.float32) * quantized.scales[:, owner]
        return product + quantized.offsets[:, owner]
    steps = quantized.codes.astype(np.int16) - quantized.zeros.astype(np.int16)[:, owner]
    return steps.astype(np.float32) * quantized.scales[:, owner]
