"""Runs requests on the compiled engine directly, without the Python front end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GREEDY = {"temperature": 0.0, "ignore_eos": True}


@dataclasses.dataclass
class Answer:
    """What came out of one request. logits: [tokens, vocab]; prompt_logits: [rows, vocab]."""

    tokens: list[int]
    logits: NDArray[np.float32] | None
    prompt_logits: NDArray[np.float32] | None
    finish: str
    usage: dict[str, Any]
    error: tuple[str, str, str] | None


class NativeEngine:
    """An engine on a model directory; keyword arguments as the compiled module's."""

    def __init__(self, path: Path, **options: Any) -> None:
        from framequilt import _framequilt

        settings = {"text": False, "threads": 2, "memory_bytes": 256 << 20, **options}
        self.engine = _framequilt.Engine(_framequilt.Model.open(str(path)), **settings)

    def run(self, prompt: list[int], tokens: int = 1, **request: Any) -> Answer:
        sampling = {**GREEDY, "max_tokens": tokens, **request.pop("sampling", {})}
        stream = self.engine.submit(
            {"prompt": prompt, "sampling": sampling, "return_logits": True, **request}
        )
        events = []
        while not stream.done:
            event = stream.next(60.0)
            assert event is not None, "the engine is stuck"
            events.append(event)
        rows = [e["logits"] for e in events if e["logits"] is not None]
        last = events[-1]
        prompt_logits = last["prompt_logits"]
        if prompt_logits is not None and rows:
            prompt_logits = prompt_logits.reshape(-1, len(rows[0]))
        return Answer(
            [e["token"] for e in events if e["token"] >= 0],
            np.stack(rows) if rows else None,
            prompt_logits,
            last["finish"],
            last["usage"],
            last["error"],
        )
