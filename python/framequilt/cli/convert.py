"""`framequilt convert`: a checkpoint becomes a model directory."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from framequilt.cli.common import JsonOption, err, guarded, human_bytes, out, pairs, print_json
from framequilt.errors import InvalidArgument


@guarded
def command(
    source: Annotated[str, typer.Argument(help="Checkpoint: Hugging Face directory or .gguf.")],
    destination: Annotated[str, typer.Argument(help="Model directory to make; must not exist.")],
    weights: Annotated[
        str, typer.Option("--weights", help="Weight format: f32, bf16, w8, w8g128, w4g128, ...")
    ] = "w4g128",
    kv: Annotated[str, typer.Option("--kv", help="The model's default KV format.")] = "kv8",
    override: Annotated[
        list[str] | None,
        typer.Option("--override", help="Another format for some slots, as 'vision.*=w8'."),
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

    overrides = {}
    for pair in override or ():
        pattern, equals, form = pair.partition("=")
        if not equals or not pattern or not form:
            raise InvalidArgument(f"--override {pair!r} is not PATTERN=FORMAT")
        overrides[pattern] = form
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
            weights=weights,
            kv=kv,
            overrides=overrides or None,
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
        ("parameters", f"{report.parameters:,} in {len(report.linears)} linears"),
        ("size", f"{human_bytes(report.total_bytes)} from {human_bytes(report.source_bytes)}"),
        ("KV default", report.kv),
        ("time", f"{report.seconds:.1f} s"),
    ]
    if report.left_out:
        rows.append(("left out", f"{len(report.left_out)} tensors"))
    rows += [("note", note) for note in report.notes]
    console.print(pairs("conversion", rows))
    worst = report.worst()
    if worst:
        table = Table(title="largest relative errors", title_justify="left", box=None)
        for column in ("slot", "format", "shape", "error"):
            table.add_column(column)
        for entry in worst:
            error = f"{entry.relative_error or 0.0:.4f}"
            table.add_row(entry.slot, entry.format, f"{entry.out} x {entry.inputs}", error)
        console.print(table)
