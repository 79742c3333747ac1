"""Checkpoints as the converter sees them: a config, small files by name, and tensors read lazily.

Tensors are views of mapped files; `rows` turns a piece into float32. Nothing is loaded whole.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framequilt.errors import CorruptModel, InvalidArgument, IoError, NotFound, Unsupported
from framequilt.model_directory import StoredTensor, read_safetensors
from framequilt.quantize.tiles import from_bf16

MAX_FILE_BYTES = 256 * 2**20

# Everything that safetensors files hold; only the floats up to 32 bits can be weights.
_STORED: dict[str, Any] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"), "F8_E5M2": np.dtype("u1"), "BOOL": np.dtype("u1"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
}  # fmt: skip


class SourceTensor(ABC):
    """A tensor of a checkpoint, not yet read."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int  # in the checkpoint

    @abstractmethod
    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Float32 values [stop - start, ...] along the first axis. Errors: Unsupported dtype."""

    def all(self) -> NDArray[np.float32]:
        """All values in float32."""
        if not self.shape:
            raise CorruptModel(f"{self.name} is a single number")
        return self.rows(0, self.shape[0])


class MappedTensor(SourceTensor):
    """A tensor of a safetensors file."""

    def __init__(self, name: str, stored: StoredTensor) -> None:
        self.name = name
        self.shape = stored.shape
        self.dtype = stored.dtype
        self.bytes = stored.data.nbytes
        self.data = stored.data  # as stored, bfloat16 as bit patterns

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        if self.dtype not in ("F32", "F16", "BF16"):
            raise Unsupported(
                f"{self.name} is stored as {self.dtype}", "weights are read from F32, F16 and BF16"
            )
        piece = self.data[start:stop]
        if self.dtype == "BF16":
            return from_bf16(np.ascontiguousarray(piece))
        return np.ascontiguousarray(piece, np.float32)


@dataclass
class Source:
    """An opened checkpoint."""

    path: Path
    kind: str  # "safetensors" or "gguf"
    config: dict[str, Any]
    tensors: Mapping[str, SourceTensor]
    folder: Path | None = None  # where small files are, or
    contents: dict[str, bytes] = field(default_factory=dict)  # what they are
    quantization: str = ""  # how it is quantized already, in words; "" if it is not
    notes: list[str] = field(default_factory=list)  # what a user should know about it

    def read(self, name: str) -> bytes | None:
        """A small file's bytes, None where there is none. Errors: IoError, CorruptModel."""
        if name in self.contents:
            return self.contents[name]
        return None if self.folder is None else _read_file(self.folder / name)

    def json(self, name: str) -> dict[str, Any]:
        """A small JSON file's object, empty where there is no file. Errors: CorruptModel."""
        content = self.read(name)
        return {} if content is None else _object(content, f"{self.path.name}: {name}")


def _read_file(path: Path) -> bytes | None:
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CorruptModel(f"{path} is larger than {MAX_FILE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise IoError(f"{path}: {error.strerror or error}") from error


def _object(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptModel(f"{where} is no valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CorruptModel(f"{where} is no JSON object")
    return value


def open_source(path: Path, *, tokenizer: bool = True) -> Source:
    """Opens a Hugging Face directory or a GGUF file.

    Errors: NotFound, CorruptModel, Unsupported, InvalidArgument.
    """
    if path.is_dir():
        return _open_directory(path)
    if not path.exists():
        raise NotFound(f"{path} is not there", "give a checkpoint's directory, or a .gguf file")
    if path.suffix == ".gguf":
        from framequilt.convert.gguf import open_gguf

        return open_gguf(path, tokenizer=tokenizer)
    raise InvalidArgument(
        f"{path} is neither a directory nor a .gguf file",
        "give the directory that holds config.json and model.safetensors",
    )


def _open_directory(path: Path) -> Source:
    content = _read_file(path / "config.json")
    if content is None:
        found = sorted(entry.name for entry in path.glob("*.gguf"))
        hint = f"did you mean {path / found[0]}?" if found else "a checkpoint has a config.json"
        raise NotFound(f"{path} has no config.json", hint)
    config = _object(content, f"{path}: config.json")
    if config.get("format") == "framequilt-model":
        raise InvalidArgument(f"{path} is a converted model already", "run it as it is")
    tensors: dict[str, SourceTensor] = {}
    for file in _weight_files(path):
        for name, stored in read_safetensors(file, _STORED).items():
            if name in tensors:
                raise CorruptModel(f"{file}: tensor {name} is there twice")
            tensors[name] = MappedTensor(name, stored)
    source = Source(path, "safetensors", config, tensors, folder=path)
    if config.get("quantization_config") is None:
        return source
    from framequilt.convert.importers import read_quantized

    return read_quantized(source)


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files that hold the weights, from the index where there is one."""
    index = _read_file(path / "model.safetensors.index.json")
    if index is None:
        if (path / "model.safetensors").is_file():
            return [path / "model.safetensors"]
        if list(path.glob("pytorch_model*.bin")) or list(path.glob("*.pth")):
            raise Unsupported(
                f"{path} holds pickled weights (.bin), which can run code when they are opened",
                "save it as safetensors first: model.save_pretrained(path)",
            )
        raise NotFound(f"{path} has no model.safetensors")
    where = f"{path}: model.safetensors.index.json"
    weight_map = _object(index, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptModel(f"{where} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if "/" in name or not name.endswith(".safetensors"):
            raise CorruptModel(f"{where} names the file {name!r}")
        if not (path / name).is_file():
            raise NotFound(f"{path / name} is not there", "the checkpoint is not complete")
    return [path / name for name in names]
