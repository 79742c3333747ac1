"""The quantizer of `framequilt.quantize.rtn` in torch, split in two: parameters, then codes.

Scale, zero and offset of a group depend on its least and greatest value only, so they come from
`rtn.quantize` itself, asked about groups of two: the two programs cannot differ. Codes then follow
with the same float32 operations. Memory: what is returned. Any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from framequilt.errors import InvalidArgument
from framequilt.quantize.formats import STEP_INPUTS, WeightFormat
from framequilt.quantize.rtn import Quantized, Range, quantize
from framequilt.quantize.tiles import from_bf16, to_bf16


def group_size(form: WeightFormat, inputs: int) -> int:
    """Inputs of one group."""
    return min(form.group or inputs, inputs)


def in_groups(w: Tensor, size: int) -> Tensor:
    """[out, inputs] -> [out, groups, size]; a short last group repeats its last value."""
    missing = -w.shape[1] % size
    if missing:
        w = functional.pad(w[None], (0, missing), mode="replicate")[0]
    return w.view(len(w), -1, size)


def per_input(table: Tensor, size: int, inputs: int) -> Tensor:
    """[out, groups] -> [out, inputs]."""
    return table.repeat_interleave(size, 1)[:, :inputs]


@dataclass(frozen=True)
class Grid:
    """Scales, zeros and offsets [out, groups] of a weight [out, inputs] in an affine format."""

    form: WeightFormat
    inputs: int
    scales: Tensor
    zeros: Tensor
    offsets: Tensor | None
    scale_steps: Tensor | None  # of scales in int8
    offset_steps: Tensor | None

    @classmethod
    def of(cls, w: Tensor, form: WeightFormat, range_: Range = "include_zero") -> Grid:
        """The grid of plain rounding. Errors: those of `rtn.quantize`, InvalidArgument."""
        groups = in_groups(w, group_size(form, w.shape[1]))
        return cls.between(groups.amin(-1), groups.amax(-1), form, w.shape[1], range_)

    @classmethod
    def between(
        cls, low: Tensor, high: Tensor, form: WeightFormat, inputs: int,
        range_: Range = "include_zero",
    ) -> Grid:  # fmt: skip
        """The grid of groups with these least and greatest values, [out, groups] each."""
        if form.kind != "affine":
            raise InvalidArgument(f"{form.name} has no grid")
        ends = torch.stack([low, high], -1).flatten(1).numpy()
        found = quantize(
            ends, bits=form.bits, group=2, symmetric=form.symmetric, scale=form.scale,
            offset=form.offset, range_=range_,
            groups_per_step=STEP_INPUTS // form.group if form.stepped else None,
        )  # fmt: skip
        zeros = torch.from_numpy(found.zeros.astype(np.float32))
        return cls(
            form, inputs, torch.from_numpy(found.scales), zeros,
            *map(_tensor, (found.offsets, found.scale_steps, found.offset_steps)),
        )  # fmt: skip

    def columns(self, first: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scale, zero and offset of the inputs first .. stop - 1, [out, stop - first] each."""
        owner = torch.arange(first, stop) // group_size(self.form, self.inputs)
        offsets = None if self.offsets is None else self.offsets[:, owner]
        return self.scales[:, owner], self.zeros[:, owner], offsets

    def codes(self, w: Tensor) -> Tensor:
        """Codes of a whole weight [out, inputs], as float32."""
        return self._each(w, self._round)

    def values(self, codes: Tensor) -> Tensor:
        """What codes [out, inputs] stand for."""
        return self._each(codes, self._restore)

    def rounded(self, w: Tensor) -> Tensor:
        """A weight [out, inputs] as it is read back."""
        return self._each(w, lambda part, *table: self._restore(self._round(part, *table), *table))

    def _round(self, w: Tensor, scale: Tensor, zero: Tensor, offset: Tensor | None) -> Tensor:
        if offset is not None:
            steps = (w - offset).div_(scale).round_()
        else:
            steps = w.div(scale).round_().add_(zero)
        return steps.clamp_(0, 2**self.form.bits - 1)

    def _restore(self, codes: Tensor, scale: Tensor, zero: Tensor, offset: Tensor | None) -> Tensor:
        if offset is not None:
            return (codes * scale).add_(offset)
        return (codes - zero).mul_(scale)

    def _each(self, x: Tensor, change: Callable[..., Tensor]) -> Tensor:
        """`change` of groups [out, groups, size] with their tables [out, groups, 1]."""
        size = group_size(self.form, self.inputs)
        whole = self.inputs // size
        result = torch.empty_like(x)
        split = whole * size
        for columns, owners, width in (
            (slice(0, split), slice(0, whole), size),
            (slice(split, self.inputs), slice(whole, None), self.inputs - split),
        ):
            if width:
                tables = [
                    None if table is None else table[:, owners, None]
                    for table in (self.scales, self.zeros, self.offsets)
                ]
                part = x[:, columns].unflatten(1, (-1, width))
                result[:, columns] = change(part, *tables).flatten(1)
        return result

    def quantized(self, codes: Tensor) -> Quantized:
        """Codes and parameters as they are stored."""
        return Quantized(
            codes.to(torch.uint8).numpy(), self.scales.numpy(),
            self.zeros.to(torch.uint8).numpy(), self.form.bits, self.form.group,
            *map(_array, (self.offsets, self.scale_steps, self.offset_steps)),
        )  # fmt: skip


def _tensor(table: NDArray[np.float32] | None) -> Tensor | None:
    return None if table is None else torch.from_numpy(table)


def _array(table: Tensor | None) -> NDArray[np.float32] | None:
    return None if table is None else table.numpy()


def fake_quantize(w: Tensor, form: WeightFormat, range_: Range = "include_zero") -> Tensor:
    """A weight [out, inputs] as it is read back after plain rounding to `form`."""
    if form.kind == "f32":
        return w
    if form.kind == "bf16":
        return torch.from_numpy(from_bf16(to_bf16(w.numpy())))
    return Grid.of(w, form, range_).rounded(w)
