"""Tensors that are quantized already, and tensors made in memory.

A `CodedTensor` is a weight whose codes exist: in a quantized checkpoint, or as the result of a
calibration method. It says in which of our formats its codes are, gives them by rows, and can be
read in float32 like any other source tensor. The converter stores such codes without touching them.

Memory: mapped files stay mapped; a piece of rows at a time is decoded. Any thread.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from framequilt.convert.sources import SourceTensor
from framequilt.errors import InvalidArgument
from framequilt.quantize import ActivationFormat, Quantized, WeightFormat, dequantize
from framequilt.quantize.formats import GROUPS


class CodedTensor(SourceTensor):
    """A weight [out, in] that is quantized already.

    `form` is the format of its codes. `activations` is how the checkpoint wants the inputs of this
    linear to be quantized, None if it does not say. `reference` is the weight that the codes stand
    for, where it is known: the conversion report gives the codes' error against it.
    """

    form: WeightFormat
    activations: ActivationFormat | None = None
    reference: SourceTensor | None = None

    @abstractmethod
    def coded_rows(self, start: int, stop: int) -> Quantized:
        """Codes [stop - start, in] with their parameters, exactly in the format `form`."""

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        return dequantize(self.coded_rows(start, stop))


class ArrayTensor(SourceTensor):
    """Values in memory."""

    def __init__(self, name: str, values: NDArray[np.float32]) -> None:
        self.name, self.dtype = name, "F32"
        self.shape, self.bytes = values.shape, values.nbytes
        self._values = values

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        return np.ascontiguousarray(self._values[start:stop], np.float32)


class ArrayCodes(CodedTensor):
    """Codes in memory, such as a calibration method makes them."""

    def __init__(
        self,
        name: str,
        coded: Quantized,
        form: WeightFormat,
        reference: SourceTensor | None = None,
    ) -> None:
        """Errors: InvalidArgument for codes that are not of this format."""
        if (coded.bits, coded.group) != (form.bits, form.group):
            raise InvalidArgument(f"{name}: these codes are not in the format {form.name}")
        self.name, self.form, self.reference = name, form, reference
        self.dtype = form.name
        self.shape = coded.codes.shape
        self.bytes = form.stored_bytes(*coded.codes.shape)
        self._coded = coded

    def coded_rows(self, start: int, stop: int) -> Quantized:
        return self._coded[start:stop]


def stored_group(group: int, inputs: int) -> int | None:
    """The group of ours that says the same as `group` consecutive inputs (0: all of them).

    A larger group than we have is several equal ones. None: there is no such group.
    """
    if group in GROUPS:
        return group
    if group >= inputs:
        return 0
    return max((ours for ours in GROUPS if ours and group % ours == 0), default=None)


T = TypeVar("T", bound=np.generic)


def repeat_groups(table: NDArray[T], group: int, ours: int, inputs: int) -> NDArray[T]:
    """Parameters [rows, groups of `group`] -> [rows, groups of `ours`], `stored_group`'s answer."""
    if ours in (0, group):
        return table
    return np.repeat(table, group // ours, axis=1)[:, : -(-inputs // ours)]


def fits_float16(values: NDArray[Any]) -> bool:
    """Whether float16 holds these values exactly."""
    wide = values.astype(np.float32)
    with np.errstate(over="ignore"):
        return bool((wide.astype(np.float16).astype(np.float32) == wide).all())
