"""`framequilt calibrate`: a checkpoint becomes a model directory, by a method that sees data."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from framequilt.cli.common import JsonOption, err, guarded, human_bytes, out, pairs, print_json
from framequilt.errors import InvalidArgument, Unsupported

if TYPE_CHECKING:
    from framequilt.quantize.calibration.checkpoint import Checkpoint
    from framequilt.quantize.calibration.samples import Sample, TextCodec
    from framequilt.quantize.methods import MethodResult, Step


@guarded
def command(
    source: Annotated[str, typer.Argument(help="Checkpoint: Hugging Face directory or .gguf.")],
    destination: Annotated[str, typer.Argument(help="Model directory to make; must not exist.")],
    method: Annotated[
        str, typer.Option("--method", help="awq, gptq, smoothquant or rtn (round to nearest).")
    ],
    text: Annotated[
        list[str] | None, typer.Option("--text", help="Text to calibrate on; may be repeated.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            help="The model's own prompts to calibrate on: JSON lines with prompt and, if wanted, "
            "video or image, and answer. With pictures the tower is calibrated too.",
        ),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option("--held-out", help="Text to measure KL divergence and perplexity on."),
    ] = None,
    weights: Annotated[
        str, typer.Option("--weights", help="Weight format, as for convert.")
    ] = "w4g128",
    activations: Annotated[
        str, typer.Option("--activations", help="Inputs of linears, as for convert.")
    ] = "a16",
    kv: Annotated[str, typer.Option("--kv", help="The model's default KV format.")] = "kv8",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Pieces of the text.")] = 32,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens of a piece.")] = 512,
    frames: Annotated[int, typer.Option("--frames", min=1, help="Frames of a video.")] = 8,
    held_out_samples: Annotated[int, typer.Option("--held-out-samples", min=1)] = 16,
    held_out_length: Annotated[int, typer.Option("--held-out-length", min=2)] = 512,
    alpha: Annotated[
        str, typer.Option("--alpha", help="SmoothQuant's exponent from 0 to 1, or auto.")
    ] = "auto",
    act_order: Annotated[
        bool, typer.Option(help="GPTQ: columns with the largest inputs first.")
    ] = True,
    media_weight: Annotated[
        float | None,
        typer.Option(
            "--media-weight",
            help="How much a row of a picture counts in the decoder, beside 1 for one of text "
            "(without it a tenth).",
        ),
    ] = None,
    work: Annotated[
        str | None,
        typer.Option("--work", help="Folder for finished layers: the same command goes on there."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Directory to take the tokenizer from.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The model's name.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Quantize a checkpoint with AWQ, GPTQ or SmoothQuant."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise Unsupported("calibration needs torch", "pip install 'framequilt[convert]'") from error
    from framequilt.convert import convert
    from framequilt.quantize.calibration.samples import prompt_samples, read_text, text_samples
    from framequilt.quantize.methods import Calibration, Options

    if not text and prompts is None and method != "rtn":
        raise InvalidArgument("nothing to calibrate on", "give --text, --prompts, or both")
    given = read_text(text) if text else ""
    measured = read_text(held_out) if held_out else ""
    options = Options(alpha=_alpha(alpha), act_order=act_order)
    if media_weight is not None:
        options = replace(options, media_weight=media_weight)
    codecs: list[TextCodec] = []

    def make(checkpoint: Checkpoint, codec: TextCodec) -> Sequence[Sample]:
        codecs.append(codec)
        found: list[Sample] = []
        if given:
            found += text_samples(given, codec, samples, length)
        if prompts is not None:
            found += prompt_samples(prompts, checkpoint, codec, frames)
        return found

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )  # fmt: skip
    console = err()
    silent = as_json or not console.is_terminal
    with (
        tempfile.TemporaryDirectory() as temporary,
        Progress(*columns, console=console, transient=True, disable=silent) as bar,
    ):
        folder = Path(work or temporary)
        task = bar.add_task(method, total=None)

        def show(step: Step) -> None:
            bar.update(
                task, completed=step.done, total=step.total,
                description=f"{method} {step.part}.layers.{step.layer}",
            )  # fmt: skip

        calibration = Calibration(
            method, make, work=folder / "layers" if work is None else folder,
            options=options, progress=show,
        )  # fmt: skip
        report = convert(
            source, destination, weights=weights, activations=activations, kv=kv,
            tokenizer=tokenizer, name=name, method=calibration,
        )  # fmt: skip
        checkpoint, result = calibration.checkpoint, calibration.result
        assert checkpoint is not None and result is not None
        layers = result.reports()
        rows: list[dict[str, Any]] = []
        if measured:
            found = text_samples(measured, codecs[0], held_out_samples, held_out_length)
            rows = _measure(checkpoint, result, found, folder, bar)
    if as_json:
        print_json({**report.to_json(), "layers": layers, "held_out": rows})
        return
    _show(report, layers, rows)


def _alpha(text: str) -> Any:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError as error:
        raise InvalidArgument(f"--alpha {text!r} is neither a number nor auto") from error


def _measure(
    checkpoint: Checkpoint, result: MethodResult, samples: list[Sample], folder: Path, bar: Progress
) -> list[dict[str, Any]]:
    """Figures on held-out text: plain rounding, then the method."""
    from framequilt.quantize.methods import evaluation
    from framequilt.quantize.methods.runner import plain_rounding

    task = bar.add_task("measuring", total=3)
    exact = evaluation.run(checkpoint, samples, None, folder)
    bar.update(task, advance=1)
    plain = plain_rounding(
        checkpoint, result.weights, result.activations, folder / "rtn", result.range_
    )
    rows = []
    for candidate in (plain, result) if result.method != "rtn" else (plain,):
        found = evaluation.run(checkpoint, samples, candidate, folder)
        compared = evaluation.compare(checkpoint, exact, found, candidate)
        rows.append(
            {
                "method": candidate.method,
                "bytes": evaluation.stored_bytes(
                    checkpoint, candidate.weights, candidate.activations
                ),
                "bytes_bf16": evaluation.stored_bytes(checkpoint, None),
                **compared.summary(),
            }
        )
        bar.update(task, advance=1)
    return rows


def _show(report: Any, layers: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    from framequilt.quantize.methods.converting import error_ratios_of

    console = out()
    summary = [
        ("written", str(report.destination)),
        ("weights", f"{report.weights}, {report.effective_bits:.2f} bits per weight"),
        ("activations", report.activations),
        ("method", report.config["source"]["method"]),
        ("size", f"{human_bytes(report.total_bytes)} from {human_bytes(report.source_bytes)}"),
        ("time", f"{report.seconds:.1f} s"),
        *(("note", note) for note in report.notes),
    ]
    console.print(pairs("conversion", summary))
    table = Table(title="\nsquared output error, method / plain rounding", box=None)
    table.title_justify = "left"
    for column in ("layer", "attention", "mlp"):
        table.add_column(column)
    for layer in layers:
        cells = []
        for half in ("attention", "mlp"):
            ratios = error_ratios_of(layer.get(half))
            cells.append(" ".join(f"{ratio:.2f}" for ratio in ratios) or "-")
        table.add_row(layer["layer"], *cells)
    if layers:
        console.print(table)
    if rows:
        first = rows[0]
        exact = first["float_perplexity"]["value"]
        table = Table(
            title=f"\nheld-out text: {first['tokens']} tokens in {first['samples']} samples, "
            f"float perplexity {exact:.3f}, {human_bytes(first['bytes_bf16'])} in bfloat16",
            title_justify="left", box=None,
        )  # fmt: skip
        for column in ("method", "KL (nats)", "perplexity", "same choice", "size"):
            table.add_column(column)
        for row in rows:
            table.add_row(
                row["method"],
                f"{row['kl']['mean']:.5f} +- {row['kl']['half']:.5f}",
                f"{row['perplexity']['value']:.3f}",
                f"{100 * row['same_choice']['mean']:.1f} %",
                human_bytes(row["bytes"]),
            )
        console.print(table)
