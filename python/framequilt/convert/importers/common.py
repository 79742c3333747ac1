"""What the importers of Hugging Face checkpoints share: settings, packed words, groups of tensors.

Memory: mapped files stay mapped; scales and zeros are in memory for one linear at a time. One
thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from framequilt.convert.coded import CodedTensor, fits_float16, repeat_groups, stored_group
from framequilt.convert.sources import MappedTensor, Source, SourceTensor
from framequilt.errors import CorruptModel, Unsupported
from framequilt.quantize import ActivationFormat, Quantized, WeightFormat
from framequilt.quantize.formats import BITS

FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Imported:
    """What an importer makes of a checkpoint."""

    tensors: Mapping[str, SourceTensor]
    summary: str  # "awq, 4 bits in groups of 128"
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """A part of quantization_config, read with checks."""

    values: Mapping[str, Any]
    where: str

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of a type; null counts as missing. Errors: CorruptModel."""
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CorruptModel(f"{self.where}: {key} is missing")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CorruptModel(f"{self.where}: {key} is {value!r}"[:200])
        return value

    def choice(self, key: str, known: Iterable[Any], default: Any = None, hint: str = "") -> Any:
        """One of the values that can be read. Errors: Unsupported, which lists them."""
        value = self.values.get(key)
        if value is None:
            value = default
        listed = list(known)
        if not any(type(value) is type(entry) and value == entry for entry in listed):
            names = ", ".join(str(entry) for entry in listed)
            raise Unsupported(
                f"{self.where}: {key} is {value!r}"[:200],
                f"known: {names}" + (hint and f"; {hint}"),
            )
        return value


def modules(source: Source, suffix: str) -> list[str]:
    """Names of the modules that have a tensor of this last name."""
    ending = "." + suffix
    return [name.removesuffix(ending) for name in source.tensors if name.endswith(ending)]


def stored(
    source: Source, name: str, kinds: tuple[str, ...], dimensions: int | None = None
) -> MappedTensor:
    """A stored tensor of one of some types. Errors: CorruptModel."""
    tensor = source.tensors.get(name)
    if not isinstance(tensor, MappedTensor):
        raise CorruptModel(f"{source.path.name}: {name} is missing", "the checkpoint is incomplete")
    if tensor.dtype not in kinds:
        raise CorruptModel(f"{name} is stored as {tensor.dtype}, not {' or '.join(kinds)}")
    if dimensions is not None and len(tensor.shape) != dimensions:
        raise CorruptModel(f"{name} has shape {list(tensor.shape)}, not {dimensions} dimensions")
    return tensor


def expect_shape(tensor: SourceTensor, *shape: int) -> None:
    """Errors: CorruptModel."""
    if tuple(tensor.shape) != shape:
        raise CorruptModel(f"{tensor.name} has shape {list(tensor.shape)}, expected {list(shape)}")


def unpack_stream(words: NDArray[np.generic], bits: int, count: int) -> NDArray[np.uint8]:
    """32-bit words [rows, n] -> the first `count` values [rows, count] of a stream of `bits` each.

    The least bits of a word come first; a value may begin in one word and end in the next.
    """
    stream = np.ascontiguousarray(words).view(np.uint32)
    at = np.arange(count, dtype=np.int64) * bits
    first, shift = at // 32, (at % 32).astype(np.uint32)
    values = stream[:, first] >> shift
    over = shift + np.uint32(bits) > 32
    if over.any():
        rest = stream[:, first[over] + 1] << (np.uint32(32) - shift[over])
        values[:, over] |= rest
    return (values & np.uint32(2**bits - 1)).astype(np.uint8)


Tables = tuple[NDArray[np.float32], NDArray[np.uint8]]


@dataclass(frozen=True)
class Coded:
    """A linear [out, in] as an importer finds it.

    `tables()` reads scales and zeros, both [out, groups]; `codes(start, stop)` unsigned codes
    [stop - start, in] of `bits` bits. w = (code - zero) * scale.
    """

    name: str
    kind: str  # what reports call it
    bytes: int  # in the checkpoint
    out: int
    inputs: int
    bits: int
    group: int  # consecutive inputs, 0: the whole row
    tables: Callable[[], Tables]
    codes: Callable[[int, int], NDArray[np.uint8]]


class _HeldTables:
    """Scales and zeros of a linear, in memory from its first row to its last only."""

    def __init__(self, coded: Coded) -> None:
        self._coded = coded
        self._held: Tables | None = None

    def rows(self, start: int, stop: int) -> Tables:
        """Scales and zeros [stop - start, groups]."""
        scales, zeros = self._held = self._held or self._coded.tables()
        if stop >= self._coded.out:
            self._held = None
        return scales[start:stop], zeros[start:stop]


