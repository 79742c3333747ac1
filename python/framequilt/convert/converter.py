"""The conversion itself: describe, match, lay out, then quantize and write piece by piece.

Memory: one piece of a weight (tens of megabytes) at a time, whatever the model's size.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framequilt.convert import families
from framequilt.convert.families import Description
from framequilt.convert.report import ConversionReport, LinearReport, Progress
from framequilt.convert.rules import assign
from framequilt.convert.sources import Source, SourceTensor, open_source
from framequilt.convert.spec import Slot, check_limits, slots
from framequilt.convert.tokens import Tokens, read_tokens
from framequilt.errors import Cancelled, CorruptModel, InvalidArgument
from framequilt.model_directory import DEFAULT_SHARD_BYTES, DirectoryWriter
from framequilt.quantize import Scheme, WeightFormat, pack_rows, parse_scheme
from framequilt.quantize.formats import ROW_PADDING, TILE_ROWS, TensorInfo
from framequilt.quantize.rtn import RANGES, Range

KV_FORMATS = ("kv32", "kv16", "kv8", "kv4")
_PIECE_VALUES = 4 * 2**20  # weights per piece: 16 MiB in float32, a few times that with temporaries


@dataclass(frozen=True)
class _Plan:
    """Everything that is decided before the first byte is written."""

    description: Description
    family: str
    tokens: Tokens
    scheme: Scheme
    wanted: dict[str, Slot]
    found: dict[str, SourceTensor | None]
    left_out: dict[str, str]

    def linear(self, target: str) -> tuple[str, int, int, WeightFormat]:
        """Slot, out, in and format of a linear's weight."""
        slot = target.removesuffix(".weight")
        out, inputs = self.wanted[target].shape
        return slot, out, inputs, self.scheme.format_of(slot)

    def tensors(self) -> Iterator[TensorInfo]:
        """What will be stored, in the order of the model."""
        for target, slot in self.wanted.items():
            if slot.linear:
                name, out, inputs, form = self.linear(target)
                yield from form.tensors(name, out, inputs)
            else:
                yield TensorInfo(target, "F32", slot.shape)


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    weights: str = "w4g128",
    kv: str = "kv8",
    overrides: Mapping[str, str] | None = None,
    range_: Range = "include_zero",
    tokenizer: str | os.PathLike[str] | None = None,
    name: str | None = None,
    similarity_lower_bound: float | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    dry_run: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> ConversionReport:
    """Converts a checkpoint (directory or .gguf file) to a model directory.

    `weights` is a format name (`framequilt.quantize.formats`); `overrides` maps slot patterns such
    as "vision.*" to other formats. `kv` and `similarity_lower_bound` are only recorded as the
    model's defaults (None: what the family or the checkpoint recommends). `range_` "reference" is
    the paper's quantizer. `tokenizer` is another directory to take tokenizer and chat template
    from. A dry run does all but read the weights and write.

    `progress` is called after every piece, `cancelled` before it; when it returns true, or when
    either raises, nothing is left on disk. Errors: NotFound, CorruptModel, Unsupported,
    InvalidArgument (also for an existing destination), IoError, Cancelled.
    """
    began = time.monotonic()
    scheme = parse_scheme(weights, overrides)
    if kv not in KV_FORMATS:
        raise InvalidArgument(f"{kv!r} is no KV format", f"known: {', '.join(KV_FORMATS)}")
    if range_ not in RANGES:
        raise InvalidArgument(f"unknown range {range_!r}", f"known: {', '.join(RANGES)}")
    target = Path(os.path.abspath(destination))
    if target.exists() or target.is_symlink():
        raise InvalidArgument(f"{target} exists already", "choose another destination")
    opened = open_source(Path(source))
    plan = _plan(opened, scheme, None if tokenizer is None else _tokenizer_source(Path(tokenizer)))
    report = ConversionReport(
        source=opened.path,
        destination=target,
        family=plan.family,
        weights=scheme.name,
        kv=kv,
        written=False,
        config=_config(plan, opened, name or target.name, kv, similarity_lower_bound),
        left_out=plan.left_out,
        notes=_notes(plan),
        source_bytes=sum(tensor.bytes for tensor in plan.found.values() if tensor is not None),
    )
    check = _checker(cancelled)
    tensors = list(plan.tensors())
    report.total_bytes = sum(tensor.bytes for tensor in tensors)
    if dry_run:
        for wanted, slot in plan.wanted.items():
            if slot.linear:
                report.linears.append(_linear_report(plan, wanted, None))
            else:
                report.vector_bytes += 4 * math.prod(slot.shape)
    else:
        with DirectoryWriter(target, tensors, shard_bytes=shard_bytes) as writer:
            _write_tensors(plan, writer, report, range_, progress, check)
            _write_files(plan, writer)
            writer.commit(report.config, check)
            report.total_bytes = writer.total_bytes
        report.written = True
    report.seconds = time.monotonic() - began
    return report


def _plan(source: Source, scheme: Scheme, tokenizer: Source | None) -> _Plan:
    family = families.find(source)
    description = family.describe(source)
    check_limits(description.model)
    wanted = slots(description.model)
    found, left_out = assign(
        source.tensors,
        description.rules,
        description.left_out,
        wanted,
        description.zero_filled,
    )
    vocab = description.model.decoder.vocab
    tokens = read_tokens(source, description.text_config, vocab, tokenizer)
    return _Plan(description, family.name, tokens, scheme, wanted, found, left_out)


def _tokenizer_source(path: Path) -> Source:
    """A directory, of which only the small files are used."""
    if not path.is_dir():
        raise InvalidArgument(f"{path} is no directory", "give the folder with tokenizer.json")
    return Source(path, "files", {}, {}, folder=path)


