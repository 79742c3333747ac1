"""The source tree keeps its floors, and the checker that says so catches what breaks them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import floors

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "rule",
    [
        floors.include_violations,
        floors.family_violations,
        floors.length_violations,
        floors.note_violations,
    ],
    ids=lambda rule: rule.__name__,
)
def test_this_tree_breaks_no_rule(rule):
    found = rule(ROOT)
    assert not found, "\n".join(found)


# --- the checker itself, on trees made to break one rule each ------------------------------------


@pytest.fixture
def tree(tmp_path: Path):
    """Writes files of a small tree: a header in each folder, and then what the test adds."""
    for folder in floors.FLOOR_OF:
        if folder == "include":
            header = tmp_path / "engine/include/framequilt/types.h"
        elif folder == "bindings":
            header = tmp_path / "python/bindings/bindings.h"
        else:
            header = tmp_path / f"engine/src/{folder}/{folder}.h"
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text("#pragma once\n#include <vector>\n")

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return tmp_path

    return write


def _include_of(folder: str) -> str:
    special = {"include": "framequilt/types.h", "bindings": "bindings.h"}
    return special.get(folder, f"src/{folder}/{folder}.h")


def _file_in(folder: str) -> str:
    special = {"include": "engine/include/framequilt/a.h", "bindings": "python/bindings/a.cc"}
    return special.get(folder, f"engine/src/{folder}/a.cc")


FOLDERS = [folder for folder in floors.FLOOR_OF if folder != "include"]


@pytest.mark.parametrize("target", FOLDERS)
@pytest.mark.parametrize("source", FOLDERS)
def test_an_include_is_allowed_exactly_when_it_does_not_go_up(tree, source, target):
    root = tree(_file_in(source), f'#include "{_include_of(target)}"\n')
    found = floors.include_violations(root)
    goes_up = floors.FLOOR_OF[target] > floors.FLOOR_OF[source]
    assert bool(found) == goes_up, found
    if goes_up:
        assert f"{target} is above {source}" in found[0]


def test_the_floors_are_those_of_the_architecture():
    order = " < ".join(", ".join(folders) for folders in floors.FLOORS)
    assert order == (
        "include, core < model, text < quant < ops, kv < backend < blocks, reduction"
        " < runtime < capi, bindings"
    )


@pytest.mark.parametrize("file", ["engine/include/framequilt/a.h", "engine/tools/a.cc"])
def test_public_headers_and_tools_include_public_headers_only(tree, file):
    assert not floors.include_violations(tree(file, '#include "framequilt/types.h"\n'))
    found = floors.include_violations(tree(file, '#include "src/core/core.h"\n'))
    assert len(found) == 1 and "public headers only" in found[0]


def test_angle_brackets_hide_nothing(tree):
    found = floors.include_violations(tree("engine/src/core/a.cc", "#  include <src/kv/kv.h>\n"))
    assert len(found) == 1 and "kv is above core" in found[0]


def test_backends_do_not_know_each_other(tree):
    tree("engine/src/backend/cpu/cpu.h", "#pragma once\n")
    tree("engine/src/backend/registry.cc", '#include "src/backend/cpu/cpu.h"\n')
    root = tree("engine/src/backend/cpu/gemm/tile.cc", '#include "src/backend/cpu/cpu.h"\n')
    assert not floors.include_violations(root)
    root = tree("engine/src/backend/cuda/a.cc", '#include "src/backend/cpu/cpu.h"\n')
    found = floors.include_violations(root)
    assert len(found) == 1 and "backends do not know each other" in found[0]


def test_a_quoted_include_must_name_a_file_of_the_engine(tree):
    root = tree("engine/src/core/a.cc", '#include "core.h"\n#include "hwy/highway.h"\n')
    found = floors.include_violations(root)
    assert len(found) == 1 and "engine/src/core/a.cc:1" in found[0]


def test_a_folder_outside_the_table_is_refused(tree):
    found = floors.include_violations(tree("engine/src/utils/a.h", "#pragma once\n"))
    assert found == ["engine/src/utils/a.h: is in no folder of the table of floors"]


@pytest.mark.parametrize("name", ["Qw" + "en2", "ll" + "ava", "BLOOM", "bloom_attention"])
def test_a_family_name_in_the_engine_is_found(tree, name):
    root = tree("engine/src/blocks/a.cc", f"// as {name} has it\n")
    assert len(floors.family_violations(root)) == 1


def test_a_bloom_filter_is_not_a_family(tree):
    assert not floors.family_violations(tree("engine/src/kv/a.cc", "// a bloomfilter of pages\n"))


def test_a_long_file_is_found_and_generated_stubs_are_not(tree):
    text = "x = 1\n" * (floors.MAX_LINES + 1)
    root = tree("python/framequilt/_framequilt.pyi", text)
    assert not floors.length_violations(root)
    root = tree("python/framequilt/a.py", text)
    assert floors.length_violations(root) == ["python/framequilt/a.py: 601 lines, more than 600"]


def test_a_note_to_do_later_is_found(tree):
    assert not floors.note_violations(tree("engine/src/core/a.h", "// todo lists are data here\n"))
    root = tree("engine/src/core/b.h", "// TO" + "DO: later\n")
    assert len(floors.note_violations(root)) == 1
