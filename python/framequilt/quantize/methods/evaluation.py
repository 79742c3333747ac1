"""What a method is worth: KL divergence from the float model, perplexity, size, on held-out text.

The float model and a candidate go through the same layers of torch; a candidate's weights are what
the engine would read back, embedding, head and everything visual included, and its inputs are
quantized where the scheme says so. The KV cache stays in float.

    KL = mean over scored tokens of sum_v p_float(v) (log p_float(v) - log p(v)), in nats
    perplexity = exp(mean over scored tokens of -log p(token))

Intervals are 95 % of the mean, with samples as clusters: tokens of one sample are not independent.
Memory: one layer, the rows of all samples, logits of `_CHUNK` tokens. Any thread.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from framequilt.quantize.calibration import visual
from framequilt.quantize.calibration.blocks import (
    Linears,
    apply_norm,
    fake_quantize_rows,
    halves,
    part_of,
)
from framequilt.quantize.calibration.checkpoint import Checkpoint
from framequilt.quantize.calibration.rows import MEMORY_LIMIT
from framequilt.quantize.calibration.samples import Sample
from framequilt.quantize.methods.grids import fake_quantize
from framequilt.quantize.methods.result import MethodResult
from framequilt.quantize.methods.runner import advance, projected, prompt_rows, tower_rows
from framequilt.quantize.schemes import EMBEDDING, HEAD, parse_activation_scheme, parse_scheme

_CHUNK = 128  # tokens whose logits are held at a time
_Z = 1.96


@dataclass(frozen=True)
class Scored:
    """The states [tokens, hidden] before the head of all scored tokens, and what came next."""

    states: Tensor
    targets: NDArray[np.int64]
    sample: NDArray[np.int64]  # which sample each token is of


def run(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    result: MethodResult | None,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Scored:
    """Runs the float model (`result` None) or a candidate over samples.

    `folder` takes rows that do not fit in memory.
    """
    with torch.no_grad():
        return _run(checkpoint, samples, result, folder, progress)


def _run(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    result: MethodResult | None,
    folder: Path,
    progress: Callable[[int, int], None] | None,
) -> Scored:
    model = checkpoint.model
    sees = any(sample.videos for sample in samples)
    side = _side(checkpoint, result) if sees else {}
    parts = (["vision"] if sees else []) + ["decoder"]
    acts = None if result is None else parse_activation_scheme(result.activations)
    total = sum(part_of(model, name).layers for name in parts)
    done = 0
    videos: list[Tensor] = []
    for name in parts:
        spill = folder / f"rows.evaluation.{name}.{os.getpid()}"
        if name == "vision":
            store = tower_rows(checkpoint, samples, spill, MEMORY_LIMIT, side)
        else:
            embed = _embedding(checkpoint, result)
            store = prompt_rows(checkpoint, samples, videos, spill, MEMORY_LIMIT, embed)
        try:
            spec = part_of(model, name)
            for number in range(spec.layers):
                weights = checkpoint.layer(name, number)
                forms = {}
                if result is not None and acts is not None:
                    weights = result.stored(name, number, weights)
                    at = f"{name}.layers.{number}."
                    forms = {
                        local: acts.format_of(at + local)
                        for local in result.local_formats(name, number)
                    }
                linears = Linears(weights, forms)
                for half in halves(spec):
                    advance(half, store, linears)
                done += 1
                if progress is not None:
                    progress(done, total)
            if name == "vision":
                videos = projected(checkpoint, samples, store, side)
                continue
            norm = {"n.weight": checkpoint.tensor("decoder.final_norm.weight")}
            if model.decoder.norm.kind == "layer":
                norm["n.bias"] = checkpoint.tensor("decoder.final_norm.bias")
            states, targets, owners = [], [], []
            for index, sample in enumerate(samples):
                rows, ids = scored_rows(sample, store.shape(index)[1])
                states.append(apply_norm(store.get(index)[0, rows], norm, "n", model.decoder.norm))
                targets.append(ids)
                owners.append(np.full(len(ids), index, np.int64))
            return Scored(torch.cat(states), np.concatenate(targets), np.concatenate(owners))
        finally:
            store.close()
    raise AssertionError("every model has a decoder")


def scored_rows(sample: Sample, total: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of a sample that predict a scored token, and those tokens.

    `total` is the sample's number of rows, videos included.
    """
    text = sum(len(part) for part in sample.parts if part.ndim == 1)
    visual_rows = total - text
    count = max(len(sample.videos), 1)
    pieces = [
        part if part.ndim == 1 else np.full(visual_rows // count, -1, np.int64)
        for part in sample.parts
    ]
    if len({len(video) for video in sample.videos}) > 1:
        # Only the end of such a sample can be located without each video's own count.
        last = next(n for n in range(len(sample.parts) - 1, -1, -1) if sample.parts[n].ndim == 4)
        tail = sample.parts[last + 1 :]
        pieces = [np.full(total - sum(map(len, tail)), -1, np.int64), *tail]
    ids = np.concatenate(pieces)
    first = len(ids) - sample.scored if sample.scored else 1
    at = np.arange(max(first, 1), len(ids))
    at = at[ids[at] >= 0]
    return at - 1, ids[at]


def _side(checkpoint: Checkpoint, result: MethodResult | None) -> dict[str, Tensor]:
    """Everything visual outside of layers, rounded as the candidate's scheme says."""
    tensors = visual.side_tensors(checkpoint)
    if result is not None:
        scheme = parse_scheme(result.weights)
        for name in tensors:
            if checkpoint.wanted[name].linear:
                form = scheme.format_of(name.removesuffix(".weight"))
                tensors[name] = fake_quantize(tensors[name], form, result.range_)
    return tensors


def _embedding(checkpoint: Checkpoint, result: MethodResult | None) -> Callable[[Any], Tensor]:
    if result is None:
        return checkpoint.lookup
    tied = checkpoint.model.decoder.tied_embedding
    form = parse_scheme(result.weights).format_of(EMBEDDING, tied=tied)
    return lambda ids: fake_quantize(checkpoint.lookup(ids), form, result.range_)


def _head(checkpoint: Checkpoint, result: MethodResult | None) -> Tensor:
    tied = checkpoint.model.decoder.tied_embedding
    slot = EMBEDDING if tied else HEAD
    weight = checkpoint.tensor(f"{slot}.weight")
    if result is None:
        return weight
    return fake_quantize(weight, parse_scheme(result.weights).format_of(slot, tied=tied))


@dataclass(frozen=True)
class Interval:
    """A mean and half of its 95 % interval."""

    mean: float
    half: float

    def to_json(self) -> dict[str, float]:
        """Plain values."""
        return {"mean": self.mean, "half": self.half}


def clustered(values: NDArray[np.float64], cluster: NDArray[np.int64]) -> Interval:
    """Mean of values and its interval, for clusters of dependent values.

    Infinite below two clusters. Linearised variance of a ratio (Cochran, Sampling Techniques,
    11.7).
    """
    mean = float(values.mean())
    names, index = np.unique(cluster, return_inverse=True)
    if len(names) < 2:
        return Interval(mean, math.inf)
    sums = np.bincount(index, values - mean)
    variance = float((sums**2).sum()) / len(values) ** 2 * len(names) / (len(names) - 1)
    return Interval(mean, _Z * math.sqrt(variance))


@dataclass(frozen=True)
class Comparison:
    """Per scored token: KL in nats, -log p of both models, whether first choices agree."""

    kl: NDArray[np.float64]
    loss: NDArray[np.float64]
    float_loss: NDArray[np.float64]
    same: NDArray[np.bool_]
    right: NDArray[np.bool_]  # whether the candidate's first choice is what came next
    sample: NDArray[np.int64]

    def take(self, tokens: NDArray[np.bool_]) -> Comparison:
        """Some of the tokens."""
        return Comparison(
            self.kl[tokens], self.loss[tokens], self.float_loss[tokens], self.same[tokens],
            self.right[tokens], self.sample[tokens],
        )  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """Means and intervals; perplexities as exp of the ends of their interval."""
        names = np.unique(self.sample)
        loss, base = clustered(self.loss, self.sample), clustered(self.float_loss, self.sample)
        return {
            "tokens": len(self.kl),
            "samples": len(names),
            "kl": clustered(self.kl, self.sample).to_json(),
            "kl_median": float(np.median(self.kl)),
            "perplexity": _perplexity(loss),
            "float_perplexity": _perplexity(base),
            "loss_increase": clustered(self.loss - self.float_loss, self.sample).to_json(),
            "same_choice": clustered(self.same.astype(np.float64), self.sample).to_json(),
            "all_right": int(sum(self.right[self.sample == n].all() for n in names)),
        }


def _perplexity(loss: Interval) -> dict[str, float]:
    return {
        "value": math.exp(loss.mean),
        "low": math.exp(loss.mean - loss.half),
        "high": math.exp(loss.mean + loss.half),
    }


def typical_change(
    kl: NDArray[np.float64], plain: NDArray[np.float64], sample: NDArray[np.int64]
) -> dict[str, float]:
    """The geometric mean of kl / plain over tokens, with its 95 % interval.

    A mean of divergences hangs on a few tokens where it is large; this one counts all alike.
    Divergences below 1e-12 are taken for that: they are rounding.
    """
    ratio = clustered(np.log(np.maximum(kl, 1e-12) / np.maximum(plain, 1e-12)), sample)
    low, high = ratio.mean - ratio.half, ratio.mean + ratio.half
    return {"value": math.exp(ratio.mean), "low": math.exp(low), "high": math.exp(high)}


def compare(
    checkpoint: Checkpoint, exact: Scored, found: Scored, result: MethodResult | None
) -> Comparison:
    """Both models' predictions of the same tokens; `result` is the candidate's."""
    with torch.no_grad():
        return _compare(checkpoint, exact, found, result)


def _compare(
    checkpoint: Checkpoint, exact: Scored, found: Scored, result: MethodResult | None
) -> Comparison:
    heads = _head(checkpoint, None), _head(checkpoint, result)
    form = None
    if result is not None:
        tied = checkpoint.model.decoder.tied_embedding
        acts = parse_activation_scheme(result.activations)
        form = acts.format_of(EMBEDDING if tied else HEAD, tied=tied)
    kl, loss, float_loss, same, right = [], [], [], [], []
    for at in range(0, len(exact.targets), _CHUNK):
        rows = slice(at, at + _CHUNK)
        theirs = found.states[rows]
        theirs = theirs if form is None else fake_quantize_rows(theirs, form)
        # In float64: a divergence of 1e-7 is a difference of large sums.
        p = functional.log_softmax(functional.linear(exact.states[rows], heads[0]).double(), -1)
        q = functional.log_softmax(functional.linear(theirs, heads[1]).double(), -1)
        kl.append((p.exp() * (p - q)).sum(-1))
        next_token = torch.from_numpy(exact.targets[rows])[:, None]
        loss.append(-q.gather(1, next_token)[:, 0])
        float_loss.append(-p.gather(1, next_token)[:, 0])
        same.append(p.argmax(-1) == q.argmax(-1))
        right.append(q.argmax(-1) == next_token[:, 0])
    return Comparison(
        torch.cat(kl).numpy(), torch.cat(loss).numpy(), torch.cat(float_loss).numpy(),
        torch.cat(same).numpy(), torch.cat(right).numpy(), exact.sample,
    )  # fmt: skip


def stored_bytes(checkpoint: Checkpoint, weights: str | None, activations: str = "a16") -> int:
    """Bytes of all tensors in a scheme, in bfloat16 (vectors in float32) for None."""
    tied = checkpoint.model.decoder.tied_embedding
    scheme, inputs = parse_scheme(weights or "bf16"), parse_activation_scheme(activations)
    total = 0
    for target, slot in checkpoint.wanted.items():
        if slot.linear:
            name = target.removesuffix(".weight")
            out, width = slot.shape
            form = scheme.format_of(name, tied=tied)
            total += form.stored_bytes(out, width, inputs.format_of(name, tied=tied))
        else:
            total += 4 * math.prod(slot.shape)
    return total
