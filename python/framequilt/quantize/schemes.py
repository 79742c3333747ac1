"""Which linear of a model gets which number format.

    w4g128                              one format
    w4g128,lm_head=w8,layers.0.*=w8     and others for some slots
    keep,vision.*=w8                    codes of a quantized checkpoint stay as they are
    a8,layers.0.*=a16                   activations, in the same grammar
    a8,attention=a8                     and queries and keys of the vision tower's attention

The first word is for the whole model. The decoder's linears get exactly it; with a format of fewer
than 8 bits the embedding, the head and everything visual keep 8 bits with the same group: they are
a small part of the work of a large model, and the first to lose quality. Activations are quantized
in every linear with codes (rounded to bfloat16: or with bf16 weights) but the head, as in
"Evaluating Quantized Large Language Models" (arXiv 2402.18158); the head takes part where a pattern
names it, the lookup of the embedding never.
`attention` is no linear: it names the vision tower's attention, which takes a8 or stays float32.

A pattern is a slot's name with `*` and `?`; a name without them also means all that lies below it.
`lm_head` (or `head`), `embedding` and `layers.*` are short for the decoder's slots. Layers count
from the end too: `layers.-1.*` is the last. The last pattern that matches wins.

Pure data: no memory, any thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Generic, TypeVar

from framequilt.errors import InvalidArgument
from framequilt.quantize.formats import (
    ActivationFormat,
    WeightFormat,
    parse_activations,
    parse_format,
)

KEEP = "keep"
DEFAULT_WEIGHTS = "w4g128"
EMBEDDING, HEAD = "decoder.embedding", "decoder.head"
ATTENTION = "attention"  # not a slot: queries and keys of the vision tower

F = TypeVar("F")


@dataclass(frozen=True)
class Override(Generic[F]):
    """Another format for the slots that match; it has to match one if `required`."""

    pattern: str
    format: F
    required: bool = True

    def matches(self, slot: str, tied: bool = False) -> bool:
        """`tied`: the model has no head of its own, so that the embedding stands for it."""
        pattern = _spelled_out(self.pattern)
        if tied and pattern == HEAD:
            pattern = EMBEDDING
        return fnmatchcase(slot, pattern) or slot.startswith(pattern + ".")


def _spelled_out(pattern: str) -> str:
    """The pattern of slot names that a pattern with short names stands for."""
    if pattern in ("lm_head", "head"):
        return HEAD
    if pattern == "embedding":
        return EMBEDDING
    return "decoder." + pattern if re.match(r"layers\b", pattern) else pattern


def _last(overrides: Iterable[Override[F]], slot: str, tied: bool) -> Override[F] | None:
    found = None
    for entry in overrides:
        if entry.matches(slot, tied):
            found = entry
    return found


def check_patterns(
    overrides: Iterable[Override[F]], slots: Iterable[str], tied: bool = False
) -> None:
    """Errors: InvalidArgument for a pattern that matches none of the slots; it lists them."""
    names = list(slots)
    for entry in overrides:
        if entry.required and not any(entry.matches(name, tied) for name in names):
            raise InvalidArgument(
                f"no linear matches {entry.pattern!r}", f"there are: {', '.join(summary(names))}"
            )


def number_layers(
    overrides: Iterable[Override[F]], layers: Mapping[str, int]
) -> tuple[Override[F], ...]:
    """Patterns with layers counted from the start; `layers` says how many a part has."""
    result = []
    for entry in overrides:
        match = re.fullmatch(r"(?:([a-z]+)\.)?layers\.-([0-9]+)(\..*)?", entry.pattern)
        if match is not None:
            part = match[1] or "decoder"
            number = layers.get(part, 0) - int(match[2])
            if 0 <= number < layers.get(part, 0):
                entry = replace(entry, pattern=f"{part}.layers.{number}{match[3] or ''}")
        result.append(entry)
    return tuple(result)


def summary(slots: Iterable[str]) -> list[str]:
    """Slot names with the numbers of layers drawn together: decoder.layers.0-11.attention.q."""
    numbers: dict[str, list[int]] = {}
    for slot in slots:
        match = re.fullmatch(r"(.*\.layers\.)([0-9]+)(\..*)", slot)
        name = f"{match[1]}{{}}{match[3]}" if match else slot
        numbers.setdefault(name, []).extend([int(match[2])] if match else [])
    return [
        name.replace("{}", f"{min(found)}-{max(found)}" if len(found) > 1 else f"{found[0]}")
        if found
        else name
        for name, found in numbers.items()
    ]


@dataclass(frozen=True)
class Scheme:
    """Weight formats of a whole model."""

    name: str
    decoder: WeightFormat
    tables: WeightFormat  # embedding and head
    visual: WeightFormat  # tower and projector
    overrides: tuple[Override[WeightFormat], ...] = ()
    keep: bool = False  # codes of the checkpoint stay as they are where no override says otherwise

    def format_of(self, slot: str, *, tied: bool = False) -> WeightFormat:
        """The format of one linear. The last override whose pattern matches wins."""
        chosen = _last(self.overrides, slot, tied)
        if chosen is not None:
            return chosen.format
        if slot in (EMBEDDING, HEAD):
            return self.tables
        return self.decoder if slot.startswith("decoder.") else self.visual

    def keeps(self, slot: str, *, tied: bool = False) -> bool:
        """Whether codes that the checkpoint has for this slot stay as they are."""
        return self.keep and _last(self.overrides, slot, tied) is None


@dataclass(frozen=True)
class ActivationScheme:
    """Activation formats of a whole model; None is float32."""

    name: str
    linears: ActivationFormat | None  # all but embedding and head
    overrides: tuple[Override[ActivationFormat | None], ...] = ()
    attention: Override[ActivationFormat | None] | None = None  # queries and keys of the tower

    def format_of(self, slot: str, *, tied: bool = False) -> ActivationFormat | None:
        """The format of one linear's input rows."""
        chosen = _last(self.overrides, slot, tied)
        if slot == EMBEDDING:  # as a lookup it has no input rows, as a head it has to be asked for
            asked = chosen is not None and _spelled_out(chosen.pattern) in (HEAD, EMBEDDING)
            return chosen.format if tied and asked and chosen is not None else None
        if chosen is not None:
            return chosen.format
        return None if slot == HEAD else self.linears

    def asked_for(self, slot: str, *, tied: bool = False) -> bool:
        """Whether a pattern, and not the whole model's format, names this slot."""
        return _last(self.overrides, slot, tied) is not None


