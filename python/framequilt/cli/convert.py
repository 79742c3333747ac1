"""`framequilt convert`: a checkpoint becomes a model directory."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from framequilt.cli.common import JsonOption, err, guarded, human_bytes, out, pairs, print_json
from framequilt.errors import InvalidArgument


def _list_presets(wanted: bool) -> None:
    """Prints the presets and ends the program."""
    if not wanted:
        return
    from framequilt.convert.presets import PRESETS

    table = Table(box=None)
    for column in ("preset", "weights", "activations", "KV", "what it is"):
        table.add_column(column, overflow="fold")
    for preset in PRESETS.values():
        table.add_row(preset.name, preset.weights, preset.activations, preset.kv, preset.about)
    out().print(table)
    raise typer.Exit


@guarded
def command(
    source: Annotated[str, typer.Argument(help="Checkpoint: Hugging Face directory or .gguf.")],
    destination: Annotated[str, typer.Argument(help="Model directory to make; must not exist.")],
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="Weights, activations and KV format that go together."),
    ] = None,
    list_presets: Annotated[
        bool,
        typer.Option(
            "--list-presets", is_eager=True, callback=_list_presets, help="Say what there is."
        ),
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            help="Weight format, and others for some slots: w4g128,lm_head=w8,vision.*=bf16. "
            "'keep' leaves the codes of a quantized checkpoint as they are. "
            "\\[default: w4g128, or keep]",
        ),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            "--activations",
            help="What inputs of linears become, in the same grammar: a16 (float32), abf16 "
            "(rounded to bfloat16), or quantized: a8, a6, a4, a8-asym, a6-asym, a4-asym; "
            "attention=a8 is for the vision tower's queries and keys. "
            "\\[default: a16, or what the checkpoint says]",
        ),
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option("--kv", help="The model's default KV format. \\[default: kv8]"),
    ] = None,
    weight_range: Annotated[
        str,
        typer.Option("--range", help="Range of a group: include_zero or reference."),
    ] = "include_zero",
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Directory to take the tokenizer from.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The model's name.")] = None,
    similarity: Annotated[
        float | None,
        typer.Option("--similarity", help="The model's FrameFusion threshold."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be made, write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize a checkpoint into a model directory."""
    from framequilt import convert as converter
    from framequilt.quantize.rtn import RANGES

    if weight_range not in RANGES:
        raise InvalidArgument(f"unknown range {weight_range!r}", f"known: {', '.join(RANGES)}")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    console = err()
    # Rich ends a bar with an empty line where nobody watches it, as in logs.
    silent = as_json or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=silent) as bar:
        task = bar.add_task("converting", total=None)

        def show(step: converter.Progress) -> None:
            bar.update(
                task,
                completed=step.done_bytes,
                total=step.total_bytes,
                description=step.slot[-40:].rjust(40),
            )

        report = converter.convert(
            source,
            destination,
            preset=preset,
            weights=weights,
            activations=activations,
            kv=kv,
            range_=weight_range,
            tokenizer=tokenizer,
            name=name,
            similarity_lower_bound=similarity,
            dry_run=dry_run,
            progress=show,
        )
    if as_json:
        print_json(report.to_json())
        return
    console = out()
    made = str(report.destination) if report.written else "nothing (dry run)"
    rows = [
        ("written", made),
        ("family", report.family),
        ("weights", f"{report.weights}, {report.effective_bits:.2f} bits per weight"),
        ("activations", report.activations),
        ("parameters", f"{report.parameters:,} in {len(report.linears)} linears"),
        ("size", f"{human_bytes(report.total_bytes)} from {human_bytes(report.source_bytes)}"),
        ("KV default", report.kv),
        ("time", f"{report.seconds:.1f} s"),
    ]
    if report.left_out:
        rows.append(("left out", f"{len(report.left_out)} tensors"))
    rows += [("note", note) for note in report.notes]
    console.print(pairs("conversion", rows))
    table = Table(title="\nparts", title_justify="left", box=None)
    for column in ("part", "linears", "parameters", "size", "bits", "error"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in report.parts():
        table.add_row(
            part.part,
            str(part.linears),
            f"{part.parameters:,}",
            human_bytes(part.bytes),
            f"{part.effective_bits:.2f}",
            "-" if part.relative_error is None else f"{part.relative_error:.4f}",
        )
    console.print(table)
    worst = report.worst()
    if worst:
        table = Table(title="\nlargest relative errors", title_justify="left", box=None)
        for column in ("slot", "format", "shape", "error"):
            table.add_column(column)
        for entry in worst:
            error = f"{entry.relative_error or 0.0:.4f}"
            table.add_row(entry.slot, entry.format, f"{entry.out} x {entry.inputs}", error)
        console.print(table)
