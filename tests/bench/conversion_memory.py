"""How much memory a conversion takes, layer by layer.

    conversion_memory.py CHECKPOINT MODEL METHOD [--weights w4g128] [--layers N] [--work DIR]

METHOD is `convert` (round to nearest, no calibration) or one of `framequilt calibrate`, which gets
random tokens in its default number (`--samples`, `--length`). A line per layer: the greatest
private memory of the process since the line before, and the greatest of mapped files with it. Only
the first has to be there: pages of mapped files are given back when others need memory. `--layers`
ends after N layers; the same command with the same `--work` goes on after them.

Needs a model only in the sense of its shapes: `models.py hf qwen2-7b DIR BF16` makes one. Memory is
read from /proc (Linux) every few milliseconds by a thread of its own. One process, no children.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from framequilt import convert as converter
from framequilt.errors import Cancelled

INTERVAL = 0.01  # seconds between two looks
PIECES = 1 << 30  # bytes of a converted model between two lines, when there are no layers
GB = 1e9


class Peaks:
    """Greatest memory of this process, in bytes, since the last `take` and since the beginning."""

    KEYS = ("RssAnon", "RssFile", "VmRSS")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = dict.fromkeys(self.KEYS, 0)
        self.all = dict.fromkeys(self.KEYS, 0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        for line in Path("/proc/self/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in self._now:
                amount = int(value.split()[0]) * 1024
                with self._lock:
                    self._now[key] = max(self._now[key], amount)
                    self.all[key] = max(self.all[key], amount)

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL):
            self._look()

    def take(self) -> dict[str, int]:
        """The peaks since the last call."""
        self._look()
        with self._lock:
            found, self._now = self._now, dict.fromkeys(self.KEYS, 0)
        return found

    def close(self) -> None:
        """Ends the thread."""
        self._ended.set()
        self._thread.join()


def _line(name: str, peaks: dict[str, int], began: float) -> None:
    print(
        f"{name:28} private {peaks['RssAnon'] / GB:7.3f} GB, with mapped files "
        f"{peaks['VmRSS'] / GB:7.3f} GB, at {time.monotonic() - began:6.0f} s",
        flush=True,
    )


def main() -> int:
    """Runs one conversion."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("method", choices=("convert", "rtn", "awq", "gptq", "smoothquant"))
    parser.add_argument("--weights", default="w4g128")
    parser.add_argument("--activations")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    began = time.monotonic()
    peaks = Peaks()
    written = 0

    def piece(step: converter.Progress) -> None:
        nonlocal written
        if step.done_bytes - written >= PIECES or step.done_bytes == step.total_bytes:
            written = step.done_bytes
            _line(f"written {written / GB:.1f} GB", peaks.take(), began)

    method = None
    with tempfile.TemporaryDirectory() as temporary:
        if given.method != "convert":
            # torch, which plain conversion does without, comes with these.
            from framequilt.quantize.calibration.checkpoint import Checkpoint
            from framequilt.quantize.calibration.samples import Sample, TextCodec
            from framequilt.quantize.methods import Calibration, Step

            def samples(checkpoint: Checkpoint, codec: TextCodec) -> list[Sample]:
                rng = np.random.default_rng(0)
                vocab = checkpoint.model.decoder.vocab
                shape = (given.samples, given.length)
                return [Sample((ids,)) for ids in rng.integers(0, vocab, shape)]

            def layer(step: Step) -> None:
                state = ", read back" if step.resumed else ""
                _line(f"{step.part}.layers.{step.layer}{state}", peaks.take(), began)
                if given.layers is not None and step.done >= given.layers:
                    raise Cancelled(f"ended after {step.done} of {step.total} layers")

            method = Calibration(
                given.method, samples, work=given.work or temporary, progress=layer
            )
        _line("imported", peaks.take(), began)
        try:
            report = converter.convert(
                given.checkpoint,
                given.model,
                weights=given.weights,
                activations=given.activations,
                method=method,
                progress=piece,
            )
            for note in report.notes:
                print(note)
        except Cancelled as ended:
            print(ended.message)
    peaks.close()
    _line("greatest", peaks.all, began)
    return 0


if __name__ == "__main__":
    sys.exit(main())
