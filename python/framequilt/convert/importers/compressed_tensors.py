"""Checkpoints in the compressed-tensors format: integer weights, packed or not.

A linear [out, in] is stored as `weight_packed` I32 [out, words], a stream of codes in each row, and
`weight_shape`; or as `weight` I8 [out, in]. Codes are signed, packed ones with 2^(bits-1) added.
`weight_scale` is [out, groups], [out, 1] or [1]; `weight_zero_point` I8 likewise, or packed along
the outputs, I32 [words, groups].
w = (code - zero) * scale. Quantized inputs (dynamic, per token) are recorded for the linear.
Source: the format as published with the compressed-tensors package.

Memory: the checkpoint stays mapped. One thread.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from framequilt.convert.importers.common import (
    FLOATS,
    Coded,
    Imported,
    ScatteredTensor,
    Settings,
    Tables,
    TableTensor,
    expect_shape,
    group_owners,
    group_size,
    groups_of,
    modules,
    plain_tensors,
    scattered_note,
    stored,
    unpack_stream,
)
from framequilt.convert.sources import MappedTensor, Source, SourceTensor
from framequilt.errors import CorruptModel, Unsupported
from framequilt.quantize import ActivationFormat

Words = NDArray[np.generic]
_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision", "dense")
_ORIGINAL = "convert the original checkpoint"
_PARTS = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx")
_RUNTIME = (
    "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
    "k_scale", "v_scale", "k_zero_point", "v_zero_point", "q_scale",
)  # fmt: skip


@dataclass(frozen=True)
class _Group:
    """One entry of config_groups."""

    targets: tuple[str, ...]
    bits: int
    group: int  # inputs, 0: the whole row
    activations: ActivationFormat | None

    def names(self, module: str) -> bool:
        """Whether a target is this very module, or a pattern of its name."""
        return any(
            re.match(target[3:], module) is not None
            if target.startswith("re:")
            else module == target or module.endswith("." + target)
            for target in self.targets
        )

    def is_kind(self, module: str) -> bool:
        """Whether a target is the module's class."""
        kind = "Embedding" if "embed" in module.rsplit(".", 1)[-1] else "Linear"
        return kind in self.targets


