"""The methods as the converter takes them: `convert(..., method=Calibration("awq", ...))`.

Memory and threads: those of `runner.calibrate`.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from framequilt.convert.plan import Plan
from framequilt.convert.sources import SourceTensor
from framequilt.errors import InvalidArgument
from framequilt.quantize.calibration.checkpoint import Checkpoint
from framequilt.quantize.calibration.samples import Sample, TextCodec
from framequilt.quantize.methods.result import MethodResult
from framequilt.quantize.methods.runner import METHODS, Options, Step, calibrate
from framequilt.quantize.rtn import Range
from framequilt.quantize.schemes import parse_activation_scheme


class Calibration:
    """A method of this package, as a `framequilt.convert.plan.Method`.

    `samples` are made when the checkpoint is known, from it and its tokenizer. `work` keeps what is
    finished, so that an interrupted conversion goes on; without it a temporary folder is used, and
    lives as long as this object. `range_` has to be the converter's. `result` is there afterwards.
    """

    def __init__(
        self,
        method: str,
        samples: Callable[[Checkpoint, TextCodec], Sequence[Sample]],
        *,
        work: str | os.PathLike[str] | None = None,
        range_: Range = "include_zero",
        options: Options | None = None,
        progress: Callable[[Step], None] | None = None,
    ) -> None:
        """Errors: InvalidArgument for an unknown method."""
        if method not in METHODS:
            raise InvalidArgument(f"unknown method {method!r}", f"known: {', '.join(METHODS)}")
        self._method, self._samples = method, samples
        self._range: Range = range_
        self._options, self._progress = options or Options(), progress
        self._temporary = tempfile.TemporaryDirectory() if work is None else None
        self._work = Path(self._temporary.name if self._temporary else work or "")
        self.notes: list[str] = []
        self.checkpoint: Checkpoint | None = None
        self.result: MethodResult | None = None

    @property
    def name(self) -> str:
        """The method with the settings that it reads."""
        options = self._options
        return {
            "rtn": "rtn",
            "awq": f"awq ({options.ratio_steps} ratios)",
            "smoothquant": f"smoothquant (alpha {options.alpha})",
            "gptq": f"gptq ({'act-order, ' if options.act_order else ''}"
            f"damping {options.damping:g})",
        }[self._method]

    def transform(self, plan: Plan, check: Callable[[], None]) -> Mapping[str, SourceTensor]:
        """Runs the method. Errors: those of `calibrate`; InvalidArgument for kept codes."""
        if plan.scheme.keep:
            raise InvalidArgument(
                f"{self._method} makes new codes, and the checkpoint's own are to be kept",
                "choose a weight format, such as w4g128",
            )
        checkpoint = Checkpoint(plan.source, plan.description, plan.wanted, plan.found)
        samples = self._samples(
            checkpoint, TextCodec(checkpoint, self._work / "tokenizer", plan.tokens)
        )

        def step(found: Step) -> None:
            check()
            if self._progress is not None:
                self._progress(found)

        check()
        result = calibrate(
            checkpoint, samples, method=self._method, weights=plan.scheme,
            activations=plan.activations or parse_activation_scheme("a16"), work=self._work,
            range_=self._range, options=self._options, progress=step,
        )  # fmt: skip
        self.checkpoint, self.result = checkpoint, result
        self.notes = [summary(result, len(samples))]
        return result.tensors(plan.found)


def error_ratios_of(figures: object) -> list[float]:
    """Squared output error over that of plain rounding, wherever a report has both."""
    ratios: list[float] = []
    if isinstance(figures, dict):
        if figures.get("rtn_error"):
            ratios.append(figures["error"] / figures["rtn_error"])
        for value in figures.values():
            ratios += error_ratios_of(value)
    return ratios


def summary(result: MethodResult, samples: int) -> str:
    """One line on what a method gained on its calibration samples."""
    ratios = [ratio for layer in result.reports() for ratio in error_ratios_of(layer)]
    if not ratios:
        return f"{result.method}: nothing was rounded"
    return (
        f"{result.method} on {samples} samples: squared output error "
        f"{statistics.median(ratios):.2f} of plain rounding's (median), "
        f"{min(ratios):.2f} to {max(ratios):.2f}"
    )
