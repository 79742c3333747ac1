"""What a method decided, layer by layer, in a work folder.

    WORK/job.json                     what the job is; another job is refused
    WORK/layers/<part>.<n>.safetensors  factors, clips or codes of one layer, and its figures

A layer's file is written aside and renamed, so that it is whole or not there: a job that was killed
goes on after its last whole layer. Memory: one layer at a time. One thread writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from framequilt.convert.coded import CodedTensor
from framequilt.convert.sources import SourceTensor
from framequilt.errors import CorruptModel, InvalidArgument, IoError
from framequilt.quantize.calibration.blocks import Half
from framequilt.quantize.formats import WeightFormat
from framequilt.quantize.methods.grids import fake_quantize
from framequilt.quantize.methods.rescale import RescaledTensor, clip_groups, scale_half
from framequilt.quantize.rtn import Quantized, Range, dequantize

JOB_VERSION = 1
_TABLES = ("scales", "zeros", "offsets", "scale_steps", "offset_steps")  # of `Quantized`


def _tables(form: WeightFormat) -> list[str]:
    """Those that codes of a format have."""
    tables = ["scales", "zeros"] + ["offsets"] * form.offset
    if form.stepped:
        tables += ["scale_steps"] + ["offset_steps"] * form.offset
    return tables


@dataclass
class LayerResult:
    """One layer: factors by the name that takes the division, clips and codes by linear."""

    scales: dict[str, Tensor] = field(default_factory=dict)
    clips: dict[str, Tensor] = field(default_factory=dict)
    codes: dict[str, Quantized] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Arrays by name, for a safetensors file."""
        arrays: dict[str, NDArray[Any]] = {}
        for kind, tensors in (("scale", self.scales), ("clip", self.clips)):
            for name, values in tensors.items():
                arrays[f"{kind}:{name}"] = np.ascontiguousarray(values.numpy())
        for name, coded in self.codes.items():
            arrays[f"codes:{name}"] = np.ascontiguousarray(coded.codes)
            for table in _TABLES:
                values = getattr(coded, table)
                if values is not None:
                    arrays[f"{table}:{name}"] = np.ascontiguousarray(values)
        return arrays

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[Any]], formats: Mapping[str, WeightFormat], report: Any
    ) -> LayerResult:
        """Reads what `to_arrays` made; `formats` by linear. Errors: KeyError for missing arrays."""
        result = cls(report=report)
        for key, values in arrays.items():
            kind, _, name = key.partition(":")
            if kind == "scale":
                result.scales[name] = torch.from_numpy(values)
            elif kind == "clip":
                result.clips[name] = torch.from_numpy(values)
            elif kind == "codes":
                form = formats[name]
                tables = {table: arrays[f"{table}:{name}"] for table in _tables(form)}
                result.codes[name] = Quantized(values, bits=form.bits, group=form.group, **tables)
        return result

    def rescaled(
        self, weights: Mapping[str, Tensor], halves: tuple[Half, Half],
        formats: Mapping[str, WeightFormat],
    ) -> dict[str, Tensor]:  # fmt: skip
        """A layer's float tensors with factors and clips."""
        result = dict(weights)
        for half in halves:
            fold = None if half.fold is None else self.scales.get(half.fold)
            result = scale_half(result, half, self.scales.get(half.norm_name), fold)
        for name, most in self.clips.items():
            key = f"{name}.weight"
            result[key] = clip_groups(result[key], most, formats[name].group)
        return result

    def stored(
        self, weights: Mapping[str, Tensor], halves: tuple[Half, Half],
        formats: Mapping[str, WeightFormat], range_: Range = "include_zero",
    ) -> dict[str, Tensor]:  # fmt: skip
        """A layer's tensors as the engine will read them back."""
        result = self.rescaled(weights, halves, formats)
        for name, form in formats.items():
            key = f"{name}.weight"
            if name in self.codes:
                result[key] = torch.from_numpy(dequantize(self.codes[name]))
            else:
                result[key] = fake_quantize(result[key], form, range_)
        return result


class WorkFolder:
    """The files of a job. Errors of all methods: IoError."""

    def __init__(self, path: str | os.PathLike[str], job: Mapping[str, Any]) -> None:
        """Opens or makes it. Errors: InvalidArgument when another job lies there."""
        self.path = Path(path)
        self._layers = self.path / "layers"
        wanted = json.loads(json.dumps({"version": JOB_VERSION, **job}))
        file = self.path / "job.json"
        try:
            self._layers.mkdir(parents=True, exist_ok=True)
            if file.exists():
                self._check(json.loads(file.read_text(encoding="utf-8")), wanted)
            elif any(self._layers.iterdir()):
                raise InvalidArgument(
                    f"{self.path} holds layers but no job.json", "choose another work folder"
                )
            else:
                write_aside(file, json.dumps(wanted, indent=1).encode())
        except OSError as error:
            raise IoError(f"{self.path}: {error.strerror or error}") from error
        except ValueError as error:
            raise CorruptModel(f"{file} is no valid JSON ({error})") from error

    def _check(self, found: Any, wanted: Mapping[str, Any]) -> None:
        keys = [*wanted, *(key for key in found if key not in wanted)]
        different = [key for key in keys if found.get(key) != wanted.get(key)]
        if different:
            raise InvalidArgument(
                f"{self.path} is the work of another job: {', '.join(different)} differ",
                "choose another work folder, or remove this one",
            )

    def file(self, part: str, number: int) -> Path:
        """Where a layer lies."""
        return self._layers / f"{part}.{number}.safetensors"

    def load(
        self, part: str, number: int, formats: Mapping[str, WeightFormat]
    ) -> LayerResult | None:
        """A finished layer, None if it is still to do. Errors: CorruptModel."""
        from safetensors import SafetensorError, safe_open

        file = self.file(part, number)
        if not file.exists():
            return None
        try:
            with safe_open(str(file), "numpy") as opened:
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                report = json.loads(opened.metadata()["report"])
            return LayerResult.from_arrays(arrays, formats, report)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CorruptModel(f"{file}: {error}", "remove this file and start again") from error
        except OSError as error:
            raise IoError(f"{file}: {error.strerror or error}") from error

    def save(self, part: str, number: int, result: LayerResult) -> None:
        """Keeps a finished layer."""
        from safetensors.numpy import save

        content = save(result.to_arrays(), {"report": json.dumps(result.report)})
        try:
            write_aside(self.file(part, number), content)
        except OSError as error:
            raise IoError(f"{self.path}: {error.strerror or error}") from error


