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
from framequilt.quantize.formats import (
    GROUPS,
    STEP_INPUTS,
    ActivationFormat,
    ScaleType,
    WeightFormat,
)

Range = Literal["include_zero", "reference"]
RANGES: tuple[Range, ...] = ("include_zero", "reference")

# The least range (asymmetric) or largest magnitude (symmetric) that a group is taken to have.
RANGE_FLOOR = np.float32(1e-5)
STEP_LEVELS = 127  # the greatest factor of a step
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
    # Where scales and offsets are stored as int8: what they are times, [rows, steps].
    scale_steps: NDArray[np.float32] | None = None
    offset_steps: NDArray[np.float32] | None = None

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Quantized:
        """Some of the rows, in another order if `rows` says so."""

        def some(table: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
            return None if table is None else table[rows]

        return replace(
            self,
            codes=self.codes[rows],
            scales=self.scales[rows],
            zeros=self.zeros[rows],
            offsets=some(self.offsets),
            scale_steps=some(self.scale_steps),
            offset_steps=some(self.offset_steps),
        )


def per_group(steps: NDArray[np.float32], groups_per_step: int, groups: int) -> NDArray[np.float32]:
    """Steps [rows, steps] -> the step of each group [rows, groups]."""
    return np.repeat(steps, groups_per_step, axis=1)[:, :groups]


def quantize(
    x: NDArray[np.float32],
    *,
    bits: int,
    group: int,
    symmetric: bool = False,
    scale: ScaleType = "f16",
    offset: bool = False,
    range_: Range = "include_zero",
    groups_per_step: int | None = None,
) -> Quantized:
    """Quantizes rows [rows, inputs] in groups of `group` consecutive inputs.

    A last group is shorter where the group does not divide the inputs; group 0 is the whole row.
    bits is 2..8; `range_` means nothing with `offset`. `groups_per_step` is for scales in int8: how
    many groups share a step, if not those of 256 inputs. Errors: InvalidArgument; CorruptModel for
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
    if scale == "i8" and groups_per_step is None:
        if group not in GROUPS or not group:
            raise InvalidArgument(f"scales in int8 with groups of {group}", "16, 32, 64 or 128")
        groups_per_step = STEP_INPUTS // group
    share = _Steps(groups_per_step or 1, count)
    split = whole * size
    parts = [(x[:, :split].reshape(rows, whole, size), slice(0, split), slice(0, whole))]
    if count > whole:
        parts.append((x[:, None, split:], slice(split, inputs), slice(whole, count)))
    low, high = np.empty((rows, count), np.float32), np.empty((rows, count), np.float32)
    for values, _, owners in parts:
        low[:, owners], high[:, owners] = _finite_range(values)
    if offset:
        table = _offset_parameters(low, high, bits, scale, share)
    else:
        table = _parameters(low, high, bits, symmetric, scale, range_, share)
    codes = np.empty((rows, inputs), np.uint8)
    for values, columns, owners in parts:
        part = table.scales[:, owners, None]
        if table.offsets is not None:
            steps = np.rint((values - table.offsets[:, owners, None]) / part)
        else:
            steps = np.rint(values / part)
            steps += table.zeros[:, owners, None]
        np.clip(steps, 0, 2**bits - 1, out=steps)
        codes[:, columns] = steps.reshape(rows, -1)
    return Quantized(codes, bits=bits, group=group, **vars(table))


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


@dataclass(frozen=True)
class _Table:
    """Parameters of groups: those of `Quantized`."""

    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8]
    offsets: NDArray[np.float32] | None = None
    scale_steps: NDArray[np.float32] | None = None
    offset_steps: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class _Steps:
    """How the `count` groups of a row share steps: `share` consecutive ones each."""

    share: int
    count: int

    def reaching(self, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
        """Steps [rows, steps] that times 127 reach the magnitudes of numbers [rows, groups]."""
        first = np.arange(0, self.count, self.share)
        most = np.asarray(np.maximum.reduceat(np.abs(numbers), first, axis=1), np.float32)
        steps = _stored(most / np.float32(STEP_LEVELS), "f16", up=True)
        short = steps * np.float32(STEP_LEVELS) < most  # the quotient had been rounded down
        if short.any():
            above = np.nextafter(steps[short].astype(np.float16), np.float16(np.inf))
            steps[short] = above.astype(np.float32)
        return steps

    def of_groups(self, steps: NDArray[np.float32]) -> NDArray[np.float32]:
        return per_group(steps, self.share, self.count)


def _parameters(
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    bits: int,
    symmetric: bool,
    scale_type: ScaleType,
    range_: Range,
    share: _Steps,
) -> _Table:
    """Scales and zeros of groups with these least and greatest values [rows, groups]."""
    if symmetric:
        span: NDArray[np.float32] = np.maximum(np.maximum(-low, high), RANGE_FLOOR)
        scale, steps = _scales(span / np.float32(2 ** (bits - 1) - 1), scale_type, share)
        return _Table(scale, np.full(scale.shape, 2 ** (bits - 1), np.uint8), None, steps)
    if range_ == "include_zero":
        low = np.minimum(low, np.float32(0))
        high = np.maximum(high, np.float32(0))
    widths: NDArray[np.float32] = np.maximum(high - low, RANGE_FLOOR) / np.float32(2**bits - 1)
    scale, steps = _scales(widths, scale_type, share)
    zero = np.clip(-np.rint(low / scale), 0, 2**bits - 1)
    return _Table(scale, zero.astype(np.uint8), None, steps)


def _offset_parameters(
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    bits: int,
    scale_type: ScaleType,
    share: _Steps,
) -> _Table:
    """Scales and offsets of groups with these least and greatest values [rows, groups].

    An offset that is not stored as float32 is rounded down and its scale up: no value lies outside
    what they reach.
    """
    offset_steps = None
    if scale_type == "i8":
        offset_steps = share.reaching(low)
        step = share.of_groups(offset_steps)
        factors = np.divide(low, step, out=np.zeros_like(low), where=step > 0)
        low = np.floor(factors) * step
    elif scale_type == "f16":
        with np.errstate(over="ignore"):
            half = low.astype(np.float16)
        above = half.astype(np.float32) > low
        half[above] = np.nextafter(half[above], np.float16(-np.inf))
        if not np.isfinite(half).all():
            raise _too_large(float(low.min()), "an offset")
        low = half.astype(np.float32)
    widths: NDArray[np.float32] = np.maximum(high - low, RANGE_FLOOR) / np.float32(2**bits - 1)
    scale, steps = _scales(widths, scale_type, share, up=True)
    return _Table(scale, np.zeros(low.shape, np.uint8), low, steps, offset_steps)


def _scales(
    widths: NDArray[np.float32], scale_type: ScaleType, share: _Steps, *, up: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Scales [rows, groups] as their stored type will give them back, and steps if it has them.

    Factors of steps are rounded up: a small group beside large ones must not be clipped.
    """
    if scale_type != "i8":
        return _stored(widths, scale_type, up=up), None
    steps = share.reaching(widths)
    step = share.of_groups(steps)
    factors = np.clip(np.ceil(widths / step), np.float32(1), np.float32(STEP_LEVELS))
    return factors * step, steps


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
