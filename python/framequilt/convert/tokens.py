"""Tokenizer files, special token ids and the chat template of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from framequilt.convert.sources import Source
from framequilt.errors import CorruptModel, NotFound


@dataclass(frozen=True)
class Tokens:
    """What config.json says about tokens, and the files beside it."""

    bos: int | None
    add_bos: bool
    eos: list[int]
    kind: str  # "huggingface" or "sentencepiece"
    file: str
    content: bytes
    chat_template: str | None

    def to_json(self, media: str) -> dict[str, Any]:
        """The `tokens` block of config.json."""
        return {
            "bos": self.bos,
            "add_bos": self.add_bos,
            "eos": self.eos,
            "media": media,
            "tokenizer": {"kind": self.kind, "file": self.file},
        }


class _Vocabulary:
    """Ids by token text, and whether encoding starts with a token of its own accord."""

    def __init__(self, kind: str, content: bytes, where: str) -> None:
        try:
            if kind == "huggingface":
                from tokenizers import Tokenizer

                fast = Tokenizer.from_buffer(content)
                table = fast.get_vocab(with_added_tokens=True)
                self.size = max(table.values(), default=-1) + 1
                self.id_of: Callable[[str], int | None] = lambda text: fast.token_to_id(text)
                bare = fast.encode("a", add_special_tokens=False).ids
                full = fast.encode("a", add_special_tokens=True).ids
                self.first = full[0] if len(full) > len(bare) and full[:1] != bare[:1] else None
            else:
                from sentencepiece import SentencePieceProcessor

                pieces = SentencePieceProcessor(model_proto=content)
                self.size = pieces.get_piece_size()
                unknown = pieces.unk_id()
                self.id_of = lambda text: (
                    None
                    if (found := pieces.piece_to_id(text)) == unknown and text != "<unk>"
                    else found
                )
                # The file does not say; every model that ships one was trained with a start token.
                self.first = pieces.bos_id() if pieces.bos_id() >= 0 else None
        except Exception as error:  # the two libraries raise anything, down to plain Exception
            raise CorruptModel(f"{where} cannot be read: {error}"[:300]) from error


def read_tokens(
    source: Source, text_config: dict[str, Any], vocab: int, tokenizer: Source | None = None
) -> Tokens:
    """Reads them from `tokenizer` (default: the checkpoint itself).

    End tokens are the union of generation_config.json, the config and the tokenizer's own. Errors:
    NotFound without a tokenizer, CorruptModel for ids outside of the vocabulary.
    """
    files = tokenizer or source
    for file in ("tokenizer.json", "tokenizer.model"):
        content = files.read(file)
        if content is not None:
            kind = "huggingface" if file == "tokenizer.json" else "sentencepiece"
            break
    else:
        raise NotFound(
            f"{files.path.name} has neither tokenizer.json nor tokenizer.model",
            "copy the tokenizer of the model beside its config.json",
        )
    where = f"{files.path.name}: {file}"
    vocabulary = _Vocabulary(kind, content, where)
    if vocabulary.size > vocab:
        raise CorruptModel(
            f"{where} has {vocabulary.size} tokens, the model's embedding {vocab}",
            "the tokenizer belongs to another model",
        )
    settings = files.json("tokenizer_config.json")
    generation = source.json("generation_config.json")

    def named(key: str) -> list[int]:
        value = settings.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        found = vocabulary.id_of(text) if isinstance(text, str) else None
        return [] if found is None else [found]

    places = (generation, text_config, source.config)
    eos = [n for place in places for n in _ids(place, "eos_token_id")] + named("eos_token")
    bos = named("bos_token") + [n for place in places for n in _ids(place, "bos_token_id")]
    for number in eos + bos:
        if not 0 <= number < vocab:
            raise CorruptModel(f"{source.path.name}: special token {number} of {vocab}")
    first_bos = bos[0] if bos else None
    add_bos = settings.get("add_bos_token")
    if not isinstance(add_bos, bool):
        add_bos = vocabulary.first is not None and vocabulary.first == first_bos
    return Tokens(
        bos=first_bos,
        add_bos=add_bos and first_bos is not None,
        eos=list(dict.fromkeys(eos)),
        kind=kind,
        file=file,
        content=content,
        chat_template=_chat_template(files, settings),
    )


def _ids(place: dict[str, Any], key: str) -> list[int]:
    value = place.get(key)
    listed = value if isinstance(value, list) else [value]
    return [number for number in listed if type(number) is int]


def _chat_template(source: Source, settings: dict[str, Any]) -> str | None:
    """From chat_template.jinja, chat_template.json or tokenizer_config.json, in this order."""
    content = source.read("chat_template.jinja")
    if content is not None:
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise CorruptModel(f"{source.path.name}: chat_template.jinja is no UTF-8") from error
    value = source.json("chat_template.json").get("chat_template", settings.get("chat_template"))
    if isinstance(value, list):  # several, by name
        named = {e.get("name"): e.get("template") for e in value if isinstance(e, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
