"""The tokenizer inside a GGUF file, as the files that tokenizer libraries read.

`gpt2` vocabularies (byte-level BPE) become tokenizer.json; GGUF names the pre-tokenizer only, so
the patterns are here. `llama` vocabularies (SentencePiece pieces with scores) become
tokenizer.model, a protocol buffer of which a few fields are enough.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from framequilt.errors import CorruptModel, Unsupported

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6


def _split(pattern: str) -> list[dict[str, Any]]:
    """Isolates the matches of a pattern, then maps bytes to characters."""
    return [
        {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        },
        _byte_level(use_regex=False),
    ]


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = [_byte_level(use_regex=True)]

# tokenizer.ggml.pre -> the pre-tokenizers that the model was trained with.
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": _GPT2,
    "default": _GPT2,  # written by old converters, for GPT-2 vocabularies
    "smollm": [{"type": "Digits", "individual_digits": True}, *_GPT2],
    "qwen2": _split(_WORDS + r"\p{N}" + _REST),
    "llama-bpe": _split(_WORDS + r"\p{N}{1,3}" + _REST),
}


def tokenizer_files(metadata: dict[str, Any], where: str) -> dict[str, bytes]:
    """tokenizer.json or tokenizer.model, and tokenizer_config.json, by name.

    Errors: CorruptModel, Unsupported.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or len(set(tokens)) != len(tokens):
        raise CorruptModel(f"{where}: tokenizer.ggml.tokens is no list of different texts")
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        types = [1] * len(tokens)
    if len(types) != len(tokens):
        raise CorruptModel(f"{where}: {len(types)} token types for {len(tokens)} tokens")
    files: dict[str, bytes] = {}
    if kind == "gpt2":
        files["tokenizer.json"] = _byte_level_bpe(metadata, tokens, types, where)
    elif kind == "llama":
        files["tokenizer.model"] = _sentencepiece(metadata, tokens, types, where)
    else:
        raise Unsupported(f"{where}: tokenizer {kind!r}", "known: gpt2, llama")
    settings: dict[str, Any] = {}
    for name in ("bos", "eos", "unknown", "padding"):
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if type(number) is int and 0 <= number < len(tokens):
            settings[{"unknown": "unk", "padding": "pad"}.get(name, name) + "_token"] = tokens[
                number
            ]
    starts = kind == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    settings["add_bos_token"] = bool(metadata.get("tokenizer.ggml.add_bos_token", starts))
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    files["tokenizer_config.json"] = json.dumps(settings).encode()
    return files


def _byte_level_bpe(metadata: dict[str, Any], tokens: list[str], types: Any, where: str) -> bytes:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise CorruptModel(f"{where}: tokenizer.ggml.merges is missing")
    pairs = [merge.split(" ") for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise CorruptModel(f"{where}: a merge is no pair of tokens")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise Unsupported(f"{where}: pre-tokenizer {pre!r}", f"known: {known}")
    added = [
        {
            "id": number,
            "content": tokens[number],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": int(kind) == _CONTROL,
        }
        for number, kind in enumerate(types)
        if int(kind) in (_CONTROL, _USER_DEFINED)
    ]
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": None,
        "decoder": {**_byte_level(use_regex=True), "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": pairs,
        },
    }
    return json.dumps(document, ensure_ascii=False).encode()


def _varint(value: int) -> bytes:
    value &= 2**64 - 1  # negative numbers travel as 64 bits
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: int | float | bytes) -> bytes:
    """One protocol buffer field: varint, float32 or length-delimited by the value's type."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], types: Any, where: str) -> bytes:
    """A SentencePiece ModelProto: pieces (1), trainer spec (2), normalizer spec (3)."""
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise CorruptModel(f"{where}: tokenizer.ggml.scores does not fit the tokens")
    pieces = b"".join(
        _field(1, _field(1, token.encode()) + _field(2, float(score)) + _field(3, int(kind)))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    has_bytes = any(int(kind) == _BYTE for kind in types)
    trainer = _field(3, 2) + _field(4, len(tokens)) + _field(35, int(has_bytes))  # model type: BPE
    for number, name in ((40, "unknown"), (41, "bos"), (42, "eos"), (43, "padding")):
        value = metadata.get(f"tokenizer.ggml.{name}_token_id", -1)
        if name == "unknown" and value == -1:
            value = next((n for n, kind in enumerate(types) if int(kind) == _UNKNOWN), -1)
        trainer += _field(number, int(value))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    normalizer = _field(1, b"identity") + _field(3, int(bool(prefix))) + _field(4, 0) + _field(5, 1)
    return pieces + _field(2, trainer) + _field(3, normalizer)