def _checker(cancelled: Callable[[], bool] | None) -> Callable[[], None]:
    def check() -> None:
        if cancelled is not None and cancelled():
            raise Cancelled("the conversion was cancelled")

    return check


def _config(
    plan: _Plan, source: Source, name: str, kv: str, similarity_lower_bound: float | None
) -> dict[str, Any]:
    """config.json without `format`, `version` and `files`."""
    linears: dict[str, Any] = {}
    for target, slot in plan.wanted.items():
        if slot.linear:
            slot_name, out, inputs, form = plan.linear(target)
            linears[slot_name] = {"out": out, "in": inputs, "format": form.to_json()}
    similarity = similarity_lower_bound
    if similarity is None:
        similarity = plan.description.similarity_lower_bound
    architectures = source.config.get("architectures")
    origin = {
        "family": plan.family,
        "architecture": str(architectures[0]) if architectures else "",
        "checkpoint": source.path.name,
        "kind": source.kind,
    }
    return {
        "name": name,
        "source": origin,
        "weights": plan.scheme.name,
        **plan.description.model.to_json(),
        "tokens": plan.tokens.to_json(plan.description.media),
        "defaults": {"kv": kv, "similarity_lower_bound": similarity},
        "linears": linears,
    }


def _notes(plan: _Plan) -> list[str]:
    """What a user should know: groups that do not divide a width, formats by part."""
    short: dict[tuple[int, int], int] = {}
    for target, slot in plan.wanted.items():
        if slot.linear:
            _, _, inputs, form = plan.linear(target)
            if form.kind == "affine" and form.group and inputs % form.group:
                short[inputs, form.group] = short.get((inputs, form.group), 0) + 1
    notes = [
        f"{count} of the linears have {inputs} inputs: the last group is {inputs % group} wide"
        for (inputs, group), count in sorted(short.items())
    ]
    kinds = Counter(tensor.dtype for tensor in plan.found.values() if tensor is not None)
    coded = {kind: n for kind, n in sorted(kinds.items()) if kind not in ("F32", "F16", "BF16")}
    if coded:
        listed = ", ".join(f"{n} x {kind}" for kind, n in coded.items())
        notes.append(f"the checkpoint is quantized already ({listed}): both errors add up")
    if not plan.tokens.eos:
        notes.append("the checkpoint names no end token: answers end at max_tokens only")
    return notes


def _linear_report(plan: _Plan, target: str, error: float | None) -> LinearReport:
    slot, out, inputs, form = plan.linear(target)
    source = plan.found[target]
    return LinearReport(
        slot=slot,
        source="" if source is None else source.name,
        out=out,
        inputs=inputs,
        format=form.name,
        source_dtype="" if source is None else source.dtype,
        bytes=form.stored_bytes(out, inputs),
        relative_error=error,
    )


def _write_tensors(
    plan: _Plan,
    writer: DirectoryWriter,
    report: ConversionReport,
    range_: Range,
    progress: Callable[[Progress], None] | None,
    check: Callable[[], None],
) -> None:
    done = 0
    for target, slot in plan.wanted.items():
        if slot.linear:
            name, out, inputs, form = plan.linear(target)
            squared = magnitude = 0.0
            for first, values in _pieces(plan.found[target], out, inputs):
                check()
                try:
                    packed, stored = pack_rows(values, form, range_)
                except CorruptModel as error:
                    raise CorruptModel(f"{name}: {error.message}", error.hint) from error
                for suffix, data in packed.items():
                    writer.write(f"{name}.{suffix}", data, first // TILE_ROWS)
                    done += data.nbytes
                squared += float(np.linalg.norm(values - stored)) ** 2
                magnitude += float(np.linalg.norm(values)) ** 2
                if progress is not None:
                    progress(Progress(name, done, report.total_bytes))
            error_ratio = math.sqrt(squared / magnitude) if magnitude else 0.0
            report.linears.append(_linear_report(plan, target, error_ratio))
        else:
            check()
            vector = _vector(plan.found[target], target, slot.shape)
            writer.write(target, vector)
            done += vector.nbytes
            report.vector_bytes += vector.nbytes
            if progress is not None:
                progress(Progress(target, done, report.total_bytes))


def _pieces(
    tensor: SourceTensor | None, out: int, inputs: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """First row and float32 rows [n, inputs] of a weight, each a whole number of tile pairs."""
    step = max(_PIECE_VALUES // inputs // ROW_PADDING, 1) * ROW_PADDING
    for first in range(0, out, step):
        stop = min(first + step, out)
        if tensor is None:
            yield first, np.zeros((stop - first, inputs), np.float32)
        else:
            yield first, tensor.rows(first, stop).reshape(stop - first, inputs)


def _vector(
    tensor: SourceTensor | None, target: str, shape: tuple[int, ...]
) -> NDArray[np.float32]:
    if tensor is None:
        return np.zeros(shape, np.float32)
    values = tensor.all()
    if not np.isfinite(values).all():
        raise CorruptModel(f"{target}: a value is not a finite number")
    return values


def _write_files(plan: _Plan, writer: DirectoryWriter) -> None:
    tokens = plan.tokens
    writer.add_file(tokens.file, tokens.content)
    if tokens.chat_template is not None:
        template = tokens.chat_template
        for old, new in plan.description.template_changes.items():
            template = template.replace(old, new)
        writer.add_file("chat_template.jinja", template.encode())
    if plan.description.preprocessor is not None:
        text = json.dumps(plan.description.preprocessor, indent=1)
        writer.add_file("preprocessor.json", text.encode() + b"\n")
