"""What the commands share: consoles, errors, tables, the engine's options."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from framequilt.errors import FramequiltError

if TYPE_CHECKING:
    from framequilt.results import Usage

P = ParamSpec("P")
R = TypeVar("R")

ModelArgument = Annotated[str, typer.Argument(help="Model directory made by convert.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
KvOption = Annotated[
    str | None, typer.Option("--kv", help="KV cache format: kv16, kv8, k8v4, kv4g32+ends16, ...")
]
ActivationsOption = Annotated[
    str | None,
    typer.Option(
        "--activations",
        help="Inputs of linears: a16 (float32), abf16, a8, a6, a4, -asym; a8,head=a8,attention=a8.",
    ),
]
MemoryOption = Annotated[
    str, typer.Option("--memory", help="Memory for KV pages and workspace, as 1GiB or 512MB.")
]
ThreadsOption = Annotated[int, typer.Option("--threads", min=0, help="0: one per core.")]
CostOption = Annotated[
    float | None,
    typer.Option("--cost", help="FrameFusion budget: share of visual tokens kept, as 0.3."),
]
SimilarityOption = Annotated[
    float | None, typer.Option("--similarity", help="FrameFusion: cosine from which tokens merge.")
]
MaxTokensOption = Annotated[int, typer.Option("--max-tokens", help="Longest answer.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
TopPOption = Annotated[float, typer.Option("--top-p")]
TopKOption = Annotated[int, typer.Option("--top-k")]
SeedOption = Annotated[int, typer.Option("--seed")]
FramesOption = Annotated[
    int | None, typer.Option("--frames", help="At most this many frames of the video (64).")
]
FpsOption = Annotated[
    float | None, typer.Option("--fps", help="Frames per second of video to look at.")
]


def out() -> Console:
    """Standard output: answers and tables. Made anew, as tests replace the stream."""
    return Console(highlight=False, soft_wrap=True)


def err() -> Console:
    """Standard error: progress, usage, errors."""
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def show_error(error: FramequiltError) -> None:
    """Code, cause and hint on standard error."""
    console = err()
    console.print(f"[bold red]error[/] [red]{error.code}[/]: ", end="", soft_wrap=True)
    console.print(error.message, markup=False, soft_wrap=True)
    if error.hint:
        console.print("hint: ", style="yellow", end="", soft_wrap=True)
        console.print(error.hint, markup=False, soft_wrap=True)


def guarded(function: Callable[P, R]) -> Callable[P, R]:
    """Turns errors into messages and exit codes."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except FramequiltError as error:
            show_error(error)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            err().print("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            sys.stderr.close()  # the reader left; there is nobody to tell
            raise typer.Exit(1) from None

    return run


def human_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def pairs(title: str, rows: list[tuple[str, str]]) -> Table:
    """A two-column table."""
    table = Table(title=title, show_header=False, title_justify="left", box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def usage_table(usage: Usage) -> Table:
    """What an answer cost, for people."""
    times = usage.timings
    rows = [
        ("prompt", f"{usage.prompt_tokens} rows, {usage.visual_tokens} of them visual"),
        ("answer", f"{usage.completion_tokens} tokens"),
    ]
    if usage.frames_encoded < usage.frames:
        repeats = usage.frames - usage.frames_encoded
        text = f"{usage.frames}, {repeats} of them unchanged and not encoded again"
        rows.append(("frames", text))
    if usage.reduction.stage != "none" and usage.visual_tokens and usage.visual_per_layer:
        kept = usage.visual_per_layer[-1]
        missed = ", budget missed" if usage.reduction.budget_missed else ""
        rows.append(
            (
                "reduction",
                f"{usage.reduction.stage}: {usage.reduction.mean_kept_share:.1%} of visual work, "
                f"{kept} of {usage.visual_tokens} visual rows in the last layer{missed}",
            )
        )
    saved = ""
    if usage.kv_bytes_unreduced > usage.kv_bytes > 0:
        saved = f" ({human_bytes(usage.kv_bytes_unreduced)} without reduction)"
    rows.append(("KV cache", human_bytes(usage.kv_bytes) + saved))
    parts = [("vision", times.vision_ms), ("prefill", times.prefill_ms)]
    parts.append(("decode", times.decode_ms))
    spent = ", ".join(f"{name} {ms / 1000:.2f} s" for name, ms in parts if ms > 0)
    rows.append(("time", f"{times.total_ms / 1000:.2f} s" + (f" ({spent})" if spent else "")))
    if usage.completion_tokens > 1 and times.decode_ms > 0:
        rate = (usage.completion_tokens - 1) / times.decode_ms * 1000
        rows.append(("speed", f"{rate:.1f} tokens/s"))
    return pairs("usage", rows)
