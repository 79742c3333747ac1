"""`framequilt chat`: a conversation in the terminal.

Ctrl-C stops the answer that is being made; at the prompt it leaves.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from framequilt.cli import common
from framequilt.cli.ask import frame_progress, reduction_of
from framequilt.cli.common import err, guarded, show_error, usage_table
from framequilt.errors import FramequiltError, InvalidArgument
from framequilt.sampling import Sampling

if TYPE_CHECKING:
    from framequilt.engine import Engine
    from framequilt.reduction import FrameFusion
    from framequilt.results import Usage

_HELP = """\
/video PATH   look at a video with the next question
/image PATH   look at a picture with the next question
/cost SHARE   FrameFusion budget, as 0.3; off for none
/system TEXT  set the system message and start anew
/usage        what the last answer cost
/reset        forget the conversation
/quit         leave"""


class Session:
    """The state of a conversation; prepared media are kept, so that they are decoded once."""

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        reduction: FrameFusion | None,
        system: str | None,
        frames: int | None,
        fps: float | None,
        as_json: bool,
    ) -> None:
        self._engine = engine
        self._sampling = sampling
        self._reduction = reduction
        self._similarity = reduction.similarity_lower_bound if reduction else None
        self._system = system
        self._frames = frames
        self._fps = fps
        self._as_json = as_json
        self._usage: Usage | None = None
        self._messages: list[dict[str, Any]] = []
        self._pending: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Forgets messages and media."""
        self._pending = []
        self._messages = []
        if self._system:
            self._messages.append({"role": "system", "content": self._system})

    def command(self, line: str) -> bool:
        """Carries out a line that begins with a slash; False means leave."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        console = err()
        if name in ("/quit", "/exit"):
            return False
        if name == "/reset":
            self.reset()
            console.print("forgotten", style="dim")
        elif name == "/help":
            console.print(_HELP, markup=False)
        elif name == "/usage":
            console.print("no answer yet" if self._usage is None else usage_table(self._usage))
        elif name == "/video":
            self._add_video(argument)
        elif name == "/image":
            self._add_image(argument)
        elif name == "/cost":
            self._set_cost(argument)
        elif name == "/system":
            self._system = argument or None
            self.reset()
        else:
            raise InvalidArgument(f"unknown command {name}", hint="/help lists them")
        return True

    def _set_cost(self, argument: str) -> None:
        if argument in ("", "off", "none"):
            self._reduction = None
            return
        try:
            cost = float(argument)
        except ValueError as cause:
            raise InvalidArgument(f"{argument!r} is no share", hint="/cost 0.3") from cause
        self._reduction = reduction_of(cost, self._similarity)

    def _add_video(self, path: str) -> None:
        preprocessor = self._engine.preprocessor
        if preprocessor is None:
            raise InvalidArgument("this model reads text only")
        with frame_progress(not self._as_json) as progress:
            clip = preprocessor.video(path, frames=self._frames, fps=self._fps, progress=progress)
        self._pending.append({"type": "video", "video": clip})
        err().print(f"{len(clip)} frames of {clip.duration:.1f} s", style="dim")

    def _add_image(self, path: str) -> None:
        from framequilt.vision import load_image

        if self._engine.preprocessor is None:
            raise InvalidArgument("this model reads text only")
        pixels = load_image(path)
        self._pending.append({"type": "image", "image": pixels})
        err().print(f"{pixels.shape[1]} x {pixels.shape[0]} pixels", style="dim")

    def answer(self, question: str) -> None:
        """Asks and streams; Ctrl-C keeps what was said so far."""
        content: Any = question
        if self._pending:
            content = [*self._pending, {"type": "text", "text": question}]
        messages = [*self._messages, {"role": "user", "content": content}]
        stopped = False
        with self._engine.stream(
            messages, sampling=self._sampling, reduction=self._reduction
        ) as stream:
            try:
                for piece in stream:
                    if not self._as_json:
                        sys.stdout.write(piece.text)
                        sys.stdout.flush()
            except KeyboardInterrupt:
                stopped = True
                stream.cancel()
            result = None
            with contextlib.suppress(KeyboardInterrupt):
                result = stream.result()  # when stopped: at the engine's next layer
            text = stream.text
        self._messages = [*messages, {"role": "assistant", "content": text}]
        self._pending = []
        self._usage = result.usage if result is not None else self._usage
        if self._as_json:
            record = {"text": text, "finish_reason": "cancelled"} if result is None else (
                result.to_dict()
            )  # fmt: skip
            print(json.dumps(record, ensure_ascii=False), flush=True)
            return
        sys.stdout.write("\n")
        sys.stdout.flush()
        if stopped:
            err().print("stopped", style="dim")


def _lines() -> Any:
    """Lines of the user until the end of input; a prompt where there is a person."""
    prompt = ""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (editing and history for input())
        prompt = "> "
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            err().print()
            return


@guarded
def command(
    model: common.ModelArgument,
    video: Annotated[str | None, typer.Option("--video", help="Look at it first.")] = None,
    image: Annotated[list[str] | None, typer.Option("--image", help="A picture; repeat.")] = None,
    frames: common.FramesOption = None,
    fps: common.FpsOption = None,
    cost: common.CostOption = None,
    similarity: common.SimilarityOption = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    kv: common.KvOption = None,
    activations: common.ActivationsOption = None,
    memory: common.MemoryOption = "1GiB",
    threads: common.ThreadsOption = 0,
    max_tokens: common.MaxTokensOption = 512,
    temperature: common.TemperatureOption = 0.0,
    top_p: common.TopPOption = 1.0,
    top_k: common.TopKOption = 0,
    seed: common.SeedOption = 0,
    as_json: common.JsonOption = False,
) -> None:
    """Talk with a model about videos and pictures. With --json, one line of JSON per answer."""
    from framequilt.engine import Engine

    sampling = Sampling(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    with Engine(model, kv=kv, activations=activations, memory=memory, threads=threads) as engine:
        session = Session(
            engine, sampling, reduction_of(cost, similarity), system, frames, fps, as_json
        )
        if sys.stdin.isatty():
            err().print("/help lists the commands, /quit leaves", style="dim")
        for path in image or ():
            session.command(f"/image {path}")
        if video is not None:
            session.command(f"/video {video}")
        for line in _lines():
            line = line.strip()
            try:
                if line.startswith("/"):
                    if not session.command(line):
                        break
                elif line:
                    session.answer(line)
            except FramequiltError as error:  # said, and the conversation goes on
                show_error(error)
