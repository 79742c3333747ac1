"""Number formats of weights and activations, and their names (engine/CONTRACT.md, 1.1 and 1.4).

A weight format is `f32`, `bf16`, or `w<bits><group>`: bits 2, 3, 4, 5, 6 or 8 and a group `g16`,
`g32`, `g64`, `g128` or `row` (one group per output row); nothing means `g128`. Suffixes: `-sym`
(symmetric codes) or `-offset` (a float offset per group instead of an integer zero), and
`-f32scale` (float32 instead of float16 scales and offsets) or `-i8scale` (int8 ones, times a
float16 step that 256 inputs of a row share; not with `row`). So `w4` = `w4g128`, `w8row-sym` is the
classic per-channel int8, and `w4g32-offset-i8scale` holds GGUF's Q4_K.

An activation format is `a16` (float32 inputs, despite its name), `abf16` (inputs rounded to
bfloat16), `a8`, `a6`, `a4` (symmetric per token), or one of these three with `-asym`.

Pure data: no memory, any thread.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from framequilt.errors import CorruptModel, InvalidArgument

TILE_ROWS = 8  # output rows interleaved in one tile
ROW_PADDING = 16  # output rows are padded to a multiple of this
INPUT_PADDING = 32  # inputs of a superblock: codes are padded to a multiple of this

ScaleType = Literal["f16", "f32", "i8"]

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (0, 16, 32, 64, 128)
SCALE_TYPES: tuple[ScaleType, ...] = ("f16", "f32", "i8")
_NAME = re.compile(r"w([234568])(row|g16|g32|g64|g128)?(-sym|-offset)?(-f32scale|-i8scale)?")
_NAMES = (
    "f32, bf16, or w2, w3, w4, w5, w6, w8, then g16, g32, g64, g128 or row, then -sym or -offset, "
    "then -f32scale or -i8scale (such as w4g128)"
)

STEP_INPUTS = 256  # of a row, share a step of int8 scales

DType = Literal["F32", "F16", "BF16", "U8", "I8"]
DTYPE_BYTES: dict[str, int] = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1}


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

    `bits`, `group`, `symmetric`, `scale` and `offset` mean something for kind "affine" only.
    """

    kind: Literal["f32", "bf16", "affine"]
    bits: int = 0
    group: int = 0
    symmetric: bool = False
    scale: ScaleType = "f16"  # type of scales and offsets; i8: factors of float16 steps
    offset: bool = False  # a float offset per group; never with symmetric

    @property
    def name(self) -> str:
        """Canonical name, which `parse_format` reads back."""
        if self.kind != "affine":
            return self.kind
        text = f"w{self.bits}" + (f"g{self.group}" if self.group else "row")
        text += "-sym" if self.symmetric else "-offset" if self.offset else ""
        return text + ("" if self.scale == "f16" else f"-{self.scale}scale")

    @property
    def table_dtype(self) -> DType:
        """Stored type of scales and offsets."""
        types: dict[ScaleType, DType] = {"f16": "F16", "f32": "F32", "i8": "I8"}
        return types[self.scale]

    @property
    def stepped(self) -> bool:
        """Whether scales and offsets are int8 factors of steps."""
        return self.kind == "affine" and self.scale == "i8"

    @property
    def neutral(self) -> int:
        """The code of rows and inputs that are padding, where the group's zero does not say it."""
        return 2 ** (self.bits - 1) if self.symmetric else 0

    def groups(self, inputs: int) -> int:
        """Groups of one output row; the last is shorter when the group does not divide."""
        return -(-inputs // self.group) if self.group else 1

    def to_json(self) -> dict[str, Any]:
        """The value of `format` in config.json."""
        if self.kind != "affine":
            return {"kind": self.kind}
        result: dict[str, Any] = {
            "kind": "affine",
            "bits": self.bits,
            "group": self.group,
            "symmetric": self.symmetric,
            "scale": self.scale,
        }
        if self.offset:
            result["offset"] = True
        return result

    @classmethod
    def from_json(cls, value: Any, where: str) -> WeightFormat:
        """Reads what `to_json` writes. Errors: CorruptModel, which names `where`."""
        if isinstance(value, dict):
            plain = {key: entry for key, entry in value.items() if key != "offset"}
            offset = value.get("offset", False)
            for candidate in _known_formats():
                same = candidate.to_json()
                same.pop("offset", None)
                # 4 == 4.0 and 1 == True: the types have to agree as well.
                types = {key: type(entry) for key, entry in plain.items()}
                if (
                    candidate.offset is offset
                    and (candidate.kind == "affine" or "offset" not in value)
                    and same == plain
                    and types == {key: type(entry) for key, entry in same.items()}
                ):
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
        blocks = -(-inputs // INPUT_PADDING) * self.bits
        table = (tiles, self.groups(inputs), TILE_ROWS)
        result = [
            TensorInfo(f"{slot}.codes", "U8", (tiles, blocks, TILE_ROWS, 4)),
            TensorInfo(f"{slot}.scales", self.table_dtype, table),
        ]
        steps = (tiles, -(-inputs // STEP_INPUTS), TILE_ROWS)
        if self.stepped:
            result.append(TensorInfo(f"{slot}.scale_steps", "F16", steps))
        if self.offset:
            result.append(TensorInfo(f"{slot}.offsets", self.table_dtype, table))
            if self.stepped:
                result.append(TensorInfo(f"{slot}.offset_steps", "F16", steps))
        elif not self.symmetric:
            result.append(TensorInfo(f"{slot}.zeros", "U8", table))
        return result

    def stored_bytes(
        self, out: int, inputs: int, activations: ActivationFormat | None = None
    ) -> int:
        """Bytes of all tensors of a weight [out, inputs] for such inputs, padding included."""
        stored = sum(tensor.bytes for tensor in self.tensors("", out, inputs))
        return stored + sum(tensor.bytes for tensor in input_tensors("", out, activations))


def input_tensors(slot: str, out: int, activations: ActivationFormat | None) -> list[TensorInfo]:
    """What is stored beside a weight for the sake of its inputs: row sums if they have zeros."""
    if activations is None or activations.symmetric:
        return []
    tiles = round_up(out, ROW_PADDING) // TILE_ROWS
    return [TensorInfo(f"{slot}.row_sums", "F32", (tiles, TILE_ROWS))]


def _known_formats() -> list[WeightFormat]:
    return [WeightFormat("f32"), WeightFormat("bf16")] + [
        WeightFormat("affine", bits, group, symmetric, scale, offset)
        for bits in BITS
        for group in GROUPS
        for symmetric, offset in ((False, False), (True, False), (False, True))
        for scale in SCALE_TYPES
        if group or scale != "i8"
    ]


def parse_format(text: str) -> WeightFormat:
    """A format from its name. Errors: InvalidArgument, which lists what there is."""
    if text in ("f32", "bf16"):
        return WeightFormat("f32" if text == "f32" else "bf16")
    match = _NAME.fullmatch(text)
    if match is None:
        raise InvalidArgument(f"{text!r} is no weight format", f"known: {_NAMES}")
    group = {"row": 0, None: 128}.get(match[2])
    scales: dict[str | None, ScaleType] = {"-f32scale": "f32", "-i8scale": "i8", None: "f16"}
    form = WeightFormat(
        "affine",
        bits=int(match[1]),
        group=int(match[2][1:]) if group is None else group,
        symmetric=match[3] == "-sym",
        scale=scales[match[4]],
        offset=match[3] == "-offset",
    )
    if form.stepped and not form.group:
        raise InvalidArgument(
            f"{text}: a group of int8 scales is part of {STEP_INPUTS} inputs",
            "a group of 16, 32, 64 or 128, or float scales",
        )
    return form


@dataclass(frozen=True)
class ActivationFormat:
    """What a linear's input rows become before the product: codes, row by row, or bfloat16.

    `bits` and `symmetric` are those of codes; with `bf16` there are none, and bits is 16.
    """

    bits: Literal[4, 6, 8, 16]
    symmetric: bool = True
    bf16: bool = False

    @property
    def name(self) -> str:
        """`abf16`, `a8`, `a6`, `a4`, `a8-asym`, `a6-asym` or `a4-asym`."""
        return "abf16" if self.bf16 else f"a{self.bits}" + ("" if self.symmetric else "-asym")

    def fits(self, weights: WeightFormat) -> bool:
        """Whether such weights take these inputs: codes need codes, float32 weights float32."""
        return weights.kind == "affine" or (self.bf16 and weights.kind == "bf16")

    def to_json(self) -> dict[str, Any]:
        """The value of `activations` in config.json."""
        return {"kind": "bf16"} if self.bf16 else {"bits": self.bits, "symmetric": self.symmetric}

    @classmethod
    def from_json(cls, value: Any, where: str) -> ActivationFormat:
        """Reads what `to_json` writes. Errors: CorruptModel, which names `where`."""
        if isinstance(value, dict):
            for form in ACTIVATIONS.values():
                if form is not None and form.to_json() == value:
                    # 8 == 8.0 and 1 == True: the types have to agree as well.
                    if all(type(value[key]) is type(e) for key, e in form.to_json().items()):
                        return form
        raise CorruptModel(f"{where}: {value!r} is no activation format")


# Name -> format; None: float32 inputs.
ACTIVATIONS: dict[str, ActivationFormat | None] = {
    "a16": None,
    "abf16": ActivationFormat(16, bf16=True),
    "a8": ActivationFormat(8),
    "a6": ActivationFormat(6),
    "a4": ActivationFormat(4),
    "a8-asym": ActivationFormat(8, symmetric=False),
    "a6-asym": ActivationFormat(6, symmetric=False),
    "a4-asym": ActivationFormat(4, symmetric=False),
}


def parse_activations(text: str) -> ActivationFormat | None:
    """An activation format from its name, None for float32. Errors: InvalidArgument."""
    if text not in ACTIVATIONS:
        raise InvalidArgument(
            f"{text!r} is no activation format", f"known: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[text]
