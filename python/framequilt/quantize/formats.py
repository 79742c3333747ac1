"""Number formats of weights, their names, and which linear of a model gets which.

A format name is `f32`, `bf16`, or `w<bits><group>` with bits 4 or 8 and group `g32`, `g64`, `g128`
or
`row` (one group per output row); nothing means `g128`. Suffixes: `-sym` (symmetric codes) and
`-f32scale` (float32 instead of float16 scales). So `w4` = `w4g128`, `w8row-sym` is the classic
per-channel int8.

A scheme is what a conversion is asked for: one format name. The decoder's linears get exactly it.
With a 4-bit scheme the embedding, the head and everything visual keep 8 bits with the same group:
they are a small part of the work of a large model, and the first to lose quality. `overrides` of
`parse_scheme` change any slot.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from framequilt.errors import CorruptModel, InvalidArgument

TILE_ROWS = 8  # output rows interleaved in one tile
ROW_PADDING = 16  # output rows are padded to a multiple of this
INPUT_PADDING = 32  # codes are padded to a multiple of this along the input

GROUPS = (0, 32, 64, 128)
_NAME = re.compile(r"w([48])(row|g32|g64|g128)?(-sym)?(-f32scale)?")
_NAMES = "f32, bf16, w8 or w4, then g32, g64, g128 or row, then -sym, -f32scale (such as w4g128)"

DType = Literal["F32", "F16", "BF16", "U8"]
DTYPE_BYTES: dict[str, int] = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype and shape of one stored tensor."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the data in bytes."""
        total = DTYPE_BYTES[self.dtype]
        for extent in self.shape:
            total *= extent
        return total


@dataclass(frozen=True)
class WeightFormat:
    """Number format of one linear's weights; `group` 0 is one group per output row.

    `bits`, `group`, `symmetric` and `scale` mean something for kind "affine" only.
    """

    kind: Literal["f32", "bf16", "affine"]
    bits: int = 0
    group: int = 0
    symmetric: bool = False
    scale: Literal["f16", "f32"] = "f16"

    @property
    def name(self) -> str:
        """Canonical name, which `parse_format` reads back."""
        if self.kind != "affine":
            return self.kind
        text = f"w{self.bits}" + (f"g{self.group}" if self.group else "row")
        return (
            text + ("-sym" if self.symmetric else "") + ("-f32scale" if self.scale == "f32" else "")
        )

    def groups(self, inputs: int) -> int:
        """Groups of one output row; the last is shorter when the group does not divide."""
        return -(-inputs // self.group) if self.group else 1

    def to_json(self) -> dict[str, Any]:
        """The value of `format` in config.json."""
        if self.kind != "affine":
            return {"kind": self.kind}
        return {
            "kind": "affine",
            "bits": self.bits,
            "group": self.group,
            "symmetric": self.symmetric,
            "scale": self.scale,
        }

    @classmethod
    def from_json(cls, value: Any, where: str) -> WeightFormat:
        """Reads what `to_json` writes. Errors: CorruptModel, which names `where`."""
        known = [cls("f32"), cls("bf16")] + [
            cls("affine", bits, group, symmetric, scale)
            for bits in (4, 8)
            for group in GROUPS
            for symmetric in (False, True)
            for scale in ("f16", "f32")
        ]
        for candidate in known:
            if candidate.to_json() == value:
                return candidate
        raise CorruptModel(f"{where}: {value!r} is no weight format")

    def tensors(self, slot: str, out: int, inputs: int) -> list[TensorInfo]:
        """The tensors that hold `slot`'s weight [out, inputs]: the blocks first."""
        tiles = round_up(out, ROW_PADDING) // TILE_ROWS
        if self.kind == "f32":
            return [TensorInfo(f"{slot}.weight", "F32", (tiles, inputs, TILE_ROWS))]
        if self.kind == "bf16":
            shape = (tiles, -(-inputs // 2), TILE_ROWS, 2)
            return [TensorInfo(f"{slot}.weight", "BF16", shape)]
        per_block = 32 // self.bits
        blocks = round_up(inputs, INPUT_PADDING) // per_block
        table = (tiles, self.groups(inputs), TILE_ROWS)
        result = [
            TensorInfo(f"{slot}.codes", "U8", (tiles, blocks, TILE_ROWS, 4)),
            TensorInfo(f"{slot}.scales", "F16" if self.scale == "f16" else "F32", table),
        ]
        if not self.symmetric:
            result.append(TensorInfo(f"{slot}.zeros", "U8", table))
        return result

    def stored_bytes(self, out: int, inputs: int) -> int:
        """Bytes of all tensors of a weight [out, inputs], padding included."""
        return sum(tensor.bytes for tensor in self.tensors("", out, inputs))


def parse_format(text: str) -> WeightFormat:
    """A format from its name. Errors: InvalidArgument, which lists what there is."""
    if text in ("f32", "bf16"):
        return WeightFormat("f32" if text == "f32" else "bf16")
    match = _NAME.fullmatch(text)
    if match is None:
        raise InvalidArgument(f"{text!r} is no weight format", f"known: {_NAMES}")
    group = {"row": 0, None: 128}.get(match[2])
    return WeightFormat(
        "affine",
        bits=int(match[1]),
        group=int(match[2][1:]) if group is None else group,
        symmetric=match[3] is not None,
        scale="f32" if match[4] else "f16",
    )


@dataclass(frozen=True)
class Scheme:
    """Formats of a whole model."""

    name: str
    decoder: WeightFormat
    tables: WeightFormat  # embedding and head
    visual: WeightFormat  # tower and projector
    overrides: tuple[tuple[str, WeightFormat], ...] = ()

    def format_of(self, slot: str) -> WeightFormat:
        """The format of one linear. The last override whose pattern matches wins."""
        for pattern, chosen in reversed(self.overrides):
            if fnmatchcase(slot, pattern):
                return chosen
        if slot in ("decoder.embedding", "decoder.head"):
            return self.tables
        return self.decoder if slot.startswith("decoder.") else self.visual


def parse_scheme(text: str, overrides: Mapping[str, str] | None = None) -> Scheme:
    """A scheme from a format name; `overrides` maps slot patterns ("vision.*") to format names.

    Errors: InvalidArgument.
    """
    main = parse_format(text)
    side = replace(main, bits=8) if main.kind == "affine" else main
    chosen = tuple((pattern, parse_format(name)) for pattern, name in (overrides or {}).items())
    return Scheme(main.name, decoder=main, tables=side, visual=side, overrides=chosen)
