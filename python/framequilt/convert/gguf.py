"""GGUF files (versions 2 and 3, little endian) as converter sources.

The container is parsed here, because such files come from anywhere: every length is checked against
what is left of the file before it is used. Quantized blocks are codes (importers/gguf_blocks.py).
Names and config keys are translated to the Hugging Face spelling, so that the families see one
layout only.

Memory: the file stays mapped as long as a tensor of it is held. Any thread.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framequilt.convert.coded import CodedTensor
from framequilt.convert.gguf_tokenizer import tokenizer_files
from framequilt.convert.importers.gguf_blocks import BLOCK_KINDS, decode
from framequilt.convert.sources import Source, SourceTensor
from framequilt.errors import CorruptModel, IoError, Unsupported
from framequilt.quantize import Quantized, dequantize, from_bf16

MAX_HEADER_ENTRIES = 2**24
MAX_DIMENSIONS = 4

# Type number -> name, values per block, bytes per block.
_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    30: ("BF16", 1, 2),
    **{
        number: (kind, BLOCK_KINDS[kind].values, BLOCK_KINDS[kind].bytes)
        for number, kind in {
            2: "Q4_0",
            3: "Q4_1",
            6: "Q5_0",
            7: "Q5_1",
            8: "Q8_0",
            10: "Q2_K",
            11: "Q3_K",
            12: "Q4_K",
            13: "Q5_K",
            14: "Q6_K",
        }.items()
    },
}

# Metadata value types: number -> struct code.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


class _Cursor:
    """Reads little-endian values and never past the end."""

    def __init__(self, data: mmap.mmap, where: str) -> None:
        self.data, self.where, self.at = data, where, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise CorruptModel(
                f"{self.where} ends early: {count} bytes wanted at {self.at} of {len(self.data)}",
                "the file is truncated or damaged; download it again",
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def count(self, what: str, size: int = 1) -> int:
        """A 64-bit count of things of at least `size` bytes that are still to come."""
        value: int = self.number("Q")
        if value > MAX_HEADER_ENTRIES or value * size > len(self.data) - self.at:
            raise CorruptModel(f"{self.where}: {value} {what} cannot be in what is left of it")
        return value

    def string(self) -> str:
        try:
            return self.take(self.count("bytes of text")).decode()
        except UnicodeDecodeError as error:
            raise CorruptModel(f"{self.where}: a text at {self.at} is no UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise CorruptModel(f"{self.where}: unknown value type {kind} at {self.at}")
        element = self.number("I")
        if element in _SCALARS:
            code = _SCALARS[element]
            size = struct.calcsize(code)
            count = self.count("values", size)
            return np.frombuffer(self.take(count * size), np.dtype(code).newbyteorder("<"))
        if element != _STRING:
            raise CorruptModel(f"{self.where}: an array of type {element} at {self.at}")
        return [self.string() for _ in range(self.count("texts", 8))]


class FileTensor(SourceTensor):
    """A tensor of a GGUF file; `order` gives the stored row of each row."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        kind: str,
        data: NDArray[np.uint8],
    ) -> None:
        self.name, self.shape, self.dtype = name, shape, kind
        self.bytes = data.nbytes
        self.order: NDArray[np.int64] | None = None
        self._data = data.reshape(shape[0] if len(shape) > 1 else 1, -1)

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        if len(self.shape) == 1:  # one stored row; `order` is by element
            values = self._values(self._data).reshape(self.shape)
            return values[start:stop] if self.order is None else values[self.order[start:stop]]
        return self._values(self._stored(start, stop)).reshape(-1, *self.shape[1:])

    def _stored(self, start: int, stop: int) -> NDArray[np.uint8]:
        return self._data[start:stop] if self.order is None else self._data[self.order[start:stop]]

    def _values(self, stored: NDArray[np.uint8]) -> NDArray[np.float32]:
        stored = np.ascontiguousarray(stored)
        if self.dtype == "F32":
            return stored.view("<f4").astype(np.float32)
        if self.dtype == "F16":
            return stored.view("<f2").astype(np.float32)
        if self.dtype == "BF16":
            return from_bf16(stored.view("<u2"))
        return dequantize(decode(self.dtype, stored))


class BlockTensor(FileTensor, CodedTensor):
    """A matrix of quantized blocks."""

    def __init__(
        self, name: str, shape: tuple[int, ...], kind: str, data: NDArray[np.uint8]
    ) -> None:
        super().__init__(name, shape, kind, data)
        self.form = BLOCK_KINDS[kind].form

    def coded_rows(self, start: int, stop: int) -> Quantized:
        return decode(self.dtype, np.ascontiguousarray(self._stored(start, stop)))


