"""The build files agree with each other, and the build refuses what it cannot do."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_LIBRARIES = {"dependency", "threads", "framequilt-config"}
LIBRARIES = sorted(
    path.stem for path in (ROOT / "third_party").glob("*.cmake") if path.stem not in NOT_LIBRARIES
)


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _rows() -> list[list[str]]:
    table = [line for line in _read("third_party/README.md").splitlines() if line.startswith("| [")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library_has_a_complete_row(library):
    script = _read(f"third_party/{library}.cmake")
    repository = re.search(r"https://github\.com/([\w-]+/[\w-]+)\.git", script)
    assert repository, "no pinned download"
    rows = [row for row in _rows() if f"https://github.com/{repository[1]})" in row[0]]
    assert len(rows) == 1
    assert len(rows[0]) == 7 and all(rows[0])
    assert f"downloaded, {rows[0][6]}" in script, "the row and the script name different versions"


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_download_is_pinned_by_its_hash(library):
    script = _read(f"third_party/{library}.cmake")
    fetches = re.findall(r"framequilt_dependency_fetch\((.*?)\)", script, re.DOTALL)
    assert len(fetches) == 1
    assert re.fullmatch(r"[0-9a-f]{40}", fetches[0].split()[2])


def test_setup_installs_the_packages_that_the_table_names():
    setup = _read(".ci/system-packages")
    wanted = {name for row in _rows() for name in re.findall(r"lib[\w-]+|nlohmann-[\w-]+", row[5])}
    assert wanted
    assert {name for name in wanted if f"need {name} " not in setup} == set()


def test_the_installed_package_finds_every_library_that_the_engine_links():
    engine_libraries = {name for name in LIBRARIES if name not in ("googletest", "pybind11")}
    config = _read("third_party/framequilt-config.cmake")
    build = _read("CMakeLists.txt")
    for name in engine_libraries:
        assert f"/{name}.cmake" in config
        assert build.count(f"third_party/{name}.cmake") == 2, "included once, installed once"


@pytest.mark.parametrize(
    ("value", "message"),
    [("ON", "has no CUDA sources"), ("yes", "takes AUTO, ON or OFF")],
)
def test_cuda_that_cannot_be_built_is_refused(tmp_path, value, message):
    if any((ROOT / "engine" / "src" / "backend").glob("cuda/**/*.cu")):
        pytest.skip("there are CUDA sources")
    command = ["cmake", "-S", ROOT, "-B", tmp_path, f"-DFRAMEQUILT_CUDA={value}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())


def test_floats_are_not_left_to_the_compiler():
    build = _read("CMakeLists.txt") + _read("CMakePresets.json") + _read("pyproject.toml")
    assert "-ffp-contract=off" in build
    assert not re.search(r"-ffast-math|-Ofast|-march=native|-funsafe-math", build)
