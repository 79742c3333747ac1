"""How the next token is chosen: the parameters of a request, checked before they are sent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from framequilt.errors import InvalidArgument

_FLOAT32_MAX = 3.4028234663852886e38


def _fail(name: str, value: object, want: str) -> InvalidArgument:
    return InvalidArgument(f"{name} must be {want}, got {value!r}")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _fail(name, value, f"an integer from {low} to {high}")


def _number(name: str, value: object, low: float, high: float, want: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _fail(name, value, want)
    if not math.isfinite(value) or not low <= value <= high:
        raise _fail(name, value, want)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Filters apply in this order: logit bias, repetition, presence and frequency penalties,
    temperature, top-k, top-p, min-p. Temperature 0 is greedy (the lowest id wins ties).

    Attributes:
        max_tokens: generate at most this many tokens; the model's context is a limit too.
        temperature: >= 0; 0 is greedy.
        top_k: keep the k most likely tokens; 0 is off.
        top_p: keep the most likely tokens up to this probability, (0, 1]; 1 is off.
        min_p: drop tokens below this share of the best one's probability, [0, 1]; 0 is off.
        repetition_penalty: > 0; divides positive and multiplies negative logits of seen tokens.
        presence_penalty: subtracted once from the logits of generated tokens.
        frequency_penalty: subtracted per occurrence.
        seed: of the request's own random stream, 0 to 2^64 - 1.
        ignore_eos: go on after the model's end-of-sequence tokens.
        min_tokens: end-of-sequence and stop tokens are masked before this many tokens.
        stop: strings that end the answer; the match and what follows it are not in the text.
        stop_tokens: token ids that end the answer, beside the model's own.
        logit_bias: token id -> number added to its logit; -inf is not allowed, use -1e30.
        top_logprobs: None for no log-probabilities, 0 for the chosen token's, n for the n best
            as well (natural logarithm).
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    ignore_eos: bool = False
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _number("temperature", self.temperature, 0.0, 1e6, "a number >= 0")
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0, "in (0, 1]")
        if self.top_p <= 0:
            raise _fail("top_p", self.top_p, "in (0, 1]")
        _number("min_p", self.min_p, 0.0, 1.0, "in [0, 1]")
        _number("repetition_penalty", self.repetition_penalty, 1e-6, 1e6, "a number > 0")
        for name in ("presence_penalty", "frequency_penalty"):
            _number(name, getattr(self, name), -1e6, 1e6, "a finite number")
        _integer("seed", self.seed, 0, 2**64 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.min_tokens > self.max_tokens:
            raise InvalidArgument(
                f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}"
            )
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise _fail("stop", stop, "a non-empty string or a list of them")
        object.__setattr__(self, "stop", tuple(stops))
        for token in self.stop_tokens:
            _integer("stop_tokens", token, 0, 2**31 - 1)
        object.__setattr__(self, "stop_tokens", tuple(self.stop_tokens))
        for token, bias in self.logit_bias.items():
            _integer("logit_bias token", token, 0, 2**31 - 1)
            _number("logit_bias", bias, -_FLOAT32_MAX, _FLOAT32_MAX, "a finite float32")
        if self.top_logprobs is not None:
            _integer("top_logprobs", self.top_logprobs, 0, 1000)

    @classmethod
    def of(cls, value: Sampling | Mapping[str, Any] | None) -> Sampling:
        """A `Sampling`, a mapping of its fields, or None for the defaults."""
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise InvalidArgument(f"sampling is a Sampling or a dict of its fields, got {value!r}")
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(value) - known)
        if unknown:
            raise InvalidArgument(
                f"unknown sampling fields: {', '.join(unknown)}",
                hint=f"known: {', '.join(sorted(known))}",
            )
        return cls(**value)

    def to_native(self) -> dict[str, Any]:
        """The dictionary that the compiled engine takes."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        record["stop_strings"] = list(record.pop("stop"))
        record["stop_tokens"] = list(self.stop_tokens)
        record["logit_bias"] = [(int(t), float(b)) for t, b in self.logit_bias.items()]
        record["top_logprobs"] = -1 if self.top_logprobs is None else self.top_logprobs
        return record
