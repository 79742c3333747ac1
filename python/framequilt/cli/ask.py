"""`framequilt ask`: one question, one answer, streamed as it is made."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from framequilt.cli import common
from framequilt.cli.common import err, guarded, print_json, usage_table
from framequilt.errors import InvalidArgument
from framequilt.reduction import FrameFusion
from framequilt.sampling import Sampling


@contextlib.contextmanager
def frame_progress(shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error that follows the decoding of frames."""
    console = err()
    if not shown or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("reading video"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("frames", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def reduction_of(cost: float | None, similarity: float | None) -> FrameFusion | None:
    """The reduction that `--cost` and `--similarity` ask for."""
    if cost is None:
        if similarity is not None:
            raise InvalidArgument("--similarity needs --cost", hint="--cost 0.3")
        return None
    return FrameFusion(cost=cost, similarity_lower_bound=similarity)


@guarded
def command(
    model: common.ModelArgument,
    question: Annotated[str, typer.Argument(help="The question; - reads standard input.")],
    video: Annotated[str | None, typer.Option("--video", help="A video file.")] = None,
    image: Annotated[list[str] | None, typer.Option("--image", help="A picture; repeat.")] = None,
    frames: common.FramesOption = None,
    fps: common.FpsOption = None,
    at: Annotated[
        list[float] | None, typer.Option("--at", help="A time in seconds to look at; repeat.")
    ] = None,
    cost: common.CostOption = None,
    similarity: common.SimilarityOption = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The question is the whole prompt.")] = False,
    kv: common.KvOption = None,
    activations: common.ActivationsOption = None,
    memory: common.MemoryOption = "1GiB",
    threads: common.ThreadsOption = 0,
    max_tokens: common.MaxTokensOption = 256,
    temperature: common.TemperatureOption = 0.0,
    top_p: common.TopPOption = 1.0,
    top_k: common.TopKOption = 0,
    seed: common.SeedOption = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Ends the answer.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="The answer alone.")] = False,
    as_json: common.JsonOption = False,
) -> None:
    """Ask one question about a video, pictures or nothing but the text."""
    from framequilt.engine import Engine
    from framequilt.request import Request

    if question == "-":
        question = sys.stdin.read()
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop or (),
    )
    reduction = reduction_of(cost, similarity)
    talkative = not (quiet or as_json)
    with Engine(model, kv=kv, activations=activations, memory=memory, threads=threads) as engine:
        with frame_progress(talkative) as progress:
            request = Request(
                question,
                system=system,
                video=video,
                images=image or (),
                frames=frames,
                fps=fps,
                timestamps=at,
                reduction=reduction,
                sampling=sampling,
                raw=raw,
                progress=progress,
            )
            stream = engine.submit(request)
        with stream:
            if not as_json:
                for piece in stream:
                    sys.stdout.write(piece.text)
                    sys.stdout.flush()
                sys.stdout.write("\n")
                sys.stdout.flush()
            result = stream.result()
    if as_json:
        print_json(result.to_dict())
    elif talkative:
        err().print(usage_table(result.usage))
