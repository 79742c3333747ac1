"""The writer and reader of model directories: layout, atomicity, refusal of damaged files."""

from __future__ import annotations

import json
import mmap
import os
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from framequilt.errors import (
    CorruptModel,
    FramequiltError,
    InternalError,
    InvalidArgument,
    IoError,
    NotFound,
    VersionMismatch,
    from_code,
)
from framequilt.model_directory import (
    CONFIG_KEYS,
    NUMPY_DTYPES,
    DirectoryWriter,
    ModelDirectory,
    plan_shards,
    read_safetensors,
)
from framequilt.quantize.formats import TensorInfo

TENSORS = [
    TensorInfo("odd", "F32", (3,)),
    TensorInfo("blocks", "U8", (2, 4, 8, 4)),
    TensorInfo("scales", "F16", (2, 3, 8)),
    TensorInfo("pairs", "BF16", (2, 5, 8, 2)),
    TensorInfo("byte", "U8", (1,)),
]
CONFIG: dict[str, Any] = {
    key: None for key in CONFIG_KEYS if key not in ("format", "version", "files")
} | {"linears": {}}


def content(info: TensorInfo) -> Any:
    dtype = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U8": np.uint8}[info.dtype]
    values = np.arange(1, 1 + int(np.prod(info.shape))) + len(info.name)
    return values.astype(dtype).reshape(info.shape)


def write(path: Path, tensors: list[TensorInfo] = TENSORS, **options: Any) -> None:
    with DirectoryWriter(path, tensors, **options) as writer:
        for info in reversed(tensors):
            writer.write(info.name, content(info))
        writer.add_file("tokenizer.json", b"{}")
        writer.commit(CONFIG)


@pytest.mark.parametrize("shard_bytes", [1, 300, 2**30])
def test_what_is_written_is_read_back_aligned(tmp_path: Path, shard_bytes: int) -> None:
    write(tmp_path / "model", shard_bytes=shard_bytes)
    directory = ModelDirectory(tmp_path / "model", verify=True)
    assert set(directory.tensors) == {info.name for info in TENSORS}
    for info in TENSORS:
        assert (directory.vector(info.name) == content(info)).all()
        assert directory.tensors[info.name].offset % 64 == 0
    found: dict[str, Any] = {}
    for file in sorted((tmp_path / "model").glob("model-*.safetensors")):
        raw = file.read_bytes()
        assert (8 + struct.unpack("<Q", raw[:8])[0]) % 64 == 0 and len(raw) % 64 == 0
        found |= dict(safetensors.deserialize(raw))  # an independent reader takes the files
    for info in TENSORS:
        assert found[info.name]["data"] == content(info).tobytes()
    listed = {entry["name"] for entry in directory.config["files"]}
    assert listed == {entry.name for entry in (tmp_path / "model").iterdir()} - {"config.json"}
    assert list(directory.config) == list(CONFIG_KEYS)


def test_tensors_of_odd_sizes_come_last_with_their_padding() -> None:
    (shard,) = plan_shards(TENSORS, 2**30)
    names = [info.name for info in shard]
    assert names[0] == "blocks"
    for info, following in zip(shard, [*shard[1:], None], strict=True):
        if info.bytes % 64 and not info.name.startswith("pad."):
            assert following is not None and following.name.startswith("pad.")
            assert (info.bytes + following.bytes) % 64 == 0 and following.bytes < 64
    pads = {name for name in names if name.startswith("pad.")}
    assert len(pads) == sum(info.bytes % 64 > 0 for info in TENSORS)


def test_tensors_can_be_written_piece_by_piece(tmp_path: Path) -> None:
    info = TensorInfo("blocks", "U8", (6, 2, 8, 4))
    data = content(info)
    with DirectoryWriter(tmp_path / "model", [info]) as writer:
        writer.write("blocks", data[4:], 4)
        writer.write("blocks", data[:4], 0)
        writer.commit(CONFIG)
    assert (ModelDirectory(tmp_path / "model").vector("blocks") == data).all()


