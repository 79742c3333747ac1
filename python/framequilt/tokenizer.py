"""Text to token ids and back, with the tokenizer file that a model directory carries.

Two kinds: `tokenizer.json` (the `tokenizers` library) and SentencePiece `tokenizer.model`. Both
are loaded once, are immutable and may be used from any thread.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from framequilt.errors import CorruptModel, InvalidArgument, NotFound, Unsupported

# User-defined SentencePiece symbols that steer a model; others are ordinary words.
_STEERING = re.compile(
    r"<\|.+\|>|</?(?:s|bos|eos|pad|unk|(?:start|end)_of_\w+|im_\w+|image\w*|video\w*)>|\[/?[A-Z_]+\]"
)


class _Backend(Protocol):
    specials: Mapping[str, int]

    def encode(self, text: str, parse_special: bool) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special: bool) -> str: ...
    def token_text(self, token: int) -> str | None: ...
    def size(self) -> int: ...


class _HuggingFace:
    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Rust

        try:
            self._parsing = Rust.from_file(str(path))
            self._literal = Rust.from_file(str(path))
        except Exception as cause:  # the library raises plain Exception
            raise CorruptModel(f"{path} is not a tokenizer file: {cause}") from cause
        self._literal.encode_special_tokens = True
        added = self._parsing.get_added_tokens_decoder()
        self.specials: Mapping[str, int] = {t.content: i for i, t in added.items() if t.special}
        for rust in (self._parsing, self._literal):
            rust.no_truncation()
            rust.no_padding()

    def encode(self, text: str, parse_special: bool) -> list[int]:
        rust = self._parsing if parse_special else self._literal
        return list(rust.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return str(self._parsing.decode(list(ids), skip_special_tokens=skip_special))

    def token_text(self, token: int) -> str | None:
        text = self._parsing.id_to_token(token)
        return None if text is None else str(text)

    def size(self) -> int:
        return int(self._parsing.get_vocab_size(with_added_tokens=True))


class _SentencePiece:
    def __init__(self, path: Path) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.Load(str(path))
        except (OSError, RuntimeError) as cause:
            raise CorruptModel(f"{path} is not a SentencePiece model: {cause}") from cause
        model = self._model
        pieces = ((model.IdToPiece(i), i) for i in range(model.GetPieceSize()))
        self.specials: Mapping[str, int] = {
            piece: i
            for piece, i in pieces
            if model.IsControl(i) or (_STEERING.fullmatch(piece) and i in model.EncodeAsIds(piece))
        }
        self._ids = frozenset(self.specials.values())
        names = sorted(self.specials, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names))) if names else None

    def encode(self, text: str, parse_special: bool) -> list[int]:
        ids: list[int] = []
        if self._pattern is None:
            return list(self._model.EncodeAsIds(text))
        if not parse_special:
            # The library always recognises user-defined symbols, so they are cut in two.
            at = 0
            for match in self._pattern.finditer(text):
                ids += self._model.EncodeAsIds(text[at : match.start() + 1])
                at = match.start() + 1
            return ids + list(self._model.EncodeAsIds(text[at:]))
        at = 0
        for match in self._pattern.finditer(text):
            if match.start() > at:
                ids += self._model.EncodeAsIds(text[at : match.start()])
            ids.append(self.specials[match.group()])
            at = match.end()
        if at < len(text):
            ids += self._model.EncodeAsIds(text[at:])
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        if skip_special:
            return str(self._model.DecodeIds([i for i in ids if i not in self._ids]))
        parts: list[str] = []
        run: list[int] = []
        for token in ids:
            if token in self._ids:
                parts += [str(self._model.DecodeIds(run)), self._model.IdToPiece(token)]
                run = []
            else:
                run.append(token)
        return "".join([*parts, str(self._model.DecodeIds(run))])

    def token_text(self, token: int) -> str | None:
        if not 0 <= token < self._model.GetPieceSize():
            return None
        return str(self._model.IdToPiece(token))

    def size(self) -> int:
        return int(self._model.GetPieceSize())


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, backend: _Backend) -> None:
        self._backend = backend
        self._size = backend.size()

    @classmethod
    def open(cls, directory: str | os.PathLike[str], record: Mapping[str, Any]) -> Tokenizer:
        """Opens the file that `tokens.tokenizer` of a model's config names.

        Errors: not_found, corrupt_model, unsupported.
        """
        kind, file = record.get("kind"), str(record.get("file"))
        if Path(file).name != file:
            raise CorruptModel(f"tokenizer file {file!r} must be a plain file name")
        path = Path(directory) / file
        if not path.is_file():
            raise NotFound(f"tokenizer file {path} is missing")
        if kind == "huggingface":
            return cls(_HuggingFace(path))
        if kind == "sentencepiece":
            return cls(_SentencePiece(path))
        raise Unsupported(
            f"tokenizer kind {kind!r} is not known", hint="huggingface and sentencepiece are"
        )

    @property
    def specials(self) -> Mapping[str, int]:
        """Spelling of each special token -> id."""
        return self._backend.specials

    def __len__(self) -> int:
        return self._size

    def encode(self, text: str, parse_special: bool = True) -> list[int]:
        """Token ids of a text; no begin-of-sequence token is added.

        Special tokens spelled out in the text become their ids only if `parse_special`.
        """
        if not isinstance(text, str):
            raise InvalidArgument(f"text to encode must be a string, got {type(text)!r}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as cause:
            raise InvalidArgument(f"the text is not valid Unicode: {cause}") from cause
        return self._backend.encode(text, parse_special)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids.

        Models have more rows than their tokenizer has tokens; such ids have no text. A negative
        id is an invalid_argument error.
        """
        for token in ids:
            if token < 0:
                raise InvalidArgument(f"{token} is no token id")
        return self._backend.decode([i for i in ids if i < self._size], skip_special)

    def token_text(self, token: int) -> str | None:
        """The vocabulary's spelling of a token, None if there is no such token."""
        return self._backend.token_text(token)