def write_aside(file: Path, content: bytes) -> None:
    """Writes a file beside its place, and renames it when it is on the disk."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class MethodResult:
    """A whole job that is done: what the converter asks, tensor by tensor."""

    method: str
    weights: str
    activations: str
    work: WorkFolder
    halves: Mapping[str, tuple[Half, Half]]  # by part
    formats: Mapping[str, WeightFormat]  # of every linear in a layer, by slot
    layers: Mapping[str, int]  # layers by part, of the parts that were calibrated
    range_: Range = "include_zero"

    def local_formats(self, part: str, number: int) -> dict[str, WeightFormat]:
        """Formats of one layer's linears by local name."""
        at = f"{part}.layers.{number}."
        found = self.formats.items()
        return {slot.removeprefix(at): form for slot, form in found if slot.startswith(at)}

    def layer(self, part: str, number: int) -> LayerResult:
        """One layer; empty for a part that was not calibrated. Errors: CorruptModel, NotFound."""
        if number >= self.layers.get(part, 0):
            return LayerResult()
        found = self.work.load(part, number, self.local_formats(part, number))
        if found is None:
            raise CorruptModel(f"{self.work.file(part, number)} is gone", "run the method again")
        return found

    def stored(self, part: str, number: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A layer's tensors as the engine will read them back, from the checkpoint's."""
        formats = self.local_formats(part, number)
        return self.layer(part, number).stored(weights, self.halves[part], formats, self.range_)

    def tensors(self, found: Mapping[str, SourceTensor | None]) -> dict[str, SourceTensor]:
        """What is written in place of a checkpoint's tensors, by slot: tensors with factors and
        clips, still to be rounded, and codes. Nothing is read before its rows are asked for."""
        result: dict[str, SourceTensor] = {}
        for target, source in found.items():
            part, middle, rest = target.partition(".layers.")
            number, dot, local = rest.partition(".")
            if source is None or not (middle and dot) or int(number) >= self.layers.get(part, 0):
                continue
            slot = target.removesuffix(".weight")
            form = self.formats.get(slot)
            if self.method == "gptq":
                if slot != target and form is not None and form.kind == "affine":
                    file = self.work.file(part, int(number))
                    name = local.removesuffix(".weight")
                    result[target] = LayerCodes(file, name, form, source)
                continue
            own = self._rescaled(self.layer(part, int(number)), part, local, source, form)
            if own is not None:
                result[target] = own
        return result

    def _rescaled(
        self, layer: LayerResult, part: str, local: str, source: SourceTensor,
        form: WeightFormat | None,
    ) -> SourceTensor | None:  # fmt: skip
        """One tensor with its factors and clips, None where it has none."""
        name, _, suffix = local.rpartition(".")
        columns = divide = None
        for half in self.halves[part]:
            norm = layer.scales.get(half.norm_name)
            fold = None if half.fold is None else layer.scales.get(half.fold)
            if name == half.norm_name:
                divide = norm
            elif name == half.fold:
                divide = fold
            if suffix == "weight":
                if name in half.firsts:
                    columns = norm
                elif name == half.last:
                    columns = fold
        most = layer.clips.get(name) if suffix == "weight" else None
        if columns is None and divide is None and most is None:
            return None
        return RescaledTensor(
            source, columns=_array(columns), divide=_array(divide), most=_array(most),
            group=0 if form is None else form.group,
        )  # fmt: skip

    def reports(self) -> list[dict[str, Any]]:
        """Figures of every calibrated layer, in order."""
        return [
            {"layer": f"{part}.layers.{n}", **self.layer(part, n).report}
            for part, count in self.layers.items()
            for n in range(count)
        ]


class LayerCodes(CodedTensor):
    """Codes of one linear in a layer's file, read by rows."""

    def __init__(self, file: Path, linear: str, form: WeightFormat, source: SourceTensor) -> None:
        self.name, self.shape = source.name, tuple(source.shape)
        self.dtype, self.bytes = form.name, source.bytes
        self.form, self.reference = form, source
        self._file, self._linear = file, linear

    def coded_rows(self, start: int, stop: int) -> Quantized:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self._file), "numpy") as opened:

                def rows(kind: str) -> NDArray[Any]:
                    values: NDArray[Any] = opened.get_slice(f"{kind}:{self._linear}")[start:stop]
                    return values

                tables = {table: rows(table) for table in _tables(self.form)}
                return Quantized(
                    rows("codes"), bits=self.form.bits, group=self.form.group, **tables
                )
        except SafetensorError as error:
            raise CorruptModel(f"{self._file}: {error}", "run the method again") from error
        except OSError as error:
            raise IoError(f"{self._file}: {error.strerror or error}") from error


def _array(values: Tensor | None) -> NDArray[np.float32] | None:
    return None if values is None else values.numpy()