@pytest.mark.parametrize("page", [64, 1024, 2 << 20])
@pytest.mark.parametrize("seed", range(4))
def test_pieces_in_any_order_make_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: int, seed: int
) -> None:
    """Whatever lies in one page: the zeros that begin it destroy nothing."""
    monkeypatch.setattr("framequilt.model_directory.HUGE_PAGE", page)
    generator = np.random.default_rng(seed)
    tensors = [*TENSORS, TensorInfo("long", "U8", (40, 90)), TensorInfo("wide", "I8", (3, 1000))]
    values = {
        t.name: generator.integers(1, 100, t.shape).astype(NUMPY_DTYPES[t.dtype]) for t in tensors
    }
    pieces = []
    for info in tensors:
        cuts = np.sort(generator.integers(0, info.shape[0] + 1, 5))  # some pieces are empty
        ends = [0, *(int(cut) for cut in cuts), info.shape[0]]
        pieces += [(info.name, *ends[i : i + 2]) for i in range(len(ends) - 1)]
    with DirectoryWriter(tmp_path / "model", tensors, shard_bytes=5000) as writer:
        for at in generator.permutation(len(pieces)):
            name, begin, end = pieces[at]
            writer.write(name, values[name][begin:end], begin)
        writer.commit(CONFIG)
    directory = ModelDirectory(tmp_path / "model", verify=True)
    for name, value in values.items():
        assert (directory.vector(name) == value).all()
    for file in (tmp_path / "model").glob("*.safetensors"):
        assert len(file.read_bytes()) == os.path.getsize(file)
        for name, entry in dict(safetensors.deserialize(file.read_bytes())).items():
            data = bytes(entry["data"])
            assert data == (values[name].tobytes() if name in values else bytes(len(data)))


