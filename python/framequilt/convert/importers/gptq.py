"""GPTQ checkpoints, versions 1 and 2.

A linear [out, in] is stored transposed: `qweight` I32 [in * bits / 32, out] is, for each output, a
stream of codes along the inputs; `qzeros` I32 [groups, out * bits / 32] a stream of zeros along the
outputs, less 1 each in version 1; `scales` [groups, out]; `g_idx` I32 [in] the group of each input.
w = (code - zero) * scale. Source: the layout as published with GPTQ (arXiv 2210.17323) and the
packages that followed it.

With activation order (`desc_act`) the inputs of a group are not neighbours, which our formats
cannot say. The inputs of a down projection may be put in another order, together with the outputs
of the gate and up projections that feed it: the model stays the same, and the codes fit. Other
linears share their inputs with the whole model: those are read in float32 and quantized anew.

Memory: the checkpoint stays mapped. One thread.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from framequilt.convert.coded import ArrayTensor
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
from framequilt.convert.sources import Source, SourceTensor
from framequilt.errors import CorruptModel, Unsupported

_BITS = (2, 3, 4, 8)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
Order = NDArray[np.int64]


class Stored:
    """The tensors of one linear, checked."""

    def __init__(self, source: Source, module: str, bits: int, group: int, version: int) -> None:
        self.name, self.bits, self.group = f"{module}.weight", bits, group
        self.words = stored(source, f"{module}.qweight", ("I32",), 2)
        lines, self.out = self.words.shape
        if lines * 32 % bits:
            raise CorruptModel(f"{self.words.name}: {lines} words are no codes of {bits} bits")
        self.inputs = lines * 32 // bits
        zeros = stored(source, f"{module}.qzeros", ("I32",), 2)
        scales = stored(source, f"{module}.scales", FLOATS, 2)
        groups = -(-self.inputs // group) if group else 1
        expect_shape(zeros, groups, -(-self.out * bits // 32))
        expect_shape(scales, groups, self.out)
        self.packed_zeros, self.scales, self.version = zeros, scales, version
        # A zero point of 0 became -1, which is also that of 2^bits: the latter is never made.
        self.wrapped = 0
        if version == 1:
            stored_zeros = unpack_stream(zeros.data, bits, self.out)
            self.wrapped = int((stored_zeros == 2**bits - 1).sum())
        self.bytes = self.words.bytes + zeros.bytes + scales.bytes
        self.owner = group_owners(source, f"{module}.g_idx", self.inputs, group)

    def sorted_inputs(self) -> Order | None:
        """An order of scattered inputs in which groups are neighbours, if there is one."""
        if self.owner is None:
            return None
        order = np.argsort(self.owner, kind="stable")
        neighbours = np.arange(self.inputs) // (self.group or self.inputs)
        return order if (self.owner[order] == neighbours).all() else None

    def coded(self, outputs: Order | None, inputs: Order | None) -> Coded:
        """The linear with outputs and inputs in another order."""

        def codes(start: int, stop: int) -> NDArray[np.uint8]:
            rows = slice(start, stop) if outputs is None else outputs[start:stop]
            columns = np.ascontiguousarray(self.words.data[:, rows].T)
            found = unpack_stream(columns, self.bits, self.inputs)
            return found if inputs is None else found[:, inputs]

        def tables() -> Tables:
            zeros = unpack_stream(self.packed_zeros.data, self.bits, self.out)
            if self.version == 1:
                zeros = (zeros + np.uint8(1)) & np.uint8(2**self.bits - 1)
            rows = slice(None) if outputs is None else outputs
            scales = self.scales.all()
            return np.ascontiguousarray(scales.T[rows]), np.ascontiguousarray(zeros.T[rows])

        return Coded(
            self.name,
            "GPTQ",
            self.bytes,
            self.out,
            self.inputs,
            self.bits,
            self.group,
            tables,
            codes,
        )


def read(source: Source, settings: Settings) -> Imported:
    """All linears of a GPTQ checkpoint. Errors: CorruptModel, Unsupported."""
    bits = settings.choice("bits", _BITS)
    group = group_size(settings)
    layout = settings.choice(
        "checkpoint_format", ("gptq", "gptq_v2"), "gptq", "convert the original checkpoint"
    )
    settings.choice("pack_dtype", ("int32",), "int32")
    _check_dynamic(settings)
    names = modules(source, "qweight")
    if not names:
        raise CorruptModel(f"{source.path.name} has no qweight tensors, but says that it is GPTQ")
    version = 2 if layout == "gptq_v2" else 1
    parts = {name: Stored(source, name, bits, group, version) for name in names}
    used = [f"{name}.{part}" for name in names for part in _PARTS]
    tensors: dict[str, SourceTensor] = plain_tensors(source, used)
    orders = _reorder(parts, tensors)
    scattered: Counter[str] = Counter()
    for name, entry in parts.items():
        outputs, inputs = orders.get(name, (None, None))
        coded = entry.coded(outputs, inputs)
        if entry.owner is not None and inputs is None:
            tensors[entry.name] = ScatteredTensor(coded, entry.owner)
            scattered[name.rsplit(".", 1)[-1]] += 1
        else:
            tensors[entry.name] = TableTensor(coded)
    notes = [scattered_note(scattered)] if scattered else []
    moved = sum(inputs is not None for _, inputs in orders.values())
    if moved:
        notes.append(
            f"inputs of {moved} down projections, and the outputs that feed them, are put in the "
            "order of their groups: same model, same codes"
        )
    wrapped = sum(entry.wrapped for entry in parts.values())
    if wrapped:
        notes.append(
            f"{wrapped} zero points are ambiguous in version 1 of the format and taken as 0"
        )
    return Imported(tensors, f"gptq, {bits} bits in {groups_of(group)}", notes)


def _check_dynamic(settings: Settings) -> None:
    """Exceptions by module may leave modules alone ("-:name"), but not give them other widths."""
    dynamic = settings.get("dynamic", dict, {})
    other = [name for name in dynamic if not str(name).startswith("-:")]
    if other:
        raise Unsupported(
            f"{settings.where}: dynamic gives {other[0]!r} settings of its own"[:200],
            "convert the original checkpoint",
        )


def _reorder(
    parts: dict[str, Stored], tensors: dict[str, SourceTensor]
) -> dict[str, tuple[Order | None, Order | None]]:
    """Orders of outputs and inputs with which the codes of down projections fit, by module.

    Biases of the gate and up projections in `tensors` are put in the same order.
    """
    orders: dict[str, tuple[Order | None, Order | None]] = {}
    for name, entry in parts.items():
        body = name.removesuffix("down_proj")
        feeders = [body + "gate_proj", body + "up_proj"]
        if body == name or any(other not in parts for other in feeders):
            continue
        order = entry.sorted_inputs()
        if order is None or any(parts[other].out != entry.inputs for other in feeders):
            continue
        orders[name] = (None, order)
        for other in feeders:
            orders[other] = (order, None)
            bias = tensors.get(f"{other}.bias")
            if bias is not None:
                expect_shape(bias, len(order))
                tensors[f"{other}.bias"] = ArrayTensor(bias.name, bias.all()[order])
    return orders
