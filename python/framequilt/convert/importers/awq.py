"""AWQ checkpoints of the "gemm" version.

A linear [out, in] is stored transposed: `qweight` I32 [in, out / 8] holds eight 4-bit codes of
neighbouring outputs in a word, output 8 * n + ORDER[k] at bits 4 * k; `qzeros` I32 [groups,
out / 8] likewise; `scales` [groups, out]. w = (code - zero) * scale. Source: the layout as
published with the AWQ release (arXiv 2306.00978) and its packing for GEMM kernels.

Memory: the checkpoint stays mapped. One thread.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from framequilt.convert.importers.common import (
    FLOATS,
    Coded,
    Imported,
    Settings,
    Tables,
    TableTensor,
    expect_shape,
    group_size,
    groups_of,
    modules,
    plain_tensors,
    stored,
)
from framequilt.convert.sources import Source, SourceTensor
from framequilt.errors import CorruptModel

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack(words: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Words [n, out / 8] -> codes [n, out]."""
    packed = np.ascontiguousarray(words).view(np.uint32)
    codes = np.empty((*packed.shape, 8), np.uint8)
    for k, output in enumerate(ORDER):
        codes[..., output] = (packed >> np.uint32(4 * k)) & np.uint32(15)
    return codes.reshape(len(packed), -1)


def _linear(source: Source, module: str, group: int) -> TableTensor:
    words = stored(source, f"{module}.qweight", ("I32",), 2)
    inputs, columns = words.shape
    zeros = stored(source, f"{module}.qzeros", ("I32",), 2)
    scales = stored(source, f"{module}.scales", FLOATS, 2)
    groups = -(-inputs // group) if group else 1
    expect_shape(zeros, groups, columns)
    expect_shape(scales, groups, columns * 8)

    def codes(start: int, stop: int) -> NDArray[np.uint8]:
        first = start // 8
        unpacked = unpack(words.data[:, first : -(-stop // 8)])
        return np.ascontiguousarray(unpacked[:, start - 8 * first : stop - 8 * first].T)

    def tables() -> Tables:
        return np.ascontiguousarray(scales.all().T), np.ascontiguousarray(unpack(zeros.data).T)

    size = words.bytes + zeros.bytes + scales.bytes
    name = f"{module}.weight"
    return TableTensor(Coded(name, "AWQ", size, 8 * columns, inputs, 4, group, tables, codes))


def read(source: Source, settings: Settings) -> Imported:
    """All linears of an AWQ checkpoint. Errors: CorruptModel, Unsupported."""
    settings.choice("bits", (4,), settings.values.get("w_bit"))
    settings.choice("version", ("gemm", "GEMM"), "gemm", "convert the original checkpoint")
    settings.choice("zero_point", (True,), True)
    key = "q_group_size" if "group_size" not in settings.values else "group_size"
    group = group_size(settings, key)
    names = modules(source, "qweight")
    if not names:
        raise CorruptModel(f"{source.path.name} has no qweight tensors, but says that it is AWQ")
    used = [f"{name}.{part}" for name in names for part in ("qweight", "qzeros", "scales")]
    tensors: dict[str, SourceTensor] = plain_tensors(source, used)
    for name in names:
        tensors[f"{name}.weight"] = _linear(source, name, group)
    return Imported(tensors, f"awq, 4 bits in {groups_of(group)}")