class TableTensor(CodedTensor):
    """A `Coded` linear in the format of ours that holds it exactly.

    Symmetric codes of a width that we lack are moved to the middle of the next larger one.
    """

    def __init__(self, coded: Coded, activations: ActivationFormat | None = None) -> None:
        """Errors: CorruptModel for scales that are not finite; Unsupported where there is no such
        format."""
        self.name, self.dtype, self.bytes = coded.name, coded.kind, coded.bytes
        self.shape = (coded.out, coded.inputs)
        self.activations = activations
        width = min((ours for ours in BITS if ours >= coded.bits), default=None)
        group = stored_group(coded.group, coded.inputs)
        if width is None or group is None:
            raise Unsupported(
                f"{coded.name}: no format of ours has {coded.bits} bits in groups of {coded.group}",
                "convert the original checkpoint",
            )
        scales, zeros = coded.tables()
        _check_finite(scales, coded.name)
        symmetric = bool((zeros == 2 ** (coded.bits - 1)).all())
        shift = 2 ** (width - 1) - 2 ** (coded.bits - 1) if symmetric else 0
        scale: Literal["f16", "f32"] = "f16" if fits_float16(scales) else "f32"
        self.form = WeightFormat("affine", width, group, symmetric, scale)
        self._coded, self._tables, self._shift = coded, _HeldTables(coded), np.uint8(shift)

    def coded_rows(self, start: int, stop: int) -> Quantized:
        coded, form = self._coded, self.form
        scales, zeros = self._tables.rows(start, stop)
        return Quantized(
            coded.codes(start, stop) + self._shift,
            repeat_groups(scales, coded.group, form.group, coded.inputs),
            repeat_groups(zeros, coded.group, form.group, coded.inputs) + self._shift,
            form.bits,
            form.group,
        )


def _check_finite(scales: NDArray[np.float32], name: str) -> None:
    if not np.isfinite(scales).all():
        raise CorruptModel(f"{name}: a scale is not a finite number")


class ScatteredTensor(SourceTensor):
    """A `Coded` linear whose groups are not neighbours, in float32.

    `owner` is the group of each input.
    """

    def __init__(self, coded: Coded, owner: NDArray[np.int64]) -> None:
        """Errors: CorruptModel for scales that are not finite."""
        self.name, self.bytes = coded.name, coded.bytes
        self.dtype = f"{coded.kind} in activation order"
        self.shape = (coded.out, coded.inputs)
        _check_finite(coded.tables()[0], coded.name)
        self._coded, self._tables, self._owner = coded, _HeldTables(coded), owner

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        scales, zeros = self._tables.rows(start, stop)
        steps = self._coded.codes(start, stop).astype(np.int16)
        steps -= zeros.astype(np.int16)[:, self._owner]
        return steps.astype(np.float32) * scales[:, self._owner]


def group_owners(source: Source, name: str, inputs: int, group: int) -> NDArray[np.int64] | None:
    """The group of each input from a stored index; None where groups are neighbours.

    Errors: CorruptModel for an index that names groups that are not there.
    """
    if name not in source.tensors:
        return None
    index = stored(source, name, ("I32", "I64"), 1)
    expect_shape(index, inputs)
    owner = np.asarray(index.data, np.int64)
    groups = -(-inputs // group) if group else 1
    if owner.min(initial=0) < 0 or owner.max(initial=0) >= groups:
        # Some writers fill the index with -1 where there is no order.
        if (owner == -1).all():
            return None
        raise CorruptModel(f"{name} names a group that is not in 0..{groups - 1}")
    return None if (owner == np.arange(inputs) // (group or inputs)).all() else owner


def scattered_note(counts: Counter[str]) -> str:
    """What a user should know about weights in activation order, counted by module."""
    listed = ", ".join(f"{count} x {what}" for what, count in sorted(counts.items()))
    return (
        f"groups in activation order do not fit our formats ({listed}): these are quantized "
        "anew, and both errors add up; a checkpoint made without desc_act keeps its codes"
    )


def group_size(settings: Settings, key: str = "group_size") -> int:
    """Inputs per group, 0 for whole rows (-1 in the config). Errors: CorruptModel."""
    value = settings.get(key, int, 128)
    if value == -1:
        return 0
    if value < 1:
        raise CorruptModel(f"{settings.where}: {key} is {value}")
    return int(value)


def groups_of(group: int) -> str:
    """In words."""
    return f"groups of {group}" if group else "one group per row"


def plain_tensors(source: Source, used: Iterable[str]) -> dict[str, SourceTensor]:
    """The tensors that are not parts of coded weights."""
    gone = set(used)
    return {name: tensor for name, tensor in source.tensors.items() if name not in gone}
