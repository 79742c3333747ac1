"""What AWQ and SmoothQuant share: statistics of one half of a layer, and the error of a candidate.

Both see the rows of the float model, since folding a factor changes nothing before rounding. Rows
count as much as their store says (`RowStore.weights_of`): a row of weight n is as n equal rows.
Memory: rows of some whole samples (`Budget.search_rows`) and of some tokens (`Budget.clip_rows`).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from framequilt.quantize.calibration.blocks import Half, Linears
from framequilt.quantize.calibration.rows import RowStore
from framequilt.quantize.formats import ActivationFormat, WeightFormat
from framequilt.quantize.methods.grids import fake_quantize
from framequilt.quantize.rtn import Range

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """Formats of a layer's linears by local name."""

    formats: Mapping[str, WeightFormat]
    activations: Mapping[str, ActivationFormat | None]
    range_: Range = "include_zero"

    def rounds(self, half: Half) -> bool:
        """Whether any linear of a half has codes or quantized inputs."""
        return any(
            self.formats[name].kind == "affine" or self.activations.get(name) is not None
            for name in half.linears
        )

    def inputs_of(self, linears: tuple[str, ...]) -> dict[str, ActivationFormat | None]:
        """How the inputs of these linears are quantized."""
        return {name: self.activations.get(name) for name in linears}


@dataclass(frozen=True)
class Budget:
    """How many rows are kept for the searches."""

    search_rows: int = 2048
    clip_rows: int = 512


@dataclass
class HalfResult:
    """What a method decided about a half: factors by the linear's or norm's name that takes the
    division, clips by linear, and figures."""

    scales: dict[str, Tensor] = field(default_factory=dict)
    clips: dict[str, Tensor] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


class Statistics:
    """Magnitudes per channel of what the first linears and the last one read, and kept rows.

    Means are of weighted rows; the greatest magnitudes are of all rows, whatever they count.
    """

    def __init__(self, half: Half, weights: Weights, store: RowStore, budget: Budget) -> None:
        """Also moves `store` on to the output of the half."""
        self.half, self.weights = half, weights
        count = len(store)
        self._kept = _whole_samples(store, budget.search_rows)
        per_sample = -(-budget.clip_rows // max(count, 1))
        self.normed: list[Tensor] = []  # whole samples, for the search
        self.reference: list[Tensor] = []  # outputs of the half for them
        self._row_weights: list[Tensor | None] = []  # of the whole samples
        some: tuple[list[Tensor], list[Tensor]] = ([], [])
        some_weights: list[Tensor] = []
        total: list[Tensor] = []
        most: list[Tensor] = []
        rows, counted = 0, 0.0
        linears = Linears(weights)
        for index in range(count):
            x = store.get(index)
            normed = half.normed(x, weights)
            inner = half.inner(normed, linears)
            output = linears(half.last, inner)
            store.put(index, x + output)
            own = store.weights_of(index)
            length = normed.numel() // normed.shape[-1]
            step = max(length // per_sample, 1)
            for place, values in enumerate((normed, inner)):
                flat = values.reshape(-1, values.shape[-1])
                magnitude = flat.abs()
                peaks = magnitude.amax(0)
                if own is not None:
                    magnitude *= own[:, None]
                sums = magnitude.sum(0, dtype=torch.float64)
                if index == 0:
                    total.append(sums)
                    most.append(peaks)
                else:
                    total[place] += sums
                    most[place] = torch.maximum(most[place], peaks)
                some[place].append(flat[::step][:per_sample].clone())
            if own is not None:
                some_weights.append(own[::step][:per_sample])
            rows += length
            counted += length if own is None else float(own.sum())
            if index in self._kept:
                self.normed.append(normed)
                self.reference.append(output)
                self._row_weights.append(own)
        self.rows = rows
        # Of the norm's rows, of the inner rows.
        self.mean = [(values / counted).float() for values in total]
        self.most = most
        self.tokens = [torch.cat(values) for values in some]
        self.token_weights = torch.cat(some_weights) if some_weights else None
        self._last_rounded: dict[str, tuple[weakref.ref[Tensor], Tensor]] = {}

    def branch_error(
        self, weights: Weights, setting: Setting, rounded: tuple[str, ...],
        norm_factor: Tensor | None = None,
    ) -> float:  # fmt: skip
        """Squared error of the half's output on the kept samples, over its size.

        `weights` are scaled already, with `norm_factor`; the linears `rounded` are rounded, and
        their inputs quantized.
        """
        changed = dict(weights)
        for name in rounded:
            key = f"{name}.weight"
            changed[key] = self._rounded(key, weights[key], setting.formats[name], setting.range_)
        linears = Linears(changed, setting.inputs_of(rounded))
        error = size = 0.0
        kept = zip(self.normed, self.reference, self._row_weights, strict=True)
        for normed, reference, own in kept:
            x = normed if norm_factor is None else normed / norm_factor
            error += _square(self.half.branch(x, linears) - reference, own)
            size += _square(reference, own)
        return error / max(size, 1e-30)

    def _rounded(self, key: str, weight: Tensor, form: WeightFormat, range_: Range) -> Tensor:
        """A weight as it is read back. Candidates share most tensors with the one before.

        A rounding goes with its weight: kept on, those of a candidate that is done would lie in
        memory beside the next one's. Where another one has taken its place, its reference is gone
        before it, and nothing is called.
        """
        last = self._last_rounded.get(key)
        if last is not None and last[0]() is weight:
            return last[1]
        rounded, roundings = fake_quantize(weight, form, range_), self._last_rounded
        roundings[key] = weakref.ref(weight, lambda _: roundings.pop(key, None)), rounded
        return rounded


def _square(x: Tensor, row_weights: Tensor | None) -> float:
    """The sum of the squares of rows [..., columns], each row times its weight."""
    squares = x.square()
    if row_weights is None:
        return float(squares.sum(dtype=torch.float64))
    rows = squares.sum(-1, dtype=torch.float64).flatten()
    return float(rows @ row_weights.double())


def _whole_samples(store: RowStore, rows: int) -> set[int]:
    """Samples, evenly spread, of about `rows` rows together; at least one."""
    count = len(store)
    wanted = max(min(round(rows * count / max(store.tokens, 1)), count), 1)
    return {int(n) for n in torch.linspace(0, count - 1, wanted).round()}
