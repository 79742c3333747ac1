"""What a model is calibrated and measured on: token ids, with frames between them.

A text is cut into samples of equal length, spread evenly over it. A model's own prompts come as
conversations: its chat template is applied as in the engine, and frames stand where its placeholder
was. Any thread.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framequilt.convert.tokens import Tokens
from framequilt.errors import InvalidArgument, IoError
from framequilt.quantize.calibration.checkpoint import Checkpoint

Ids = NDArray[np.int64]
Pixels = NDArray[np.float32]  # [frames, channels, size, size], normalised


@dataclass(frozen=True)
class Sample:
    """One sequence: runs of token ids (1-d) and videos (4-d), in order.

    `scored` is the number of tokens at the end whose prediction is measured; 0 means all. The rest
    is context. `answer` says how many of those are an answer, where there is one.
    """

    parts: tuple[NDArray[Any], ...]
    scored: int = 0
    answer: int = 0

    @property
    def videos(self) -> list[Pixels]:
        """The videos, in order."""
        return [part for part in self.parts if part.ndim == 4]


def digest(samples: Sequence[Sample]) -> str:
    """SHA-256 over all samples."""
    total = hashlib.sha256()
    for sample in samples:
        total.update(f"sample {sample.scored} {len(sample.parts)}".encode())
        for part in sample.parts:
            total.update(f"{part.dtype} {part.shape}".encode())
            total.update(np.ascontiguousarray(part).tobytes())
    return total.hexdigest()


class TextCodec:
    """Text to ids with a checkpoint's tokenizer."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, tokens: Tokens | None = None) -> None:
        """`folder` takes the tokenizer's file, which the tokenizer libraries read from a path;
        `tokens` is another tokenizer than the checkpoint's own."""
        from framequilt.tokenizer import Tokenizer

        tokens = tokens or checkpoint.tokens()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / tokens.file).write_bytes(tokens.content)
        self.tokenizer = Tokenizer.open(folder, {"kind": tokens.kind, "file": tokens.file})
        self.start: list[int] = []
        if tokens.add_bos and tokens.bos is not None:
            self.start = [tokens.bos]
        self._tokens = tokens
        self._media = checkpoint.description.media
        self._template = tokens.chat_template
        for old, new in checkpoint.description.template_changes.items():
            self._template = self._template and self._template.replace(old, new)

    def ids(self, text: str) -> Ids:
        """Ids of plain text; special tokens in it are ordinary text."""
        return np.array(self.tokenizer.encode(text, parse_special=False), np.int64)

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        videos: Sequence[Pixels],
        answer: str = "",
        notes: Mapping[int, str] | None = None,
    ) -> Sample:
        """A conversation as the engine would encode it; frames of the media parts in order.

        `answer` follows as plain text, and is then what is scored; `notes` are what
        `ChatTemplate.encode` takes. Errors: InvalidArgument.
        """
        from framequilt.chat import MEDIA_TOKEN, ChatTemplate, parse_messages

        tokens = self._tokens
        template = ChatTemplate(
            self.tokenizer, self._template, media=self._media, bos=tokens.bos,
            add_bos=tokens.add_bos, eos=tokens.eos,
        )  # fmt: skip
        ids = template.encode(parse_messages(messages), notes=notes)
        parts: list[NDArray[Any]] = []
        run: list[int] = []
        left = list(videos)
        for token in ids:
            if token != MEDIA_TOKEN:
                run.append(token)
                continue
            if not left:
                raise InvalidArgument("the prompt has more media than frames were given for")
            parts += [np.array(run, np.int64), left.pop(0)]
            run = []
        tail = list(self.ids(answer)) if answer else []
        end = self._tokens.eos[:1] if answer else []
        parts.append(np.array([*run, *tail, *end], np.int64))
        count = len(tail) + len(end)
        return Sample(tuple(parts), scored=count, answer=count)


def text_samples(text: str, codec: TextCodec, count: int, length: int) -> list[Sample]:
    """`count` samples of `length` tokens, evenly spread over a text and not overlapping.

    A start token, where the model wants one, is one of them. Errors: InvalidArgument for a text
    that is too short.
    """
    ids = codec.ids(text)
    body = length - len(codec.start)
    if count < 1 or body < 2:
        raise InvalidArgument(f"{count} samples of {length} tokens")
    if len(ids) < count * body:
        raise InvalidArgument(
            f"the text has {len(ids)} tokens, {count} samples of {length} need {count * body}",
            "give more text, or ask for fewer or shorter samples",
        )
    starts = np.linspace(0, len(ids) - body, count).astype(int)
    start = np.array(codec.start, np.int64)
    return [Sample((np.concatenate([start, ids[at : at + body]]),)) for at in starts]


def read_text(paths: Sequence[str | os.PathLike[str]]) -> str:
    """Text files one after the other. Errors: IoError, InvalidArgument for what is not UTF-8."""
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise IoError(f"{path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"{path} is no UTF-8 text") from error
    return "\n".join(texts)


def prompt_samples(
    path: str | os.PathLike[str], checkpoint: Checkpoint, codec: TextCodec, frames: int
) -> list[Sample]:
    """A model's own prompts, from a file with one JSON object per line.

    Keys: `prompt`; and if wanted `video` or `image` (a path, beside the file if it is relative),
    `answer`. At most `frames` frames of a video are taken; an image is a video of one frame.
    Errors: InvalidArgument, which names the line; those of the files.
    """
    samples = []
    for number, line in enumerate(read_text([path]).splitlines(), 1):
        if not line.strip():
            continue
        try:
            samples.append(_prompt_sample(json.loads(line), Path(path), checkpoint, codec, frames))
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidArgument(f"{path}:{number}: {error}"[:300]) from error
        except InvalidArgument as error:
            raise InvalidArgument(f"{path}:{number}: {error.message}", error.hint) from error
    return samples


def _prompt_sample(
    record: Any, file: Path, checkpoint: Checkpoint, codec: TextCodec, frames: int
) -> Sample:
    known = {"prompt", "video", "image", "answer"}
    if not isinstance(record, dict) or not set(record) <= known or "prompt" not in record:
        raise InvalidArgument(
            "not an object with a prompt", "known keys: " + ", ".join(sorted(known))
        )
    if any(not isinstance(value, str) for value in record.values()):
        raise InvalidArgument("every value has to be a text")
    text = {"type": "text", "text": record["prompt"]}
    kind = next((kind for kind in ("video", "image") if kind in record), None)
    answer = record.get("answer", "")
    if kind is None:
        return codec.prompt([{"role": "user", "content": [text]}], [], answer)
    vision = checkpoint.model.vision
    if vision is None:
        raise InvalidArgument("the model sees no pictures")
    from framequilt.chat import time_instruction
    from framequilt.vision import Preprocessor

    preprocessor = Preprocessor.from_record(checkpoint.description.preprocessor, vision.patch)
    source = file.parent / record[kind]
    notes = None
    if kind == "video":
        clip = preprocessor.video(source, frames=frames)
        pixels = clip.images
        if preprocessor.time_instruction:
            notes = {0: time_instruction(clip.duration, clip.times)}
    else:
        from framequilt.vision.processors import load_image

        pixels = preprocessor.frame(load_image(source))[None]
    content = [{"type": kind, kind: str(source)}, text]
    frames_array = np.ascontiguousarray(pixels, np.float32)
    return codec.prompt([{"role": "user", "content": content}], [frames_array], answer, notes)