def _split(text: str, parse: Callable[[str], F]) -> tuple[str, tuple[Override[F], ...]]:
    """The format of the whole model ("" if there is none), and the patterns after it."""
    main, found = "", []
    for number, part in enumerate(part.strip() for part in text.split(",")):
        pattern, equals, name = (piece.strip() for piece in part.partition("="))
        if equals and pattern and name:
            found.append(Override(pattern, parse(name)))
        elif number == 0 and not equals and part:
            main = part
        else:
            raise InvalidArgument(
                f"{part!r} in {text!r} is not PATTERN=FORMAT",
                "such as w4g128,lm_head=w8,layers.0.*=w8",
            )
    return main, tuple(found)


def _name(main: str, overrides: Iterable[tuple[str, str]]) -> str:
    return ",".join([main, *(f"{pattern}={name}" for pattern, name in overrides)])


def _optional(overrides: Iterable[Override[F]]) -> tuple[Override[F], ...]:
    return tuple(replace(entry, required=False) for entry in overrides)


def parse_scheme(
    text: str, overrides: Mapping[str, str] | None = None, *, optional: bool = False
) -> Scheme:
    """A scheme from its text; `overrides` are more patterns and format names, after the text's.

    With `keep` as its first word, linears that the checkpoint holds in full precision get the side
    format of `w4g128`, which is 8 bits. `optional`: the text's patterns may match nothing. Errors:
    InvalidArgument.
    """
    main_text, listed = _split(text, parse_format)
    if optional:
        listed = _optional(listed)
    listed += tuple(
        Override(pattern, parse_format(name)) for pattern, name in (overrides or {}).items()
    )
    keep = main_text == KEEP
    main = parse_format(DEFAULT_WEIGHTS if keep or not main_text else main_text)
    side = replace(main, bits=8) if main.kind == "affine" else main
    name = _name(KEEP if keep else main.name, ((o.pattern, o.format.name) for o in listed))
    return Scheme(
        name,
        decoder=side if keep else main,
        tables=side,
        visual=side,
        overrides=listed,
        keep=keep,
    )


def parse_activation_scheme(text: str, *, optional: bool = False) -> ActivationScheme:
    """Activations of a model from their text. Errors: InvalidArgument."""
    main, listed = _split(text, parse_activations)
    if optional:
        listed = _optional(listed)
    form = parse_activations(main or "a16")
    attention = next((entry for entry in reversed(listed) if entry.pattern == ATTENTION), None)
    if attention is not None and attention.format not in (None, ActivationFormat(8)):
        raise InvalidArgument(
            f"attention takes no {attention.format.name} queries and keys", "a8, or a16 for float32"
        )
    named = ((o.pattern, o.format.name if o.format else "a16") for o in listed)
    return ActivationScheme(
        _name(main or "a16", named),
        form,
        tuple(entry for entry in listed if entry.pattern != ATTENTION),
        attention,
    )
