"""Goes through a checkpoint layer by layer: reads one, lets the method decide, keeps what it said.

AWQ and SmoothQuant see the rows of the float model. GPTQ sees what the layers before, already
rounded, make of the samples, half by half. Whatever was finished in an earlier run is read back,
and only the rows are computed again: the result is that of a run without an interruption (on the
same number of threads, on which torch's sums depend).

Memory: one layer with a few copies, the second moments of one linear (GPTQ), and the rows of all
samples, which go to a file in the work folder when they are many (`rows.MEMORY_LIMIT`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from framequilt.convert.spec import Model
from framequilt.errors import Cancelled, InvalidArgument
from framequilt.quantize.calibration import visual
from framequilt.quantize.calibration.blocks import (
    PARTS,
    Half,
    Linears,
    fake_quantize_rows,
    halves,
    part_of,
)
from framequilt.quantize.calibration.checkpoint import Checkpoint
from framequilt.quantize.calibration.rows import MEMORY_LIMIT, RowStore
from framequilt.quantize.calibration.samples import Sample, digest
from framequilt.quantize.formats import WeightFormat
from framequilt.quantize.methods import awq, gptq, smoothquant
from framequilt.quantize.methods.grids import fake_quantize
from framequilt.quantize.methods.result import LayerResult, MethodResult, WorkFolder
from framequilt.quantize.methods.search import Budget, HalfResult, Setting, Statistics
from framequilt.quantize.rtn import Range
from framequilt.quantize.schemes import (
    ActivationScheme,
    Scheme,
    parse_activation_scheme,
    parse_scheme,
)

METHODS = ("rtn", "awq", "gptq", "smoothquant")


# How much an error of a decoder's row of a picture counts, beside 1 for a row of text. There are
# many of them and each matters less: by the loss's gradients, more than ten times less in large
# models (MBQ, arXiv 2412.19509). METHODS.md has what it does here.
MEDIA_WEIGHT = 0.1


@dataclass(frozen=True)
class Options:
    """Settings of the methods; each reads its own."""

    alpha: smoothquant.Alpha = "auto"  # SmoothQuant
    act_order: bool = True  # GPTQ
    damping: float = gptq.DAMPING  # GPTQ
    ratio_steps: int = awq.RATIO_STEPS  # AWQ: ratios n / steps
    search_rows: int = 2048  # AWQ, SmoothQuant: rows on which candidates are compared
    clip_rows: int = 512  # AWQ: rows on which clips are compared
    media_weight: float = MEDIA_WEIGHT  # all methods: see there


@dataclass(frozen=True)
class Step:
    """A layer that is finished; `resumed` when an earlier run had done it."""

    part: str
    layer: int
    done: int
    total: int
    resumed: bool
    report: Mapping[str, Any]


def calibrate(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    *,
    method: str,
    weights: str | Scheme = "w4g128",
    activations: str | ActivationScheme = "a16",
    work: str | os.PathLike[str],
    range_: Range = "include_zero",
    options: Options | None = None,
    progress: Callable[[Step], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> MethodResult:
    """Runs a method over all layers of the decoder, and of the tower when samples have frames.

    `work` is a folder of its own for this job; a job that was interrupted goes on in it. `progress`
    is called after every layer, `cancelled` before it. Linears outside of layers (embedding, head,
    patches, projector) are left to plain rounding. Errors: InvalidArgument (also for a work folder
    of another job), Cancelled, IoError, those of the checkpoint.
    """
    if method not in METHODS:
        raise InvalidArgument(f"unknown method {method!r}", f"known: {', '.join(METHODS)}")
    if not samples:
        raise InvalidArgument("there are no calibration samples")
    scheme = parse_scheme(weights) if isinstance(weights, str) else weights
    acts = parse_activation_scheme(activations) if isinstance(activations, str) else activations
    chosen = options or Options()
    if not 0 <= chosen.media_weight < float("inf"):
        raise InvalidArgument(
            f"rows of pictures count {chosen.media_weight}",
            "a number from 0 (not at all) up; 1 is as much as rows of text",
        )
    run = _Run(checkpoint, samples, method, scheme, acts, range_, chosen, Path(work), memory_limit)
    with torch.no_grad():
        return run.all(progress, cancelled)


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 over names, shapes, types, first and last rows of a checkpoint's tensors."""
    total = hashlib.sha256()
    for target, tensor in checkpoint.found.items():
        total.update(
            f"{target} {None if tensor is None else (tensor.shape, tensor.dtype)}".encode()
        )
        if tensor is not None and tensor.shape and tensor.shape[0]:
            for row in (0, tensor.shape[0] - 1):
                total.update(np.ascontiguousarray(tensor.rows(row, row + 1)).tobytes())
    return total.hexdigest()