def unpack_rows(words: MappedTensor, data: Words, bits: int, count: int) -> NDArray[np.uint8]:
    """Words [rows, n] of `words` -> codes [rows, count].

    Codes are a stream without gaps. For widths that do not divide 32, older writers put whole codes
    only in each word; the number of words tells which it is. Errors: CorruptModel.
    """
    if data.shape[1] == -(-count * bits // 32):
        return unpack_stream(data, bits, count)
    per_word = 32 // bits
    if data.shape[1] != -(-count // per_word):
        raise CorruptModel(
            f"{words.name} has shape {list(words.shape)}, which is not that of {count} codes of "
            f"{bits} bits"
        )
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    packed = np.ascontiguousarray(data).view(np.uint32)
    codes = (packed[..., None] >> shifts) & np.uint32(2**bits - 1)
    return codes.reshape(len(packed), -1)[:, :count].astype(np.uint8)


def _linear(source: Source, module: str, group: _Group) -> Coded:
    """Errors: CorruptModel for tensors that do not fit together."""
    bits = group.bits
    half = 2 ** (bits - 1)
    name = f"{module}.weight"
    if f"{module}.weight_packed" in source.tensors:
        words = stored(source, f"{module}.weight_packed", ("I32",), 2)
        sizes = stored(source, f"{module}.weight_shape", ("I64", "I32"), 1)
        expect_shape(sizes, 2)
        out, inputs = (int(size) for size in sizes.data)
        if words.shape[0] != out or not 1 <= inputs <= 2**24:
            raise CorruptModel(f"{words.name} has shape {list(words.shape)} for {[out, inputs]}")
        unpack_rows(words, words.data[:1], bits, inputs)  # complains before anything is written

        def codes(start: int, stop: int) -> NDArray[np.uint8]:
            return unpack_rows(words, words.data[start:stop], bits, inputs)
    else:
        words = stored(source, name, ("I8",), 2)
        out, inputs = words.shape

        def codes(start: int, stop: int) -> NDArray[np.uint8]:
            signed: NDArray[np.int16] = words.data[start:stop].astype(np.int16) + np.int16(half)
            if signed.min(initial=0) < 0 or signed.max(initial=0) >= 2 * half:
                raise CorruptModel(f"{name} has codes of more than {bits} bits")
            return signed.astype(np.uint8)

    scales = stored(source, f"{module}.weight_scale", FLOATS)
    groups = -(-inputs // group.group) if group.group else 1
    point: MappedTensor | None = None
    size = words.bytes + scales.bytes
    if f"{module}.weight_zero_point" in source.tensors:
        point = stored(source, f"{module}.weight_zero_point", ("I8", "I32"))
        size += point.bytes

    def tables() -> Tables:
        zeros = np.full((out, groups), half, np.uint8)
        if point is not None:
            zeros = _zero_points(point, out, groups, bits)
        return _table(scales.all(), scales.name, out, groups), zeros

    return Coded(name, "compressed-tensors", size, out, inputs, bits, group.group, tables, codes)


T = TypeVar("T", bound=np.generic)


def _table(values: NDArray[T], name: str, out: int, groups: int) -> NDArray[T]:
    """Parameters [out, groups] from [out, groups], and with one group from [out] or [1] too."""
    if groups == 1 and values.size == 1:
        return np.full((out, 1), values.reshape(-1)[0])
    if groups == 1 and values.shape == (out,):
        return values[:, None]
    if values.shape != (out, groups):
        raise CorruptModel(f"{name} has shape {list(values.shape)}, expected {[out, groups]}")
    return values


def _zero_points(point: MappedTensor, out: int, groups: int, bits: int) -> NDArray[np.uint8]:
    """Unsigned zeros [out, groups]."""
    half = 2 ** (bits - 1)
    if point.dtype == "I32":
        if len(point.shape) != 2 or point.shape[1] != groups:
            raise CorruptModel(f"{point.name} has shape {list(point.shape)} for {groups} groups")
        return np.ascontiguousarray(unpack_rows(point, point.data.T, bits, out).T)
    signed = _table(np.asarray(point.data, np.int16), point.name, out, groups)
    if signed.min(initial=0) < -half or signed.max(initial=0) >= half:
        raise CorruptModel(f"{point.name} has zeros of more than {bits} bits")
    return (signed + np.int16(half)).astype(np.uint8)


def read(source: Source, settings: Settings) -> Imported:
    """All linears of a compressed-tensors checkpoint. Errors: CorruptModel, Unsupported."""
    settings.choice("format", _FORMATS, "dense", _ORIGINAL)
    settings.choice("quantization_status", ("compressed", "frozen"), "compressed", _ORIGINAL)
    for key in ("sparsity_config", "transform_config"):
        part = Settings(settings.get(key, dict, {}), f"{settings.where}: {key}")
        if key == "sparsity_config":
            part.choice("format", ("dense",), "dense", _ORIGINAL)
        elif part.values.get("config_groups"):
            raise Unsupported(f"{part.where}: rotations at run time are not supported", _ORIGINAL)
    groups = _groups(settings)
    packed, plain = modules(source, "weight_packed"), modules(source, "weight_scale")
    names = list(dict.fromkeys(packed + plain))
    if not names:
        raise CorruptModel(f"{source.path.name} has no weight_scale tensors, but is quantized")
    used = [f"{name}.{part}" for name in names for part in (*_PARTS, "weight")]
    unused = [name for name in source.tensors if name.rsplit(".", 1)[-1] in _RUNTIME]
    tensors: dict[str, SourceTensor] = plain_tensors(source, [*used, *unused])
    scattered: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for name in names:
        group = _group_of(groups, name, settings.where)
        coded = _linear(source, name, group)
        owner = group_owners(source, f"{name}.weight_g_idx", coded.inputs, group.group)
        if owner is None:
            tensors[coded.name] = TableTensor(coded, group.activations)
        else:
            tensors[coded.name] = ScatteredTensor(coded, owner)
            scattered[name.rsplit(".", 1)[-1]] += 1
        inputs = f", {group.activations.name} inputs" if group.activations else ""
        kinds[f"{group.bits} bits in {groups_of(group.group)}{inputs}"] += 1
    notes = [scattered_note(scattered)] if scattered else []
    if unused:
        notes.append(
            f"{len(unused)} scales of activations and KV caches are not used, such as "
            f"{unused[0]}: the engine takes its own from each row"
        )
    return Imported(tensors, "compressed-tensors, " + " and ".join(sorted(kinds)), notes)


def _groups(settings: Settings) -> list[_Group]:
    found = settings.get("config_groups", dict)
    result = []
    for key, value in found.items():
        where = f"{settings.where}: config_groups.{key}"
        if not isinstance(value, dict):
            raise CorruptModel(f"{where} is no object")
        entry = Settings(value, where)
        entry.choice("format", _FORMATS, "dense", _ORIGINAL)
        targets = entry.get("targets", list, ["Linear"])
        for target in targets:
            if not isinstance(target, str):
                raise CorruptModel(f"{where}: targets has {target!r}"[:200])
            try:
                re.compile(target.removeprefix("re:"))
            except re.error as error:
                raise CorruptModel(f"{where}: {target!r} is no pattern"[:200]) from error
        weights = Settings(entry.get("weights", dict), f"{where}.weights")
        weights.choice("type", ("int",), "int", _ORIGINAL)
        weights.choice("dynamic", (False,), False)
        bits = weights.choice("num_bits", range(2, 9), 8)
        strategy = weights.choice("strategy", ("tensor", "channel", "group"), "tensor", _ORIGINAL)
        group = group_size(weights) if strategy == "group" else 0
        result.append(_Group(tuple(targets), bits, group, _activations(entry, where)))
    return result


def _activations(entry: Settings, where: str) -> ActivationFormat | None:
    """How inputs are quantized; static scales become dynamic ones, which are finer."""
    if entry.values.get("input_activations") is None:
        return None
    inputs = Settings(entry.get("input_activations", dict), f"{where}.input_activations")
    inputs.choice("type", ("int",), "int", _ORIGINAL)
    bits = inputs.choice("num_bits", (4, 6, 8), 8)
    inputs.choice("strategy", ("tensor", "token"), "tensor", _ORIGINAL)
    return ActivationFormat(bits, inputs.get("symmetric", bool, True))


def _group_of(groups: list[_Group], module: str, where: str) -> _Group:
    """The settings of a module: by its name first, then by its class. Errors: CorruptModel."""
    for test in (_Group.names, _Group.is_kind):
        for group in groups:
            if test(group, module):
                return group
    raise CorruptModel(f"{where}: no target of config_groups means {module}")