def mapped_as_huge_pages(path: Path) -> int:
    """Bytes of a file, mapped and read, that the kernel maps by huge pages."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        sum(mapped[::4096])
        entries = re.split(
            r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M
        )
        own = [entry for entry in entries if str(path) in entry.partition("\n")[0]]
        return 1024 * sum(int(n) for e in own for n in re.findall(r"FilePmdMapped: +(\d+)", e))


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells, in /proc, what is mapped by huge pages"
)
def test_what_was_written_lies_in_huge_pages(tmp_path: Path) -> None:
    """Where the file system keeps files in such pieces at all. Each tensor is written in parts."""
    whole = tmp_path / "whole"
    with open(whole, "wb", buffering=0) as file:
        for _ in range(8):
            file.write(bytes(2 << 20))
    if mapped_as_huge_pages(whole) < 12 << 20:
        pytest.skip("this file system keeps files in small pages")
    tensors = [TensorInfo(f"t{i}", "U8", (300, 1000)) for i in range(60)]
    with DirectoryWriter(tmp_path / "model", tensors) as writer:
        for first in range(0, 300, 100):
            for info in tensors:
                writer.write(info.name, np.ones((100, 1000), np.uint8), first)
        writer.commit(CONFIG)
    (file,) = (tmp_path / "model").glob("*.safetensors")
    assert mapped_as_huge_pages(file) >= 12 << 20


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), DirectoryWriter(tmp_path / "model", TENSORS) as writer:
        writer.write("odd", content(TENSORS[0]))
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(InternalError, match="0 of 256 bytes"),
        DirectoryWriter(tmp_path / "model", TENSORS) as writer,
    ):
        writer.commit(CONFIG)
    assert list(tmp_path.iterdir()) == []

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), DirectoryWriter(tmp_path / "model", []) as writer:
        writer.add_file("tokenizer.json", b"x")
        writer.commit(CONFIG, stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_an_existing_destination_is_never_touched(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "model"
    if kind == "directory":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InvalidArgument, match="exists"):
        DirectoryWriter(target, TENSORS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_destination_that_appears_meanwhile_wins(tmp_path: Path) -> None:
    with (
        pytest.raises(InvalidArgument, match="exists"),
        DirectoryWriter(tmp_path / "model", []) as writer,
    ):
        (tmp_path / "model").mkdir()
        writer.commit(CONFIG)
    assert list((tmp_path / "model").iterdir()) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_wrong_pieces_are_refused(tmp_path: Path) -> None:
    with DirectoryWriter(tmp_path / "model", TENSORS) as writer:
        for name, data, first in (
            ("odd", np.zeros(3, np.float64), 0),
            ("odd", np.zeros(3, np.float32), 1),
            ("scales", np.zeros((2, 3, 7), np.float16), 0),
            ("nothing", np.zeros(3, np.float32), 0),
        ):
            with pytest.raises(InternalError):
                writer.write(name, data, first)
        for name in ("config.json", "../escape"):
            with pytest.raises(InternalError):
                writer.add_file(name, b"")
    with pytest.raises(InvalidArgument, match="twice"):
        DirectoryWriter(tmp_path / "model", [TENSORS[0], TENSORS[0]])
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_an_io_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IoError):
        DirectoryWriter(tmp_path / "file" / "model", TENSORS)


def header_file(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    size = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + header + data)
    return path


ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
DAMAGED: dict[str, tuple[Any, bytes, int | None]] = {
    "no JSON": (b"{", b"", None),
    "no object": (b"[]", b"", None),
    "deep JSON": (b"[" * 100_000, b"", None),
    "not UTF-8": (b'{"\xff": 1}', b"", None),
    "header behind the file": (b"{}", b"", 2**40),
    "header of huge length": (b"{}", b"", 2**63),
    "no entry": ({"a": None}, b"", None),
    "strange dtype": ({"a": ENTRY | {"dtype": "F13"}}, b"1234", None),
    "dtype no text": ({"a": ENTRY | {"dtype": ["U8"]}}, b"1234", None),
    "negative shape": ({"a": ENTRY | {"shape": [-4]}}, b"1234", None),
    "bool shape": ({"a": ENTRY | {"shape": [True]}}, b"1234", None),
    "float offsets": ({"a": ENTRY | {"data_offsets": [0.0, 4.0]}}, b"1234", None),
    "three offsets": ({"a": ENTRY | {"data_offsets": [0, 4, 4]}}, b"1234", None),
    "wrong size": ({"a": ENTRY | {"shape": [5]}}, b"1234", None),
    "huge shape": ({"a": ENTRY | {"shape": [2**62, 4]}}, b"1234", None),
    "behind the end": ({"a": ENTRY}, b"123", None),
    "backwards": ({"a": ENTRY | {"data_offsets": [4, 0]}}, b"1234", None),
    "a gap": ({"a": ENTRY | {"data_offsets": [4, 8]}}, b"12345678", None),
    "an overlap": ({"a": ENTRY, "b": ENTRY | {"data_offsets": [2, 6]}}, b"123456", None),
    "bytes of nobody": ({"a": ENTRY}, b"12345", None),
    "a name twice": (b'{"a": null, "a": null}', b"", None),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_safetensors_are_refused(tmp_path: Path, name: str) -> None:
    header, data, length = DAMAGED[name]
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    with pytest.raises(CorruptModel):
        read_safetensors(header_file(tmp_path / "x.safetensors", raw, data, length))


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    raw = file.read_bytes()
    for size in range(0, len(raw), 7):
        file.write_bytes(raw[:size])
        with pytest.raises(CorruptModel):
            read_safetensors(file)
        with pytest.raises(CorruptModel):
            ModelDirectory(tmp_path / "model")


def test_changed_bytes_are_noticed_when_asked(tmp_path: Path) -> None:
    write(tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-70] ^= 1
    file.write_bytes(raw)
    ModelDirectory(tmp_path / "model")
    with pytest.raises(CorruptModel, match="checksum"):
        ModelDirectory(tmp_path / "model", verify=True)


def test_configs_of_something_else_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    for change, kind in (
        ({"format": "other"}, CorruptModel),
        ({"version": 2}, VersionMismatch),
        ({"extra": 1}, CorruptModel),
    ):
        file.write_text(json.dumps(config | change))
        with pytest.raises(kind):
            ModelDirectory(tmp_path / "model")
    file.write_text("{" * 100)
    with pytest.raises(CorruptModel):
        ModelDirectory(tmp_path / "model")
    file.write_text(json.dumps(config))
    os.remove(tmp_path / "model" / "tokenizer.json")
    with pytest.raises(NotFound):
        ModelDirectory(tmp_path / "model")
    with pytest.raises(NotFound):
        ModelDirectory(tmp_path / "nothing")


def test_errors_carry_the_codes_of_the_engine() -> None:
    source = Path(__file__).parents[2] / "engine" / "src" / "core" / "status.cc"
    codes = re.findall(r'case Code::k\w+:\s*return "(\w+)"', source.read_text())
    assert len(codes) >= 12
    for code in codes:
        error = from_code(code, "what", "do this")
        assert error.code == code and isinstance(error, FramequiltError)
        assert str(error) == f"{code}: what (hint: do this)"
    assert from_code("new_code", "what").code == "internal"
    assert str(CorruptModel("what")) == "corrupt_model: what"
