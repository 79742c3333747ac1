"""Uniform round-to-nearest quantization of groups, vectorised.

Formulas: the quantizer of "Evaluating Quantized Large Language Models" (arXiv 2402.18158), section
2, in float32, rounding half to even. Two changes for production, both of which can be switched off:
the range of a group is extended to contain zero (`include_zero`), since otherwise groups without a
sign change are destroyed by the clamped zero point; and a scale may be stored as float16, in which
case it is rounded before the codes are computed, so that nothing is lost afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from framequilt.errors import CorruptModel, InvalidArgument, Unsupported

Range = Literal["include_zero", "reference"]
RANGES: tuple[Range, ...] = ("include_zero", "reference")

# The least range (asymmetric) or largest magnitude (symmetric) that a group is taken to have.
RANGE_FLOOR = np.float32(1e-5)
_F16_NORMAL = np.float32(2.0**-14)


@dataclass(frozen=True)
class Quantized:
    """Codes and parameters of rows [rows, inputs]; w = (code - zero) * scale.

    Symmetric codes are stored with an offset of 2^(bits-1), which is then their zero.
    """

    codes: NDArray[np.uint8]  # [rows, inputs]
    scales: NDArray[np.float32]  # [rows, groups], already rounded to their stored type
    zeros: NDArray[np.uint8]  # [rows, groups]
    bits: int
    group: int  # inputs per group; 0: the whole row


def quantize(
    x: NDArray[np.float32],
    *,
    bits: int,
    group: int,
    symmetric: bool = False,
    scale: Literal["f16", "f32"] = "f16",
    range_: Range = "include_zero",
) -> Quantized:
    """Quantizes rows [rows, inputs] in groups of `group` consecutive inputs.

    A last group is shorter where the group does not divide the inputs; group 0 is the whole row.
    bits is 2..8. Errors: InvalidArgument; CorruptModel for values that are not finite; Unsupported
    for scales that float16 cannot hold.
    """
    if not 2 <= bits <= 8:
        raise InvalidArgument(f"{bits} bits: weights take 2 to 8")
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
    zeros = np.empty((rows, count), np.uint8)
    split = whole * size
    parts = [(x[:, :split].reshape(rows, whole, size), slice(0, split), slice(0, whole))]
    if count > whole:
        parts.append((x[:, None, split:], slice(split, inputs), slice(whole, count)))
    for values, columns, owners in parts:
        part_scale, part_zero = _parameters(values, bits, symmetric, scale, range_)
        steps = np.rint(values / part_scale[..., None])
        steps += part_zero[..., None]
        np.clip(steps, 0, 2**bits - 1, out=steps)
        codes[:, columns] = steps.reshape(rows, -1)
        scales[:, owners] = part_scale
        zeros[:, owners] = part_zero
    return Quantized(codes, scales, zeros, bits, group)


def _parameters(
    values: NDArray[np.float32],
    bits: int,
    symmetric: bool,
    scale_type: Literal["f16", "f32"],
    range_: Range,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and zero, both [rows, groups] float32, of groups [rows, groups, size]."""
    low = values.min(axis=-1)
    high = values.max(axis=-1)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise CorruptModel("a weight is not a finite number")
    if symmetric:
        span = np.maximum(np.maximum(-low, high), RANGE_FLOOR)
        scale = _stored(span / np.float32(2 ** (bits - 1) - 1), scale_type)
        return scale, np.full_like(scale, 2 ** (bits - 1))
    if range_ == "include_zero":
        low = np.minimum(low, np.float32(0))
        high = np.maximum(high, np.float32(0))
    scale = _stored(np.maximum(high - low, RANGE_FLOOR) / np.float32(2**bits - 1), scale_type)
    zero = np.clip(-np.rint(low / scale), 0, 2**bits - 1)
    return scale, zero.astype(np.float32)


def _stored(scale: NDArray[np.float32], scale_type: Literal["f16", "f32"]) -> NDArray[np.float32]:
    """The scale as its stored type will give it back.

    Below float16's normal range its steps are coarse: there the scale is rounded up, because one
    that is too small by several percent would clip the ends of the group.
    """
    if scale_type == "f32":
        return scale
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if not np.isfinite(half).all():
        raise Unsupported(
            f"a scale of {float(scale.max()):g} is too large for float16",
            "use a format with the suffix -f32scale",
        )
    short = (scale < _F16_NORMAL) & (half.astype(np.float32) < scale)
    if short.any():
        half[short] = np.nextafter(half[short], np.float16(np.inf))
    return half.astype(np.float32)


def dequantize(quantized: Quantized) -> NDArray[np.float32]:
    """Rows [rows, inputs] in float32: float(code - zero) * scale."""
    inputs = quantized.codes.shape[1]
    size = quantized.group or max(inputs, 1)
    owner = np.arange(inputs) // size
    steps = quantized.codes.astype(np.int16) - quantized.zeros.astype(np.int16)[:, owner]
    return steps.astype(np.float32) * quantized.scales[:, owner]
