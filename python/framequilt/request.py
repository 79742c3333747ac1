"""What is asked of an engine: prompt, media and how to answer. Pure data; any thread."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

from framequilt.chat import Conversation, MediaPart, parse_messages
from framequilt.errors import InvalidArgument
from framequilt.reduction import FrameFusion
from framequilt.sampling import Sampling

if TYPE_CHECKING:
    from framequilt.vision.frames import VideoSource
    from framequilt.vision.processors import ImageSource

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_bytes(size: int | str) -> int:
    """Bytes of a size: 1073741824, "1GiB", "512 MB", "1.5G".

    KB, MB, GB, TB are powers of 1000; KiB, MiB, GiB, TiB and the bare letters powers of 1024.
    Errors: invalid_argument.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise InvalidArgument(f"a size is a number of bytes or a string as '1GiB', got {size!r}")
    if isinstance(size, int):
        value = float(size)
    else:
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([kmgt]?)(i?b)?\s*", size.lower())
        if match is None or (match[3] == "ib" and not match[2]):
            raise InvalidArgument(f"cannot read {size!r} as a size", hint="512MB, 2GiB or bytes")
        unit = _UNITS[match[2]]
        if match[3] == "b" and match[2]:
            unit = 1000 ** ("kmgt".index(match[2]) + 1)
        value = float(match[1]) * unit
    if not 1 <= value < 2**63:
        raise InvalidArgument(f"a size must be at least one byte, got {size!r}")
    return int(value)


class RequestOptions(TypedDict, total=False):
    """Keyword arguments of `Engine.generate` and `Engine.stream`; see `Request`."""

    system: str | None
    image: ImageSource | None
    images: Sequence[ImageSource]
    video: VideoSource | None
    frames: int | None
    fps: float | None
    timestamps: Sequence[float] | None
    policy: str
    reduction: FrameFusion | Mapping[str, Any] | float | None
    sampling: Sampling | Mapping[str, Any] | None
    max_tokens: int | None
    temperature: float | None
    raw: bool
    tools: Sequence[Mapping[str, Any]] | None
    template_variables: Mapping[str, Any] | None
    time_instruction: bool | None
    return_logits: bool
    return_prompt_logits: bool
    progress: Callable[[int, int], None] | None


@dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
        prompt: a question; messages in OpenAI's form (see `framequilt.chat.parse_messages`); or
            token ids with -1 where media go.
        system: system message put in front; not with messages that have one.
        image, images: pictures, in front of the question. Paths, bytes, PIL images or arrays.
        video: a clip, in front of the question: path, bytes, file, or frames.
        frames, fps, timestamps, policy: which frames, see `framequilt.vision.load_frames`.
        reduction: None, a `FrameFusion`, a dict of its fields, or just a cost such as 0.3.
        sampling: `Sampling` or a dict of its fields. `max_tokens` and `temperature` override it.
        raw: the prompt string is complete: no chat template; special tokens in it count, and
            each media placeholder in it takes one item, images first, then the video.
        tools, template_variables: passed to the chat template.
        time_instruction: tell the model the clip's length and frame times; None: if it was
            trained with that.
        return_logits: keep float32 logits of every generated token.
        return_prompt_logits: and of all prompt rows; not together with a reduction.
        progress: called as progress(done, total) while frames are decoded.
    """

    prompt: str | Sequence[Mapping[str, Any]] | Sequence[int]
    system: str | None = None
    image: ImageSource | None = None
    images: Sequence[ImageSource] = ()
    video: VideoSource | None = None
    frames: int | None = None
    fps: float | None = None
    timestamps: Sequence[float] | None = None
    policy: str = "fps"
    reduction: FrameFusion | Mapping[str, Any] | float | None = None
    sampling: Sampling | Mapping[str, Any] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    raw: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    template_variables: Mapping[str, Any] | None = None
    time_instruction: bool | None = None
    return_logits: bool = False
    return_prompt_logits: bool = False
    progress: Callable[[int, int], None] | None = None

    def media_parts(self) -> list[MediaPart]:
        """The media given beside the prompt: pictures, then the clip."""
        pictures = [*([] if self.image is None else [self.image]), *self.images]
        parts = [MediaPart("image", picture, {}) for picture in pictures]
        options = {
            k: v
            for k, v in (
                ("frames", self.frames),
                ("fps", self.fps),
                ("timestamps", self.timestamps),
                ("policy", self.policy if self.policy != "fps" else None),
            )
            if v is not None
        }
        if self.video is not None:
            parts.append(MediaPart("video", self.video, options))
        elif options:
            raise InvalidArgument(f"{', '.join(options)} given, but no video")
        return parts

    def sampling_parameters(self) -> Sampling:
        """`sampling` with the overrides applied."""
        chosen = Sampling.of(self.sampling)
        overrides: dict[str, Any] = {
            k: v
            for k, v in (("max_tokens", self.max_tokens), ("temperature", self.temperature))
            if v is not None
        }
        return replace(chosen, **overrides) if overrides else chosen


def conversation_of(request: Request, media: Sequence[MediaPart]) -> Conversation:
    """Messages of a request, with the media given beside them in front of the last question."""
    prompt = request.prompt
    messages: list[Mapping[str, Any]]
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    else:
        messages = list(prompt)  # type: ignore[arg-type]
    if request.system is not None:
        if messages and isinstance(messages[0], Mapping) and messages[0].get("role") == "system":
            raise InvalidArgument("system= is given, and the messages begin with a system message")
        messages.insert(0, {"role": "system", "content": request.system})
    if media:
        users = [
            i for i, m in enumerate(messages) if isinstance(m, Mapping) and m.get("role") == "user"
        ]
        if not users:
            raise InvalidArgument("media are given, but no message has the role user")
        last = messages[users[-1]]
        content = last.get("content", "")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        fresh = [{"type": m.kind, m.kind: m.source, **m.options} for m in media]
        messages[users[-1]] = {**last, "content": [*fresh, *parts]}
    return parse_messages(messages)
