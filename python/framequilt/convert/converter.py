"""The conversion itself: describe, match, lay out, then quantize and write piece by piece.

Memory: one piece of a weight (tens of megabytes) at a time, whatever the model's size; a method may
need more. One thread.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framequilt.convert import families, presets
from framequilt.convert.coded import CodedTensor
from framequilt.convert.plan import Linear, Method, Plan
from framequilt.convert.report import ConversionReport, LinearReport, Progress
from framequilt.convert.rules import assign
from framequilt.convert.sources import Source, SourceTensor, open_source
from framequilt.convert.spec import check_limits, slots
from framequilt.convert.tokens import read_tokens
from framequilt.errors import Cancelled, CorruptModel, InvalidArgument
from framequilt.kv_format import parse_kv_format
from framequilt.model_directory import DEFAULT_SHARD_BYTES, DirectoryWriter
from framequilt.quantize import (
    ActivationScheme,
    Scheme,
    dequantize,
    pack_quantized,
    pack_rows,
    parse_activation_scheme,
    parse_scheme,
)
from framequilt.quantize.formats import ROW_PADDING, TILE_ROWS
from framequilt.quantize.rtn import RANGES, Range
from framequilt.quantize.schemes import DEFAULT_WEIGHTS, KEEP, number_layers

_PIECE_VALUES = 4 * 2**20  # weights per piece: 16 MiB in float32, a few times that with temporaries


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    preset: str | None = None,
    weights: str | None = None,
    activations: str | None = None,
    kv: str | None = None,
    overrides: Mapping[str, str] | None = None,
    range_: Range = "include_zero",
    method: Method | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    name: str | None = None,
    similarity_lower_bound: float | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    dry_run: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> ConversionReport:
    """Converts a checkpoint (directory or .gguf file) to a model directory.

    `weights` and `activations` are schemes (`framequilt.quantize.schemes`), such as
    "w4g128,lm_head=w8" and "a8"; `overrides` are more patterns of slots and weight formats. None is
    what the `preset` says (`framequilt.convert.presets`); without one it is "keep" for a checkpoint
    that is quantized already and "w4g128" for others, and the activations that the checkpoint says,
    or float32. `method` calibrates the weights first (`framequilt.convert.plan.Method`). `kv`
    (None: the preset's, or "kv8") and `similarity_lower_bound` (None: what the family or the
    checkpoint recommends) are only recorded as the model's defaults. `range_` "reference" is the
    paper's quantizer. `tokenizer` is another directory to take tokenizer and chat template from. A
    dry run does all but read the weights, calibrate and write.

    `progress` is called after every piece, `cancelled` before it; when it returns true, or when
    either raises, nothing is left on disk. Errors: NotFound, CorruptModel, Unsupported,
    InvalidArgument (also for an existing destination), IoError, Cancelled; those of the method.
    """
    began = time.monotonic()
    chosen = None if preset is None else presets.find(preset)
    wish = _wish(chosen, weights, activations, overrides)
    kv = parse_kv_format(kv or (chosen.kv if chosen else "kv8")).name
    if range_ not in RANGES:
        raise InvalidArgument(f"unknown range {range_!r}", f"known: {', '.join(RANGES)}")
    target = Path(os.path.abspath(destination))
    if target.exists() or target.is_symlink():
        raise InvalidArgument(f"{target} exists already", "choose another destination")
    opened = open_source(Path(source), tokenizer=tokenizer is None)
    other = None if tokenizer is None else _tokenizer_source(Path(tokenizer))
    plan = _plan(opened, wish, other)
    check = _checker(cancelled)
    source_bytes = sum(tensor.bytes for tensor in plan.found.values() if tensor is not None)
    notes = _notes(plan)
    if method is not None and not dry_run:
        plan = plan.with_tensors(method.transform(plan, check))
        plan.check()
        notes += method.notes
    report = ConversionReport(
        source=opened.path,
        destination=target,
        family=plan.family,
        weights=plan.scheme.name,
        activations=_activations_name(plan),
        kv=kv,
        written=False,
        config=_config(plan, name or target.name, kv, similarity_lower_bound, chosen, method),
        left_out=dict(plan.left_out),
        notes=notes,
        source_bytes=source_bytes,
    )
    tensors = list(plan.tensors())
    report.total_bytes = sum(tensor.bytes for tensor in tensors)
    if dry_run:
        for wanted, slot in plan.wanted.items():
            if slot.linear:
                linear = plan.linear(wanted.removesuffix(".weight"))
                report.linears.append(_linear_report(linear, None, None))
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


@dataclass(frozen=True)
class _Wish:
    """What was asked for. `coded` are the weights of a checkpoint that is quantized already."""

    plain: Scheme
    coded: Scheme
    activations: ActivationScheme | None


def _wish(
    preset: presets.Preset | None,
    weights: str | None,
    activations: str | None,
    overrides: Mapping[str, str] | None,
) -> _Wish:
    """Errors: InvalidArgument."""
    if weights is not None:
        plain = coded = parse_scheme(weights, overrides)
    elif preset is not None:
        plain = coded = parse_scheme(preset.weights, overrides, optional=True)
    else:
        plain, coded = parse_scheme(DEFAULT_WEIGHTS, overrides), parse_scheme(KEEP, overrides)
    if activations is not None:
        return _Wish(plain, coded, parse_activation_scheme(activations))
    if preset is not None:
        return _Wish(plain, coded, parse_activation_scheme(preset.activations, optional=True))
    return _Wish(plain, coded, None)


def _plan(source: Source, wish: _Wish, tokenizer: Source | None) -> Plan:
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
    coded = any(isinstance(found[target], CodedTensor) for target in found if wanted[target].linear)
    vocab = description.model.decoder.vocab
    model = description.model
    layers = {"decoder": model.decoder.layers, "vision": model.vision.layers if model.vision else 0}
    weights = wish.coded if coded else wish.plain
    weights = replace(weights, overrides=number_layers(weights.overrides, layers))
    activations = wish.activations
    if activations is not None:
        activations = replace(activations, overrides=number_layers(activations.overrides, layers))
    plan = Plan(
        source,
        description,
        family.name,
        read_tokens(source, description.text_config, vocab, tokenizer),
        weights,
        activations,
        wanted,
        found,
        left_out,
    )
    plan.check()
    return plan


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


def _activations_name(plan: Plan) -> str:
    """The scheme that was asked for; or else what the checkpoint says, by name."""
    if plan.activations is not None:
        return plan.activations.name
    names = Counter(
        form.name for slot in plan.linears() if (form := plan.linear(slot).activations) is not None
    )
    return " and ".join(sorted(names)) or "a16"


def _config(
    plan: Plan,
    name: str,
    kv: str,
    similarity_lower_bound: float | None,
    preset: presets.Preset | None,
    method: Method | None,
) -> dict[str, Any]:
    """config.json without `format`, `version` and `files`."""
    linears: dict[str, Any] = {}
    for slot in plan.linears():
        linear = plan.linear(slot)
        entry = {"out": linear.out, "in": linear.inputs, "format": linear.form.to_json()}
        if linear.activations is not None:
            entry["activations"] = linear.activations.to_json()
        linears[slot] = entry
    model = plan.model.to_json()
    if model["vision"] is not None and plan.attention_activations is not None:
        model["vision"]["attention_activations"] = plan.attention_activations.to_json()
    similarity = similarity_lower_bound
    if similarity is None:
        similarity = plan.description.similarity_lower_bound
    source = plan.source
    architectures = source.config.get("architectures")
    origin = {
        "family": plan.family,
        "architecture": str(architectures[0]) if architectures else "",
        "checkpoint": source.path.name,
        "kind": source.kind,
        "activations": _activations_name(plan),
    }
    if source.quantization:
        origin["quantization"] = source.quantization
    if preset is not None:
        origin["preset"] = preset.summary
    if method is not None:
        origin["method"] = method.name
    return {
        "name": name,
        "source": origin,
        "weights": plan.scheme.name,
        **model,
        "tokens": plan.tokens.to_json(plan.description.media),
        "defaults": {"kv": kv, "similarity_lower_bound": similarity},
        "linears": linears,
    }


def _notes(plan: Plan) -> list[str]:
    """What a user should know: groups that do not divide a width, codes kept and made anew."""
    short: Counter[tuple[int, int]] = Counter()
    kept: Counter[str] = Counter()
    anew: Counter[str] = Counter()
    plain = 0
    for slot in plan.linears():
        linear = plan.linear(slot)
        form = linear.form
        if form.kind == "affine" and form.group and linear.inputs % form.group:
            short[linear.inputs, form.group] += 1
        if linear.coded is not None:
            kept[f"{linear.coded.dtype} as {form.name}"] += 1
        elif isinstance(linear.source, CodedTensor):
            anew[f"{linear.source.dtype} to {form.name}"] += 1
        else:
            plain += 1
    notes = [
        f"{count} of the linears have {inputs} inputs: the last group is {inputs % group} wide"
        for (inputs, group), count in sorted(short.items())
    ]
    if kept:
        notes.append(f"codes of the checkpoint stay as they are: {_counted(kept)}")
        if plan.scheme.keep and plain:
            name = plan.scheme.decoder.name
            notes.append(f"{plain} linears are not quantized in the checkpoint: {name} by default")
    if anew:
        notes.append(
            f"quantized already, and now quantized again: {_counted(anew)}; both errors add up"
        )
    if kept and plan.source.kind == "gguf" and plan.activations is None:
        notes.append(
            "inputs stay in float32; llama.cpp rounds them to 8 bits with these weights, as "
            "--activations a8,lm_head=a8 does: faster, and a little less exact"
        )
    notes += plan.source.notes
    if not plan.tokens.eos:
        notes.append("the checkpoint names no end token: answers end at max_tokens only")
    return notes


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} x {what}" for what, count in sorted(counts.items()))


def _linear_report(linear: Linear, error: float | None, norm: float | None) -> LinearReport:
    source, activations = linear.source, linear.activations
    return LinearReport(
        slot=linear.slot,
        source="" if source is None else source.name,
        out=linear.out,
        inputs=linear.inputs,
        format=linear.form.name,
        source_dtype="" if source is None else source.dtype,
        bytes=linear.form.stored_bytes(linear.out, linear.inputs, activations),
        relative_error=error,
        norm=norm,
        activations="a16" if activations is None else activations.name,
        codes_kept=linear.coded is not None,
    )


def _write_tensors(
    plan: Plan,
    writer: DirectoryWriter,
    report: ConversionReport,
    range_: Range,
    progress: Callable[[Progress], None] | None,
    check: Callable[[], None],
) -> None:
    done = 0
    for target, slot in plan.wanted.items():
        if slot.linear:
            linear = plan.linear(target.removesuffix(".weight"))
            squared = magnitude = 0.0
            for first, stop in _pieces(linear):
                check()
                try:
                    packed, values, stored = _pack(linear, first, stop, range_)
                except CorruptModel as error:
                    raise CorruptModel(f"{linear.slot}: {error.message}", error.hint) from error
                for suffix, data in packed.items():
                    writer.write(f"{linear.slot}.{suffix}", data, first // TILE_ROWS)
                    done += data.nbytes
                squared += float(np.linalg.norm(values - stored)) ** 2
                magnitude += float(np.linalg.norm(values)) ** 2
                if progress is not None:
                    progress(Progress(linear.slot, done, report.total_bytes))
            error_ratio = math.sqrt(squared / magnitude) if magnitude else 0.0
            report.linears.append(_linear_report(linear, error_ratio, math.sqrt(magnitude)))
        else:
            check()
            vector = _vector(plan.found[target], target, slot.shape)
            writer.write(target, vector)
            done += vector.nbytes
            report.vector_bytes += vector.nbytes
            if progress is not None:
                progress(Progress(target, done, report.total_bytes))


def _pieces(linear: Linear) -> Iterator[tuple[int, int]]:
    """First and last row of pieces of a weight, each a whole number of tile pairs."""
    step = max(_PIECE_VALUES // linear.inputs // ROW_PADDING, 1) * ROW_PADDING
    for first in range(0, linear.out, step):
        yield first, min(first + step, linear.out)


def _pack(
    linear: Linear, first: int, stop: int, range_: Range
) -> tuple[dict[str, NDArray[Any]], NDArray[np.float32], NDArray[np.float32]]:
    """Stored tensors of some rows by suffix, what the rows should be, and what they will be."""
    shape = (stop - first, linear.inputs)
    if linear.coded is None:
        source = linear.source
        values = np.zeros(shape, np.float32)
        if source is not None:
            values = source.rows(first, stop).reshape(shape)
        packed, stored = pack_rows(values, linear.form, range_, linear.activations)
        return packed, values, stored
    codes = linear.coded.coded_rows(first, stop)
    packed = pack_quantized(codes, linear.form, linear.activations)
    stored = dequantize(codes)
    reference = linear.coded.reference
    values = stored if reference is None else reference.rows(first, stop).reshape(shape)
    return packed, values, stored


def _vector(
    tensor: SourceTensor | None, target: str, shape: tuple[int, ...]
) -> NDArray[np.float32]:
    if tensor is None:
        return np.zeros(shape, np.float32)
    values = tensor.all()
    if not np.isfinite(values).all():
        raise CorruptModel(f"{target}: a value is not a finite number")
    return values


def _write_files(plan: Plan, writer: DirectoryWriter) -> None:
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
