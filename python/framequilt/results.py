"""What a request gives back: text, tokens, reasons, and what it cost. Plain immutable data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ReductionCall:
    """One call of the reduction stage; `call` 0 is before layer 0, l + 1 after attention l."""

    call: int
    rows_in: int
    rows_out: int
    visual_in: int
    merged: int
    share: float
    bound: float
    branch: str


@dataclass(frozen=True)
class ReductionReport:
    """What token reduction did; stage "none" when it was off or there was nothing to reduce."""

    stage: str = "none"
    calls: tuple[ReductionCall, ...] = ()
    median_first_similarity: float = 0.0
    mean_kept_share: float = 1.0
    budget_missed: bool = False


@dataclass(frozen=True)
class Timings:
    """Milliseconds of each part. `reduction_ms` is contained in `prefill_ms`."""

    queue_ms: float = 0.0
    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    reduction_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True)
class Usage:
    """What a request cost. Rows are counted before reduction unless said otherwise.

    `frames` are the frames and tiles of videos and images, `frames_encoded` those that went through
    the vision tower: a frame that equals the one before it has its rows.
    `kept_per_layer` counts the rows that entered attention of each layer in prefill,
    `visual_per_layer` the visual ones among them. `kv_bytes` are the KV pages held at the end,
    `kv_bytes_unreduced` what they would be with every row kept.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    visual_tokens: int = 0
    frames: int = 0
    frames_encoded: int = 0
    kept_per_layer: tuple[int, ...] = ()
    visual_per_layer: tuple[int, ...] = ()
    kv_bytes: int = 0
    kv_bytes_unreduced: int = 0
    timings: Timings = Timings()
    reduction: ReductionReport = ReductionReport()

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Usage:
        """From the dictionary of the compiled engine."""
        reduction = dict(record.get("reduction") or {})
        reduction["calls"] = tuple(ReductionCall(**c) for c in reduction.get("calls", ()))
        return cls(
            prompt_tokens=int(record["prompt_tokens"]),
            completion_tokens=int(record["completion_tokens"]),
            visual_tokens=int(record["visual_tokens"]),
            frames=int(record["frames"]),
            frames_encoded=int(record["frames_encoded"]),
            kept_per_layer=tuple(int(n) for n in record["kept_per_layer"]),
            visual_per_layer=tuple(int(n) for n in record["visual_per_layer"]),
            kv_bytes=int(record["kv_bytes"]),
            kv_bytes_unreduced=int(record["kv_bytes_unreduced"]),
            timings=Timings(**(record.get("timings") or {})),
            reduction=ReductionReport(**reduction),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log-probability, and those of the most likely ones at its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class StreamPiece:
    """One event of a stream.

    `text` is complete UTF-8 and may be empty; `token` is None in an event that only finishes;
    `finish_reason` is "" until the last piece ("stop", "length" or "cancelled"), which carries
    `usage`. If asked, `logits` is float32 [vocab] and the last piece's `prompt_logits` float32
    [prompt rows, vocab].
    """

    text: str
    token: int | None
    logprob: TokenLogprob | None = None
    logits: Logits | None = None
    finish_reason: str = ""
    usage: Usage | None = None
    prompt_logits: Logits | None = None

    @classmethod
    def of(cls, event: Mapping[str, Any], vocab: int) -> StreamPiece:
        """From the dictionary of the compiled engine, whose prompt logits are one flat array."""
        token = int(event["token"])
        prompt_logits = event.get("prompt_logits")
        if prompt_logits is not None:
            prompt_logits = np.asarray(prompt_logits).reshape(-1, vocab)
        logprob = None
        if event.get("logprob") is not None:
            chosen, value = event["logprob"]
            top = tuple((int(t), float(p)) for t, p in event.get("top_logprobs") or ())
            logprob = TokenLogprob(int(chosen), float(value), top)
        usage = event.get("usage")
        return cls(
            text=event["text"],
            token=token if token >= 0 else None,
            logprob=logprob,
            logits=event.get("logits"),
            finish_reason=event["finish"],
            usage=Usage.of(usage) if usage is not None else None,
            prompt_logits=prompt_logits,
        )


@dataclass(frozen=True)
class GenerationResult:
    """A finished answer.

    `finish_reason` is "stop", "length" or "cancelled". `logprobs` has one entry per token if
    asked, `logits` is float32 [tokens, vocab], `prompt_logits` float32 [prompt rows, vocab].
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None = None
    logits: Logits | None = None
    prompt_logits: Logits | None = None

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, without logits."""
        record: dict[str, Any] = {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "usage": self.usage.to_dict(),
        }
        if self.logprobs is not None:
            record["logprobs"] = [asdict(p) for p in self.logprobs]
        return record