def all_halves(model: Model) -> dict[str, tuple[Half, Half]]:
    """The halves of every part that the model has."""
    parts = [name for name in PARTS if getattr(model, name) is not None]
    return {name: halves(part_of(model, name)) for name in parts}


def layer_formats(checkpoint: Checkpoint, scheme: Scheme) -> dict[str, WeightFormat]:
    """Formats of every linear in a layer, by slot."""
    tied = checkpoint.model.decoder.tied_embedding
    slots = [
        name.removesuffix(".weight") for name, kind in checkpoint.wanted.items() if kind.linear
    ]
    return {
        slot: scheme.format_of(slot, tied=tied)
        for slot in slots
        if slot.startswith(tuple(f"{part}.layers." for part in PARTS))
    }


def plain_rounding(
    checkpoint: Checkpoint,
    weights: str,
    activations: str,
    work: str | os.PathLike[str],
    range_: Range = "include_zero",
) -> MethodResult:
    """The result that changes nothing: round to nearest, without samples.

    Errors: as `calibrate`.
    """
    scheme, acts = parse_scheme(weights), parse_activation_scheme(activations)
    job = {"method": "rtn", "weights": scheme.name, "activations": acts.name, "range": range_}
    return MethodResult(
        "rtn", scheme.name, acts.name, WorkFolder(work, job),
        all_halves(checkpoint.model), layer_formats(checkpoint, scheme), {}, range_,
    )  # fmt: skip


