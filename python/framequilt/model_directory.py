"""Framequilt's model directory: a strict writer, and a light reader for inspection and tests.

The format is normative in engine/CONTRACT.md, section 1. The writer lays out every tensor before it
writes the first byte, so that tensors can be written piece by piece in any order: no tensor has to
be in memory. It writes to a temporary sibling directory and renames that at the end; what fails or
is cancelled leaves nothing behind. It never deletes what it did not create.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from framequilt.errors import (
    CorruptModel,
    FramequiltError,
    InternalError,
    InvalidArgument,
    IoError,
    NotFound,
    VersionMismatch,
)
from framequilt.quantize.formats import ActivationFormat, TensorInfo, WeightFormat
from framequilt.quantize.tiles import unpack_linear

FORMAT = "framequilt-model"
VERSION = 1
ALIGNMENT = 64
MAX_HEADER_BYTES = 100_000_000
MAX_CONFIG_BYTES = 16_000_000
DEFAULT_SHARD_BYTES = 4 * 2**30

CONFIG_KEYS = (
    "format", "version", "name", "source", "weights", "decoder", "vision", "projector", "visual",
    "tokens", "defaults", "linears", "files",
)  # fmt: skip

# numpy has no bfloat16: those tensors travel as uint16 bit patterns.
NUMPY_DTYPES: dict[str, Any] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
}


@dataclass
class _Place:
    """Where a tensor lies, and how much of it is there."""

    info: TensorInfo
    file: int
    offset: int  # of the data, from the start of the file
    written: int = 0


HUGE_PAGE = 2 << 20


@dataclass
class _Shard:
    name: str
    header: bytes = b""
    size: int = 0
    stream: IO[bytes] | None = None  # not buffered
    tensors: list[TensorInfo] = field(default_factory=list)
    begun: set[int] = field(default_factory=set)  # huge pages that something was written to

    def write(self, data: memoryview, at: int) -> None:
        """Writes bytes at a place of the file. Errors: OSError.

        A huge page is begun by one write of the whole of it and no more, with zeros around the
        bytes if need be. A kernel that keeps a file in pieces of any size (Linux with ext4 from
        6.16 on, with XFS before) makes its piece as large as that write, and the engine, which maps
        the file, reads the weights through huge pages: up to a sixth more tokens a second. Pieces
        of other sizes, larger ones too, are not mapped so.
        """
        end = at + len(data)
        for page in range(at // HUGE_PAGE, -(-end // HUGE_PAGE)):
            first, last = page * HUGE_PAGE, min((page + 1) * HUGE_PAGE, self.size)
            begin, stop = max(at, first), min(end, last)
            if page not in self.begun and (begin > first or stop < last):
                self._write_all(memoryview(bytes(last - first)), first)
            self.begun.add(page)
            self._write_all(data[begin - at : stop - at], begin)

    def _write_all(self, data: memoryview, at: int) -> None:
        assert self.stream is not None
        self.stream.seek(at)
        while len(data):
            data = data[self.stream.write(data) :]


def plan_shards(tensors: Iterable[TensorInfo], shard_bytes: int) -> list[list[TensorInfo]]:
    """Cuts tensors into files of about `shard_bytes`, each in its final order.

    In a file the tensors whose sizes are multiples of 64 bytes come first; the others follow, each
    with the `pad.K` tensor that it needs.
    """
    shards: list[list[TensorInfo]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor.bytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.bytes
    pads = 0
    for shard in shards:
        ordered = [tensor for tensor in shard if tensor.bytes % ALIGNMENT == 0]
        for tensor in shard:
            missing = -tensor.bytes % ALIGNMENT
            if missing:
                ordered += [tensor, TensorInfo(f"pad.{pads}", "U8", (missing,))]
                pads += 1
        shard[:] = ordered
    return shards


def _encode_header(tensors: list[TensorInfo]) -> bytes:
    """Length and JSON header, padded with spaces so that the data starts at a multiple of 64."""
    entries: dict[str, Any] = {}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.bytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class DirectoryWriter:
    """Writes one model directory: `write` and `add_file` in any order, then `commit`.

    A context manager: leaving it without `commit` removes everything that was written. One thread.
    """

    def __init__(
        self,
        destination: str | os.PathLike[str],
        tensors: Iterable[TensorInfo],
        *,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> None:
        """Errors: InvalidArgument when the destination exists or a name repeats, IoError."""
        self.destination = Path(os.path.abspath(destination))
        _refuse_existing(self.destination)
        shards = plan_shards(tensors, shard_bytes)
        self._shards: list[_Shard] = []
        self._places: dict[str, _Place] = {}
        self._files: dict[str, Path] = {}
        for index, listed in enumerate(shards):
            shard = _Shard(f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors")
            shard.tensors = listed
            shard.header = _encode_header(listed)
            offset = len(shard.header)
            for tensor in listed:
                if tensor.name in self._places:
                    raise InvalidArgument(f"tensor {tensor.name} is listed twice")
                self._places[tensor.name] = _Place(tensor, index, offset)
                offset += tensor.bytes
            shard.size = offset
            self._shards.append(shard)
        self._temporary: Path | None = None
        try:
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            prefix = f".{self.destination.name}.partial-"
            self._temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=self.destination.parent))
            for shard in self._shards:
                shard.stream = open(self._temporary / shard.name, "xb", buffering=0)
                shard.stream.truncate(shard.size)
                shard.write(memoryview(shard.header), 0)
            for place in list(self._places.values()):
                if place.info.name.startswith("pad."):
                    place.written = place.info.bytes  # the zeros of the truncated file
        except OSError as error:
            self.abort()
            raise _io(error, self.destination) from error

    @property
    def total_bytes(self) -> int:
        """Size of the tensor files."""
        return sum(shard.size for shard in self._shards)

    def write(self, name: str, data: NDArray[Any], first: int = 0) -> None:
        """Writes a piece of a tensor; `first` is its first index along the first axis.

        `data` has the tensor's dtype (uint16 for BF16) and its shape but for the first axis. Every
        byte has to be written exactly once before `commit`. Errors: InternalError, IoError.
        """
        place = self._places.get(name)
        if place is None:
            raise InternalError(f"tensor {name} was not planned")
        info = place.info
        wanted = NUMPY_DTYPES[info.dtype]
        if data.dtype != wanted or data.shape[1:] != info.shape[1:] or data.ndim != len(info.shape):
            found = f"{data.dtype} {list(data.shape)}"
            raise InternalError(f"tensor {name}: {found} is no piece of {info}")
        if not 0 <= first <= info.shape[0] - len(data):
            raise InternalError(f"tensor {name}: rows {first} to {first + len(data)} of {info}")
        stride = info.bytes // info.shape[0]
        shard = self._shards[place.file]
        if shard.stream is None:
            raise InternalError("the writer is closed")
        try:
            content = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
            shard.write(content.data, place.offset + first * stride)
        except OSError as error:
            raise _io(error, self.destination) from error
        place.written += data.nbytes

    def add_file(self, name: str, content: bytes) -> None:
        """Adds a small file, such as the tokenizer. Errors: InternalError, IoError."""
        if self._temporary is None:
            raise InternalError("the writer is closed")
        if name in self._files or "/" in name or name == "config.json":
            raise InternalError(f"file {name!r} cannot be added")
        path = self._temporary / name
        try:
            with open(path, "xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise _io(error, self.destination) from error
        self._files[name] = path

    def commit(self, config: Mapping[str, Any], check: Callable[[], None] = lambda: None) -> Path:
        """Hashes and syncs all files, writes config.json and moves the directory into place.

        `config` has every key of the contract but `format`, `version` and `files`. `check` is
        called
        often while hashing and may raise. Returns the destination. Errors: InternalError for
        missing
        data, InvalidArgument when the destination appeared meanwhile, IoError.
        """
        if self._temporary is None:
            raise InternalError("the writer is closed")
        for place in self._places.values():
            if place.written != place.info.bytes:
                raise InternalError(
                    f"tensor {place.info.name}: {place.written} of {place.info.bytes} bytes written"
                )
        try:
            for shard in self._shards:
                assert shard.stream is not None
                shard.stream.flush()
                os.fsync(shard.stream.fileno())
                shard.stream.close()
            names = [shard.name for shard in self._shards] + sorted(self._files)
            files = []
            for name in names:
                path = self._temporary / name
                digest = sha256_of(path, check)
                files.append({"name": name, "bytes": path.stat().st_size, "sha256": digest})
            document = {"format": FORMAT, "version": VERSION, **config, "files": files}
            if tuple(document) != CONFIG_KEYS:
                raise InternalError(f"config.json would have the keys {list(document)}")
            text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
            with open(self._temporary / "config.json", "x", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(self._temporary, 0o777 & ~_umask())
            _sync_directory(self._temporary)
            _refuse_existing(self.destination)
            os.rename(self._temporary, self.destination)
            self._temporary = None
            _sync_directory(self.destination.parent)
        except OSError as error:
            raise _io(error, self.destination) from error
        return self.destination

    def abort(self) -> None:
        """Removes what was written, if it was not committed. Idempotent."""
        for shard in self._shards:
            if shard.stream is not None:
                shard.stream.close()
                shard.stream = None
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None

    def __enter__(self) -> DirectoryWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()


def _refuse_existing(destination: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise InvalidArgument(
            f"{destination} exists already", "choose another destination, or remove it yourself"
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _io(error: OSError, path: Path) -> FramequiltError:
    return IoError(f"{path}: {error.strerror or error}", "check the disk's space and permissions")


def sha256_of(path: Path, check: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of a file in hex; `check` is called every few megabytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            check()
    return digest.hexdigest()


# Reading -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of an opened file: a read-only view of the mapped bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int  # of the data, from the start of the file
    data: NDArray[Any]


def read_safetensors(
    path: Path, dtypes: Mapping[str, Any] = NUMPY_DTYPES
) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, mapped, not read.

    Strict: the header fits the file, names do not repeat, and tensors lie in it without gaps or
    overlaps, each as large as dtype and shape say. `dtypes` are those that are allowed. Errors:
    CorruptModel, NotFound.
    """
    try:
        size = path.stat().st_size
        image = np.memmap(path, np.uint8, mode="r") if size else np.empty(0, np.uint8)
    except FileNotFoundError as error:
        raise NotFound(f"{path} is not there") from error
    except OSError as error:
        raise _io(error, path) from error
    length = int.from_bytes(image[:8].tobytes(), "little") if size >= 8 else -1
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise CorruptModel(f"{path}: a header of {length} bytes in a file of {size}")
    try:
        header = json.loads(image[8 : 8 + length].tobytes(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptModel(f"{path}: the header is no JSON object ({error})") from error
    if not isinstance(header, dict):
        raise CorruptModel(f"{path}: the header is no JSON object")
    header.pop("__metadata__", None)
    result: dict[str, StoredTensor] = {}
    spans = []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(path, name, entry, dtypes)
        start = 8 + length + begin
        if end > size - 8 - length:
            raise CorruptModel(f"{path}: tensor {name} ends behind the file")
        view = image[start : 8 + length + end].view(dtypes[dtype]).reshape(shape)
        result[name] = StoredTensor(dtype, shape, start, view)
        spans.append((begin, end, name))
    spans.sort()
    at = 0
    for begin, end, name in spans:
        if begin != at:
            raise CorruptModel(f"{path}: a gap or an overlap before tensor {name}")
        at = end
    if at != size - 8 - length:
        raise CorruptModel(f"{path}: {size - 8 - length - at} bytes belong to no tensor")
    return result


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name is there twice")
    return result


def _entry(
    path: Path, name: str, entry: Any, dtypes: Mapping[str, Any]
) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, begin and end of one entry of a safetensors header."""
    fine = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
    if not fine or not isinstance(entry["dtype"], str) or entry["dtype"] not in dtypes:
        raise CorruptModel(f"{path}: tensor {name} is described as {entry!r}"[:300])
    numbers = [entry["shape"], entry["data_offsets"]]
    for listed in numbers:
        if not isinstance(listed, list) or not all(type(n) is int and n >= 0 for n in listed):
            raise CorruptModel(f"{path}: tensor {name} is described as {entry!r}")
    if len(numbers[1]) != 2:
        raise CorruptModel(f"{path}: tensor {name} is described as {entry!r}")
    elements = 1
    for extent in numbers[0]:
        elements *= extent
    begin, end = numbers[1]
    if end - begin != elements * np.dtype(dtypes[entry["dtype"]]).itemsize:
        raise CorruptModel(f"{path}: tensor {name}: {end - begin} bytes for shape {numbers[0]}")
    return entry["dtype"], tuple(numbers[0]), begin, end


class ModelDirectory:
    """An opened model directory: `config`, and tensors by name. Read-only; tensors are mapped."""

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = False) -> None:
        """Opens and checks; `verify` also compares the files' SHA-256.

        Errors: NotFound, CorruptModel, VersionMismatch.
        """
        self.path = Path(path)
        self.config = self._read_config()
        self.tensors: dict[str, StoredTensor] = {}
        for entry in self.config["files"]:
            name, size = entry["name"], entry["bytes"]
            file = self.path / name
            if "/" in name or not file.is_file():
                raise NotFound(f"{file} is not there", "the model directory is not complete")
            if file.stat().st_size != size:
                raise CorruptModel(f"{file}: {file.stat().st_size} bytes, expected {size}")
            if verify and sha256_of(file) != entry["sha256"]:
                raise CorruptModel(f"{file}: the checksum differs", "copy or convert it again")
            if name.endswith(".safetensors"):
                for tensor, stored in read_safetensors(file).items():
                    if tensor.startswith("pad."):
                        continue
                    if tensor in self.tensors:
                        raise CorruptModel(f"{file}: tensor {tensor} is there twice")
                    if stored.offset % ALIGNMENT:
                        raise CorruptModel(f"{file}: tensor {tensor} is not aligned")
                    self.tensors[tensor] = stored

    def _read_config(self) -> dict[str, Any]:
        file = self.path / "config.json"
        try:
            if file.stat().st_size > MAX_CONFIG_BYTES:
                raise CorruptModel(f"{file} is larger than {MAX_CONFIG_BYTES} bytes")
            config = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        except FileNotFoundError as error:
            raise NotFound(f"{file} is not there", "is this a model directory?") from error
        except (ValueError, RecursionError) as error:
            raise CorruptModel(f"{file}: no valid JSON ({error})") from error
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise CorruptModel(
                f"{file} is no Framequilt model", "convert a checkpoint: framequilt convert"
            )
        if config.get("version") != VERSION:
            raise VersionMismatch(f"{file}: format version {config.get('version')}, not {VERSION}")
        if set(config) != set(CONFIG_KEYS):
            wrong = sorted(set(config) ^ set(CONFIG_KEYS))
            raise CorruptModel(f"{file}: unknown or missing keys {', '.join(wrong)}")
        return config

    def vector(self, name: str) -> NDArray[Any]:
        """A stored tensor as it is (BF16 as uint16). Errors: NotFound."""
        if name not in self.tensors:
            raise NotFound(f"{self.path}: there is no tensor {name}")
        return self.tensors[name].data

    def format_of(self, slot: str) -> WeightFormat:
        """Weight format of a linear. Errors: NotFound, CorruptModel."""
        return WeightFormat.from_json(self._linear(slot).get("format"), f"{self.path}: {slot}")

    def activations_of(self, slot: str) -> ActivationFormat | None:
        """How a linear's inputs are quantized, None: not. Errors: NotFound, CorruptModel."""
        value = self._linear(slot).get("activations")
        return None if value is None else ActivationFormat.from_json(value, f"{self.path}: {slot}")

    def linear(self, slot: str) -> NDArray[np.float32]:
        """A linear's weight, dequantized: float32 [out, in]. Errors: NotFound, CorruptModel."""
        entry = self._linear(slot)
        form = self.format_of(slot)
        return unpack_linear(
            form, entry["out"], entry["in"], lambda suffix: self.vector(f"{slot}.{suffix}")
        )

    def linear_bytes(self, slot: str) -> int:
        """Stored bytes of a linear's weight, with scales, zeros and row sums if there are any."""
        entry = self._linear(slot)
        sums = self.tensors.get(f"{slot}.row_sums")
        weight = self.format_of(slot).stored_bytes(entry["out"], entry["in"])
        return weight + (0 if sums is None else sums.data.nbytes)

    def _linear(self, slot: str) -> dict[str, Any]:
        entry = self.config["linears"].get(slot)
        if entry is None:
            raise NotFound(f"{self.path}: there is no linear {slot}")
        return dict(entry)