@dataclass(frozen=True)
class Container:
    """A parsed file: metadata and raw tensors."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, FileTensor]


def read_container(path: Path) -> Container:
    """Parses a GGUF file but for its weights. Errors: CorruptModel, Unsupported, IoError."""
    where = str(path)
    try:
        if not path.stat().st_size:
            raise CorruptModel(f"{where} is empty")
        with open(path, "rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise IoError(f"{where}: {error.strerror or error}") from error
    cursor = _Cursor(data, where)
    if cursor.take(4) != b"GGUF":
        raise CorruptModel(f"{where} is no GGUF file: it does not begin with GGUF")
    version = cursor.number("I")
    if version not in (2, 3):
        raise Unsupported(f"{where}: GGUF version {version}", "known: 2 and 3, little endian")
    tensor_count = cursor.count("tensors", 24)
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count("metadata entries", 12)):
        key = cursor.string()
        if key in metadata:
            raise CorruptModel(f"{where}: {key} is there twice")
        metadata[key] = cursor.value(cursor.number("I"))
    entries = [_tensor_entry(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 2**20:
        raise CorruptModel(f"{where}: general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    image = np.frombuffer(data, np.uint8)
    tensors: dict[str, FileTensor] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise CorruptModel(f"{where}: tensor {name} is there twice")
        kind_name, per_block, block_bytes = _TYPES[kind]
        if shape[-1] % per_block:
            raise CorruptModel(
                f"{where}: {name} {list(shape)} is no whole number of {kind_name} blocks"
            )
        size = math.prod(shape) // per_block * block_bytes
        if offset % alignment or start + offset + size > len(image):
            raise CorruptModel(
                f"{where}: {name} does not lie in the file: {size} bytes at {start + offset}",
                "the file is truncated or damaged; download it again",
            )
        piece = image[start + offset : start + offset + size]
        coded = kind_name in BLOCK_KINDS and len(shape) == 2
        tensors[name] = (BlockTensor if coded else FileTensor)(name, shape, kind_name, piece)
    return Container(path, metadata, tensors)


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape (rows first), type and offset."""
    name = cursor.string()
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise CorruptModel(f"{cursor.where}: {name} has {dimensions} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    kind, offset = cursor.number("I"), cursor.number("Q")
    if not all(1 <= extent < 2**32 for extent in shape):
        raise CorruptModel(f"{cursor.where}: {name} has shape {list(shape)}")
    if kind not in _TYPES:
        known = ", ".join(entry[0] for entry in _TYPES.values())
        raise Unsupported(f"{cursor.where}: {name} is of GGUF type {kind}", f"known: {known}")
    return name, shape, kind, offset


# Translation to the Hugging Face spelling
# ----------------------------------------------------------

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def open_gguf(path: Path, *, tokenizer: bool = True) -> Source:
    """A GGUF file as a source; without its tokenizer if `tokenizer` is false, as another one is to
    take its place. Errors: CorruptModel, Unsupported, IoError."""
    container = read_container(path)
    architecture = container.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise Unsupported(
            f"{path}: GGUF architecture {architecture!r}", f"known: {', '.join(_ARCHITECTURES)}"
        )
    if container.metadata.get("split.count", 1) not in (0, 1):
        raise Unsupported(f"{path} is one part of several", "merge the parts into one file first")
    config = _config(container, architecture)
    tensors = _tensors(container, config, unpermute=architecture == "llama")
    contents = tokenizer_files(container.metadata, str(path)) if tokenizer else {}
    generation = {"eos_token_id": config.pop("eos_token_id")}
    contents["generation_config.json"] = json.dumps(generation).encode()
    return Source(path, "gguf", config, tensors, contents=contents)


def _config(container: Container, architecture: str) -> dict[str, Any]:
    """A config.json of the family. Errors: CorruptModel, Unsupported for unknown keys."""
    where, tensors = container.path, container.tensors
    own = {
        key.removeprefix(architecture + "."): value
        for key, value in container.metadata.items()
        if key.startswith(architecture + ".")
    }

    def take(key: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        value = own.pop(key, default)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise CorruptModel(f"{where}: {architecture}.{key} is {value!r}")
        return value

    def number(key: str, default: int | None = None) -> int:
        return int(take(key, int, default))

    def refuse(key: str, *harmless: Any) -> None:
        value = own.pop(key, harmless[0])
        if value not in harmless:
            raise Unsupported(f"{where}: {architecture}.{key} is {value!r}", "not supported")

    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CorruptModel(f"{where} has no token_embd.weight")
    hidden, heads = number("embedding_length"), number("attention.head_count")
    if heads < 1 or hidden < 1:
        raise CorruptModel(f"{where}: {heads} heads of a width of {hidden}")
    head_dim = number("attention.key_length", hidden // heads)
    refuse("attention.value_length", head_dim)
    refuse("rope.dimension_count", head_dim)
    refuse("expert_count", 0)
    refuse("expert_used_count", 0)
    refuse("attention.sliding_window", 0)
    refuse("vocab_size", embedding.shape[0])
    base = float(take("rope.freq_base", float, 10000.0))
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": float(take("attention.layer_norm_rms_epsilon", float, 1e-6)),
        "rope_theta": base,
        "rope_scaling": _rope_scaling(container, own, head_dim, base),
        "tie_word_embeddings": "output.weight" not in tensors,
        "eos_token_id": [
            int(container.metadata[key])
            for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
            if type(container.metadata.get(key)) is int
        ],
        "bos_token_id": container.metadata.get("tokenizer.ggml.bos_token_id"),
    }
    if architecture == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if own:
        raise Unsupported(
            f"{where}: keys with an unknown meaning: {', '.join(sorted(own))}",
            "they may change the model's results",
        )
    return config


def _rope_scaling(
    container: Container, own: dict[str, Any], head_dim: int, base: float
) -> dict[str, Any] | None:
    """Linear scaling from the metadata, llama3 scaling from the tensor of its factors."""
    kind = own.pop("rope.scaling.type", "none")
    factor = own.pop("rope.scaling.factor", own.pop("rope.scale_linear", 1.0))
    original = own.pop("rope.scaling.original_context_length", None)
    if kind not in ("none", "linear"):
        raise Unsupported(f"{container.path}: rotary scaling {kind!r}", "known: none, linear")
    factors = container.tensors.get("rope_freqs.weight")
    if (
        factors is None
        or (values := factors.all()).max(initial=1.0) == values.min(initial=1.0) == 1
    ):
        if kind == "none" or factor == 1.0:
            return None
        return {"rope_type": "linear", "factor": float(factor)}
    length = 2 * math.pi * base ** (np.arange(head_dim // 2) * 2 / head_dim)
    stretch, low, high = float(np.round(values.max(), 4)), 1.0, 4.0
    context = int(original or 8192)
    smooth = np.clip((context / length - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / stretch + smooth)
    if values.shape != expected.shape or not np.allclose(values, expected, rtol=1e-4):
        raise Unsupported(
            f"{container.path}: the factors of rope_freqs.weight are not those of llama3 scaling"
        )
    return {
        "rope_type": "llama3",
        "factor": stretch,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _tensors(
    container: Container, config: dict[str, Any], unpermute: bool
) -> dict[str, SourceTensor]:
    """Tensors under their Hugging Face names; names without a translation stay as they are.

    Files of the llama architecture hold the rows of q and k in the order of interleaved rotary
    pairs;
    `unpermute` brings back the order of halves.
    """
    result: dict[str, SourceTensor] = {}
    orders: dict[str, Callable[[], NDArray[np.int64]]] = {}
    if unpermute:
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        orders["attn_q"] = lambda: _halves(heads, config["head_dim"])
        orders["attn_k"] = lambda: _halves(kv_heads, config["head_dim"])
    for name, tensor in container.tensors.items():
        if name == "rope_freqs.weight":
            continue  # read with the metadata
        translated = _NAMES.get(name, name)
        match = re.fullmatch(r"blk\.([0-9]+)\.([a-z_]+)\.(weight|bias)", name)
        if match is not None and match[2] in _LAYER_NAMES:
            translated = f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
            if match[2] in orders:
                order = orders[match[2]]()
                if len(order) != tensor.shape[0]:
                    raise CorruptModel(f"{container.path}: {name} has {tensor.shape[0]} rows")
                tensor.order = order
        tensor.name = translated
        result[translated] = tensor
    return result


def _halves(heads: int, head_dim: int) -> NDArray[np.int64]:
    """Stored row of each row: [head, pair, half] in the file, [head, half, pair] here."""
    stored = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return np.ascontiguousarray(stored.transpose(0, 2, 1)).reshape(-1)
