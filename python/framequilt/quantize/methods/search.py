"""What AWQ and SmoothQuant share: statistics of one half of a layer, and the error of a candidate.

Both see the rows of the float model, since folding a factor changes nothing before rounding.
Memory: rows of some whole samples (`Budget.search_rows`) and of some tokens (`Budget.clip_rows`).
"""

from __future__ import annotations

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

    def rounded(self, weights: Weights, linears: tuple[str, ...]) -> dict[str, Tensor]:
        """The tensors with some linears as they are read back after plain rounding."""
        result = dict(weights)
        for name in linears:
            key = f"{name}.weight"
            result[key] = fake_quantize(weights[key], self.formats[name], self.range_)
        return result

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
    """Magnitudes per channel of what the first linears and the last one read, and kept rows."""

    def __init__(self, half: Half, weights: Weights, store: RowStore, budget: Budget) -> None:
        """Also moves `store` on to the output of the half."""
        self.half, self.weights = half, weights
        count = len(store)
        self._kept = _whole_samples(store, budget.search_rows)
        per_sample = -(-budget.clip_rows // max(count, 1))
        self.normed: list[Tensor] = []  # whole samples, for the search
        self.inner: list[Tensor] = []
        some: tuple[list[Tensor], list[Tensor]] = ([], [])
        total: list[Tensor] = []
        most: list[Tensor] = []
        rows = 0
        linears = Linears(weights)
        for index in range(count):
            x = store.get(index)
            normed = half.normed(x, weights)
            inner = half.inner(normed, linears)
            store.put(index, x + linears(half.last, inner))
            for place, values in enumerate((normed, inner)):
                flat = values.reshape(-1, values.shape[-1])
                magnitude = flat.abs()
                sums, peaks = magnitude.sum(0, dtype=torch.float64), magnitude.amax(0)
                if index == 0:
                    total.append(sums)
                    most.append(peaks)
                else:
                    total[place] += sums
                    most[place] = torch.maximum(most[place], peaks)
                step = max(len(flat) // per_sample, 1)
                some[place].append(flat[::step][:per_sample].clone())
            rows += normed.numel() // normed.shape[-1]
            if index in self._kept:
                self.normed.append(normed)
                self.inner.append(inner)
        self.rows = rows
        self.mean = [(values / rows).float() for values in total]  # of the norm, of the inner rows
        self.most = most
        self.tokens = [torch.cat(values) for values in some]
        self.reference = [linears(half.last, inner) for inner in self.inner]

    def branch_error(
        self, weights: Weights, setting: Setting, rounded: tuple[str, ...],
        norm_factor: Tensor | None = None,
    ) -> float:  # fmt: skip
        """Squared error of the half's output on the kept samples, over its size.

        `weights` are scaled already, with `norm_factor`; the linears `rounded` are rounded, and
        their inputs quantized.
        """
        changed = setting.rounded(weights, rounded)
        linears = Linears(changed, setting.inputs_of(rounded))
        error = size = 0.0
        for normed, reference in zip(self.normed, self.reference, strict=True):
            x = normed if norm_factor is None else normed / norm_factor
            error += _square(self.half.branch(x, linears) - reference)
            size += _square(reference)
        return error / max(size, 1e-30)

    def last_error(self, weights: Weights, setting: Setting, factor: Tensor) -> float:
        """The same for the last linear alone, whose inputs are divided by `factor`."""
        changed = setting.rounded(weights, (self.half.last,))
        linears = Linears(changed, setting.inputs_of((self.half.last,)))
        error = size = 0.0
        for inner, reference in zip(self.inner, self.reference, strict=True):
            error += _square(linears(self.half.last, inner / factor) - reference)
            size += _square(reference)
        return error / max(size, 1e-30)


def _square(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


def _whole_samples(store: RowStore, rows: int) -> set[int]:
    """Samples, evenly spread, of about `rows` rows together; at least one."""
    count = len(store)
    wanted = max(min(round(rows * count / max(store.tokens, 1)), count), 1)
    return {int(n) for n in torch.linspace(0, count - 1, wanted).round()}
