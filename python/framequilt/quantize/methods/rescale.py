"""Factors and clips on weights: one place for what AWQ and SmoothQuant do to a model.

For a factor s > 0 per input channel of some linears, their columns are multiplied by s, and
whatever makes that input is divided by it, so that the float model stays what it was. Formulas: AWQ
(arXiv 2306.00978, section 3.2), SmoothQuant (arXiv 2211.10438, section 4).

Memory: what is returned. Any thread.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from framequilt.convert.sources import SourceTensor
from framequilt.errors import InvalidArgument
from framequilt.quantize.calibration.blocks import Half
from framequilt.quantize.methods.grids import per_input


def scale_columns(weight: Tensor, s: Tensor) -> Tensor:
    """Weight [out, inputs] of a linear whose inputs were divided by s [inputs]."""
    return weight * s


def divide_outputs(values: Tensor, s: Tensor) -> Tensor:
    """Weight [out, inputs] or vector [out] of what makes those inputs: its last len(s) rows."""
    if len(s) > len(values):
        raise InvalidArgument(f"{len(s)} factors for {len(values)} outputs")
    result = values.clone()
    tail = result[len(values) - len(s) :]
    tail /= s.view(-1, *[1] * (values.dim() - 1))
    return result


def clip_groups(weight: Tensor, most: Tensor, group: int) -> Tensor:
    """Weight [out, inputs] within +-most [out, groups], in groups of `group` (0: the whole row)."""
    bound = per_input(most, group or weight.shape[1], weight.shape[1])
    return torch.minimum(torch.maximum(weight, -bound), bound)


def scale_half(
    weights: Mapping[str, Tensor], half: Half, norm: Tensor | None, fold: Tensor | None
) -> dict[str, Tensor]:
    """A layer's tensors with factors `norm` on the inputs of the first linears of a half, and
    `fold` on those of its last; None leaves them."""
    result = dict(weights)
    if norm is not None:
        for suffix in ("weight", "bias"):
            name = f"{half.norm_name}.{suffix}"
            if name in result:
                result[name] = divide_outputs(result[name], norm)
        for linear in half.firsts:
            result[f"{linear}.weight"] = scale_columns(result[f"{linear}.weight"], norm)
    if fold is not None:
        if half.fold is None:
            raise InvalidArgument(f"nothing before {half.last} can take a factor")
        for suffix in ("weight", "bias"):
            name = f"{half.fold}.{suffix}"
            if name in result:
                result[name] = divide_outputs(result[name], fold)
        result[f"{half.last}.weight"] = scale_columns(result[f"{half.last}.weight"], fold)
    return result


class RescaledTensor(SourceTensor):
    """A checkpoint's tensor with factors and clips, read piece by piece like any other."""

    def __init__(
        self,
        source: SourceTensor,
        *,
        columns: NDArray[np.float32] | None = None,
        divide: NDArray[np.float32] | None = None,
        most: NDArray[np.float32] | None = None,
        group: int = 0,
    ) -> None:
        """Columns are multiplied by `columns` [inputs], rows divided by `divide` [rows], groups of
        `group` (0: the row) clipped to +-`most` [rows, groups], in this order, which
        is that of `scale_half`."""
        self.name, self.shape, self.dtype = source.name, source.shape, source.dtype
        self.bytes = source.bytes
        self._source, self._columns, self._divide = source, columns, divide
        self._most, self._group = most, group

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        values = torch.from_numpy(np.array(self._source.rows(start, stop)))
        if self._columns is not None:
            values = scale_columns(values, torch.from_numpy(self._columns))
        if self._divide is not None:
            values = divide_outputs(values, torch.from_numpy(self._divide[start:stop]))
        if self._most is not None:
            most = torch.from_numpy(self._most[start:stop])
            values = clip_groups(values, most, self._group)
        result: NDArray[np.float32] = values.numpy()
        return result
