"""Resumable runs: atomic checkpoints, a stop flag on SIGTERM, background batch generation."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class StopFlag:
    """Set by SIGTERM or SIGINT; a training loop saves and leaves when it sees it."""

    def __init__(self) -> None:
        self.stopped = False
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)

    def _stop(self, *_: object) -> None:
        self.stopped = True


def save_atomic(path: Path, state: dict[str, Any]) -> None:
    """torch.save through a temporary name, so that a kill never leaves half a file."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_state(path: Path) -> dict[str, Any] | None:
    """The saved state, or None when there is no checkpoint yet."""
    import torch

    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


class Log:
    """One JSON line per report, also printed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row; floats are rounded."""
        short = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        line = json.dumps(short)
        self.file.write(line + "\n")
        self.file.flush()
        print(time.strftime("%H:%M:%S"), line, flush=True)


def _produce(make: Callable[[int], Any], start: int, queue: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    step = start
    while os.getppid() == parent:
        queue.put((step, make(step)))
        step += 1


class Batches(Generic[T]):
    """Iterates over `make(start)`, `make(start + 1)`, ..., made in one background process."""

    def __init__(self, make: Callable[[int], T], start: int, depth: int = 6) -> None:
        context = mp.get_context("fork")
        self.queue: Any = context.Queue(depth)
        self.process = context.Process(target=_produce, args=(make, start, self.queue), daemon=True)
        self.process.start()

    def __iter__(self) -> Iterator[tuple[int, T]]:
        while True:
            yield self.queue.get()

    def close(self) -> None:
        """Ends the background process."""
        self.process.terminate()
        self.process.join()
        self.queue.close()
        self.queue.cancel_join_thread()