@dataclass
class _Run:
    checkpoint: Checkpoint
    samples: Sequence[Sample]
    method: str
    scheme: Scheme
    acts: ActivationScheme
    range_: Range
    options: Options
    work: Path
    memory_limit: int

    def all(
        self, progress: Callable[[Step], None] | None, cancelled: Callable[[], bool] | None
    ) -> MethodResult:
        model = self.checkpoint.model
        sees = any(sample.videos for sample in self.samples)
        parts = (["vision"] if sees and model.vision is not None else []) + ["decoder"]
        specs = {name: part_of(model, name) for name in parts}
        folder = WorkFolder(self.work, self._job())
        result = MethodResult(
            self.method, self.scheme.name, self.acts.name, folder,
            all_halves(model),
            layer_formats(self.checkpoint, self.scheme),
            {name: spec.layers for name, spec in specs.items()}, self.range_,
        )  # fmt: skip
        total = sum(spec.layers for spec in specs.values())
        done = 0
        videos: list[Tensor] = []
        for name, spec in specs.items():
            spill = self.work / f"rows.{name}.{os.getpid()}"
            if name == "vision":
                store = tower_rows(self.checkpoint, self.samples, spill, self.memory_limit)
            else:
                store = prompt_rows(
                    self.checkpoint, self.samples, videos, spill, self.memory_limit,
                    media_weight=self.options.media_weight,
                )  # fmt: skip
            try:
                for number in range(spec.layers):
                    if cancelled is not None and cancelled():
                        raise Cancelled("the calibration was cancelled")
                    found, resumed = self._layer(result, name, number, store)
                    done += 1
                    if progress is not None:
                        progress(Step(name, number, done, total, resumed, found.report))
                if name == "vision":
                    videos = projected(self.checkpoint, self.samples, store)
            finally:
                store.close()
        return result

    def _job(self) -> dict[str, Any]:
        return {
            **({"search": awq.REVISION} if self.method == "awq" else {}),
            "method": self.method,
            "weights": self.scheme.name,
            "activations": self.acts.name,
            "range": self.range_,
            "options": asdict(self.options),
            "samples": digest(self.samples),
            "checkpoint": fingerprint(self.checkpoint),
        }

    def _layer(
        self, result: MethodResult, part: str, number: int, store: RowStore
    ) -> tuple[LayerResult, bool]:
        """One layer decided, or read back; `store` moves on to its output."""
        formats = result.local_formats(part, number)
        setting = Setting(
            formats,
            {name: self.acts.format_of(f"{part}.layers.{number}.{name}") for name in formats},
            self.range_,
        )
        weights = self.checkpoint.layer(part, number)
        known = result.work.load(part, number, formats)
        if known is not None:
            if self.method == "gptq":
                weights = known.stored(weights, result.halves[part], formats, self.range_)
            acts = setting.activations if self.method == "gptq" else {}
            for half in result.halves[part]:
                advance(half, store, Linears(weights, acts))
            return known, True
        found = LayerResult()
        for half in result.halves[part]:
            if self.method == "gptq":
                own = self._gptq(half, weights, store, setting, found)
            else:
                own = self._search(half, weights, store, setting)
            found.scales |= own.scales
            found.clips |= own.clips
            found.report[half.name] = own.report
        result.work.save(part, number, found)
        return found, False

    def _search(
        self, half: Half, weights: Mapping[str, Tensor], store: RowStore, setting: Setting
    ) -> HalfResult:
        """AWQ, SmoothQuant or nothing, on the rows of the float model."""
        budget = Budget(self.options.search_rows, self.options.clip_rows)
        statistics = Statistics(half, weights, store, budget)
        plain = statistics.branch_error(weights, setting, half.linears)
        if self.method == "rtn" or not setting.rounds(half):
            own = HalfResult(report={"error": plain})
        elif self.method == "awq":
            own = awq.search_half(half, weights, statistics, setting, self.options.ratio_steps)
        else:
            alpha = self.options.alpha
            own = smoothquant.search_half(half, weights, statistics, setting, alpha)
        own.report["rtn_error"] = plain
        return own

    def _gptq(
        self, half: Half, weights: dict[str, Tensor], store: RowStore, setting: Setting,
        found: LayerResult,
    ) -> HalfResult:  # fmt: skip
        """Codes of one half, on rows of the rounded model. `weights` become the rounded ones."""
        acts = setting.activations
        result = HalfResult()

        def gather(name: str, rows: Callable[[Tensor], Tensor]) -> Tensor:
            moments = gptq.Moments(weights[f"{name}.weight"].shape[1])
            form = acts.get(name)
            for index in range(len(store)):
                x = rows(store.get(index))
                x = x if form is None else fake_quantize_rows(x, form)
                moments.add(x, store.weights_of(index))
            return moments.matrix()

        def decide(name: str, h: Tensor) -> None:
            key, form = f"{name}.weight", setting.formats[name]
            w = weights[key]
            plain = fake_quantize(w, form, self.range_)
            solved = gptq.solve(
                w, h, form, act_order=self.options.act_order, damping=self.options.damping,
                range_=self.range_,
            )  # fmt: skip
            found.codes[name] = solved.quantized
            weights[key] = solved.values
            result.report[name] = {
                "error": gptq.output_error(w, solved.values, h),
                "rtn_error": gptq.output_error(w, plain, h),
                "damping": solved.damping,
                "double": solved.double,
                "dead": solved.dead,
            }

        coded = [name for name in half.linears if setting.formats[name].kind == "affine"]
        for name in half.linears:
            if name not in coded:
                key = f"{name}.weight"
                weights[key] = fake_quantize(weights[key], setting.formats[name], self.range_)
        firsts = [name for name in half.firsts if name in coded]
        # All of them read the same rows, quantized alike unless a pattern says otherwise.
        for kind in sorted({acts.get(name) for name in firsts}, key=str):
            names = [name for name in firsts if acts.get(name) == kind]
            h = gather(names[0], lambda x: half.normed(x, weights))
            for name in names:
                decide(name, h)
        if half.last in coded:
            linears = Linears(weights, acts)
            decide(
                half.last,
                gather(half.last, lambda x: half.inner(half.normed(x, weights), linears)),
            )
        advance(half, store, Linears(weights, acts))
        return result


