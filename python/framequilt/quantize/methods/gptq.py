"""GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded one after the other, and what each
loses is made up for by those that come later, weighted by second moments of the inputs.

    H = 2/n sum x x^T;  dead inputs (H_jj = 0): H_jj = 1, w_j = 0;  H += damping * mean(diag H) * I
    U = the upper Cholesky factor of H^-1
    e = (w_j - q_j) / U_jj;  w_k -= e * U_jk for k > j, in a block at once, after it for the rest

With act-order the columns with the largest H_jj go first; groups stay consecutive columns, so their
grids are taken from the unchanged weights ("static groups"). Without it, a group's grid is taken
from the weights as they are when its first column is reached.

Memory: a few matrices [inputs, inputs]. Any thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from framequilt.errors import InvalidArgument
from framequilt.quantize.formats import WeightFormat
from framequilt.quantize.methods.grids import Grid, group_size
from framequilt.quantize.rtn import Quantized, Range

BLOCK = 128
DAMPING = 0.01
_MORE = 10.0  # damping grows by this factor when a matrix is not positive definite
_TRIES = 5


class Moments:
    """Second moments 2/n sum x x^T of input rows [inputs, inputs], float32; n: rows, or weights."""

    def __init__(self, inputs: int) -> None:
        self._sum = torch.zeros(inputs, inputs)
        self.rows = 0.0

    def add(self, x: Tensor, row_weights: Tensor | None = None) -> None:
        """Input rows [..., inputs], and how much each counts."""
        x = x.reshape(-1, x.shape[-1])
        if row_weights is None:
            self.rows += len(x)
        else:
            self.rows += float(row_weights.sum())
            x = x * row_weights.sqrt()[:, None]
        self._sum.addmm_(x.T, x)

    def matrix(self) -> Tensor:
        """H; the sums become it, so that there is one matrix only, and no more rows can be added.

        Errors: InvalidArgument when there were no rows.
        """
        if not self.rows:
            raise InvalidArgument("no calibration rows were seen")
        h = self._sum.mul_(2.0 / self.rows)
        self._sum, self.rows = torch.empty(0), 0.0
        return h


@dataclass(frozen=True)
class Solved:
    """A linear's codes, and how they were found."""

    quantized: Quantized
    values: Tensor  # [out, inputs], what the codes stand for
    damping: float  # that it took; more than what was asked for when Cholesky failed
    double: bool  # whether float64 was needed
    dead: int  # inputs that are always zero


def inverse_factor(h: Tensor, damping: float) -> tuple[Tensor, float, bool]:
    """The upper Cholesky factor of (H + damping)^-1, float32; the damping it took, and whether
    float64 was needed. The diagonal of h is overwritten.

    Errors: InvalidArgument for a matrix that no damping makes positive definite.
    """
    diagonal = h.diagonal().clone()
    mean = float(diagonal.mean())
    double = False
    for _ in range(_TRIES):
        upper = _factor(h.double() if double else h, diagonal, damping * mean)
        if upper is not None:
            return upper.float(), damping, double
        if double:
            damping *= _MORE
        double = True
    raise InvalidArgument(
        f"the second moments of {len(h)} inputs are not positive definite",
        "the calibration rows hold values that are not finite, or too few",
    )


def _factor(h: Tensor, diagonal: Tensor, more: float) -> Tensor | None:
    """The upper Cholesky factor of the inverse of h with the diagonal `diagonal` + `more`."""
    h.diagonal().copy_(diagonal).add_(more)
    lower, failed = torch.linalg.cholesky_ex(h)
    if int(failed):
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower  # at 18944 inputs each of these is 1.4 GB
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    good = not int(failed) and bool(torch.isfinite(upper.diagonal()).all())
    return upper if good else None


def solve(
    w: Tensor,
    h: Tensor,
    form: WeightFormat,
    *,
    act_order: bool = True,
    damping: float = DAMPING,
    block: int = BLOCK,
    range_: Range = "include_zero",
) -> Solved:
    """Codes of a weight [out, inputs] for inputs with second moments h [inputs, inputs].

    Errors: InvalidArgument, also for formats without codes; those of `rtn.quantize`.
    """
    inputs = w.shape[1]
    size = group_size(form, inputs)
    if form.stepped and not act_order:
        raise InvalidArgument(
            f"{form.name}: groups that share a step need their scales before the first code",
            "use act-order, or float scales",
        )
    dead = h.diagonal() == 0
    w = w.masked_fill(dead, 0)
    order = torch.arange(inputs)
    grid = Grid.of(w, form, range_)
    if act_order:
        order = torch.argsort(h.diagonal().masked_fill(dead, 1), descending=True, stable=True)
        w = w[:, order]
        own = h.index_select(0, order).index_select(1, order)
    else:
        own = h.clone()
    own.diagonal()[dead[order]] = 1
    upper, damping, double = inverse_factor(own, damping)
    del own
    top = 2**form.bits - 1
    codes = torch.empty_like(w)
    scales, zeros, offsets = _at_inputs(grid, order)
    for first in range(0, inputs, block):
        stop = min(first + block, inputs)
        part = w[:, first:stop].clone()
        errors = torch.empty_like(part)
        inside = upper[first:stop, first:stop]
        for j in range(stop - first):
            at = first + j
            if not act_order and at % size == 0:
                end, group = min(at + size, inputs), at // size
                # What lies beyond the block has not yet made up for this block's errors.
                beyond = w[:, stop:end] - errors[:, :j] @ upper[first:at, stop:end]
                own = torch.cat([part[:, j : end - first], beyond], 1)
                _take_group(grid, own, group, range_)
                scales[:, at:end] = grid.scales[:, group, None]
                zeros[:, at:end] = grid.zeros[:, group, None]
                if offsets is not None and grid.offsets is not None:
                    offsets[:, at:end] = grid.offsets[:, group, None]
            column, scale, zero = part[:, j], scales[:, at], zeros[:, at]
            if offsets is not None:
                q = ((column - offsets[:, at]) / scale).round_().clamp_(0, top)
                value = q * scale + offsets[:, at]
            else:
                q = (column / scale).round_().add_(zero).clamp_(0, top)
                value = (q - zero) * scale
            codes[:, at] = q
            error = (column - value) / inside[j, j]
            part[:, j:] -= error[:, None] * inside[j, j:]
            errors[:, j] = error
        w[:, stop:] -= errors @ upper[first:stop, stop:]
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    return Solved(grid.quantized(restored), grid.values(restored), damping, double, int(dead.sum()))


def _at_inputs(grid: Grid, order: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scale, zero and offset [out, inputs] of every input, in the order of processing."""
    scales, zeros, offsets = grid.columns(0, grid.inputs)
    return scales[:, order], zeros[:, order], None if offsets is None else offsets[:, order]


def _take_group(grid: Grid, values: Tensor, group: int, range_: Range) -> None:
    """Sets one group's parameters from its values [out, size]."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    own = Grid.between(low, high, grid.form, values.shape[1], range_)
    grid.scales[:, group], grid.zeros[:, group] = own.scales[:, 0], own.zeros[:, 0]
    if grid.offsets is not None and own.offsets is not None:
        grid.offsets[:, group] = own.offsets[:, 0]


def output_error(w: Tensor, values: Tensor, h: Tensor) -> float:
    """||X (values - w)^T||^2 / ||X w^T||^2 for inputs with second moments h."""
    delta = values - w
    total = float(((w @ h) * w).sum(dtype=torch.float64))
    return float(((delta @ h) * delta).sum(dtype=torch.float64)) / max(total, 1e-30)