def advance(half: Half, store: RowStore, linears: Linears) -> None:
    """Moves all rows on to the output of a half."""
    for index in range(len(store)):
        store.put(index, half.forward(store.get(index), linears))


def tower_rows(
    checkpoint: Checkpoint, samples: Sequence[Sample], spill: Path, limit: int,
    tensors: dict[str, Tensor] | None = None,
) -> RowStore:  # fmt: skip
    """Embedded patches of every video, in order. Errors: InvalidArgument."""
    model = checkpoint.model
    if model.vision is None:
        raise InvalidArgument("the samples have frames, and the model sees no pictures")
    tensors = tensors or visual.side_tensors(checkpoint)
    grid = model.vision.image_size // model.vision.patch
    videos = [video for sample in samples for video in sample.videos]
    shapes = [(len(video), grid * grid, model.vision.hidden) for video in videos]
    store = RowStore(shapes, spill, limit)
    for index, video in enumerate(videos):
        store.put(index, visual.embed_patches(torch.from_numpy(video), model, tensors))
    return store


def projected(
    checkpoint: Checkpoint, samples: Sequence[Sample], store: RowStore,
    tensors: dict[str, Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    """Rows of every video, from the output of the tower's layers."""
    model = checkpoint.model
    assert model.visual is not None
    tensors = tensors or visual.side_tensors(checkpoint)
    return [
        visual.video_rows(visual.project(store.get(n), model, tensors), model.visual, tensors)
        for n in range(len(store))
    ]


def prompt_rows(
    checkpoint: Checkpoint, samples: Sequence[Sample], videos: Sequence[Tensor], spill: Path,
    limit: int, embed: Callable[[Any], Tensor] | None = None, media_weight: float = 1.0,
) -> RowStore:  # fmt: skip
    """Input rows of every sample; `videos` are the rows of all videos in order, and count
    `media_weight` each beside 1 for a row of text. `embed` gives the rows of ids (default: the
    checkpoint's embedding). Errors: those of the lookup."""
    decoder = checkpoint.model.decoder
    if any(sample.videos for sample in samples) and checkpoint.model.vision is None:
        raise InvalidArgument("the samples have frames, and the model sees no pictures")
    lookup = embed or checkpoint.lookup
    # One lookup for all samples: every piece of the embedding is read once.
    runs = [part for sample in samples for part in sample.parts if part.ndim == 1]
    rows = lookup(np.concatenate(runs)) * decoder.embedding_scale
    texts = iter(torch.split(rows, [len(run) for run in runs]))
    media = iter(videos)
    joined = [
        [next(media) if part.ndim == 4 else next(texts) for part in sample.parts]
        for sample in samples
    ]
    lengths = [sum(len(piece) for piece in pieces) for pieces in joined]
    weights = None
    if media_weight != 1 and any(sample.videos for sample in samples):
        weights = [
            torch.cat(
                [
                    torch.full((len(piece),), media_weight if part.ndim == 4 else 1.0)
                    for part, piece in zip(sample.parts, pieces, strict=True)
                ]
            )
            for sample, pieces in zip(samples, joined, strict=True)
        ]
    store = RowStore([(1, length, decoder.hidden) for length in lengths], spill, limit, weights)
    for index, pieces in enumerate(joined):
        store.put(index, torch.cat(pieces)[None])
    return store
