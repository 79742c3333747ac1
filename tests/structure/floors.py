"""The rules on the shape of the source tree, as functions that return what breaks them.

Floors, from the ground up; a file includes only from its own floor or below:

    include, core < model, text < quant < ops, kv < backend < blocks, reduction < runtime
    < capi, python/bindings

On top of that: public headers and engine/tools include public headers only (they must work where
the library is installed); backend/<one> and backend/<other> do not know each other; the engine
names no model family; files stay short; nothing is left as a note to do later.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

FLOORS: tuple[tuple[str, ...], ...] = (
    ("include", "core"),
    ("model", "text"),
    ("quant",),
    ("ops", "kv"),
    ("backend",),
    ("blocks", "reduction"),
    ("runtime",),
    ("capi", "bindings"),
)
FLOOR_OF = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}
PUBLIC_ONLY = ("include", "tools")

CODE = {".cc", ".h", ".cu", ".cuh", ".inc"}
MAX_LINES = 600
FAMILIES = re.compile(
    r"falcon|bloom(?!f)|gemma|chatglm|stablelm|vicuna|minicpm|qwen|llava|internvl|nvila",
    re.IGNORECASE,
)
NOTES = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME)\b")
INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"(?P<quoted>[^"]+)"|<(?P<angled>[^>]+)>)')
THIRD_PARTY = re.compile(
    r"^(?:hwy|nlohmann|gtest|gmock|pybind11)/|^(?:pcre2|sentencepiece_\w+|utf8proc)\.h$"
)


def _code_files(root: Path) -> Iterator[Path]:
    for top in ("engine", "python/bindings"):
        for path in sorted((root / top).rglob("*")):
            if path.suffix in CODE and path.is_file():
                yield path


def _area(parts: tuple[str, ...]) -> tuple[str, str]:
    """Folder on the table of floors, and the sub-folder below it ('' if none), of a path."""
    if parts[:2] == ("engine", "include"):
        return "include", ""
    if parts[:2] == ("python", "bindings"):
        return "bindings", ""
    if parts[:2] == ("engine", "src") and len(parts) > 3:
        return parts[2], parts[3] if len(parts) > 4 else ""
    if parts[:2] == ("engine", "tools"):
        return "tools", ""
    return "", ""


def _resolve(root: Path, name: str) -> Path | None:
    """The file of this repository that an include names, relative to the root, or None."""
    for base in ("engine", "engine/include", "python/bindings"):
        if (root / base / name).is_file():
            return Path(base) / name
    return None


def include_violations(root: Path) -> list[str]:
    """Includes that go up, sideways between backends, into private headers, or nowhere."""
    found = []
    for path in _code_files(root):
        here = path.relative_to(root)
        area, sub = _area(here.parts)
        if area not in FLOOR_OF and area != "tools":
            found.append(f"{here}: is in no folder of the table of floors")
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            match = INCLUDE.match(line)
            if match is None:
                continue
            name = match["quoted"] or match["angled"]
            where = f"{here}:{number}: includes {name}"
            target = _resolve(root, name)
            if target is None:
                if match["quoted"] and not THIRD_PARTY.match(name):
                    found.append(f"{where}, which is not a path from engine/ or engine/include/")
                continue
            other, other_sub = _area(target.parts)
            if area in PUBLIC_ONLY and other != "include":
                found.append(f"{where}, but {area} includes public headers only")
            elif other not in FLOOR_OF:
                found.append(f"{where}, which is in no folder of the table of floors")
            elif area in FLOOR_OF and FLOOR_OF[other] > FLOOR_OF[area]:
                found.append(f"{where}, but {other} is above {area}")
            elif area == other == "backend" and sub and other_sub and sub != other_sub:
                found.append(f"{where}, but backends do not know each other")
    return found


def family_violations(root: Path) -> list[str]:
    """Lines of engine/ that name a model family. Families are data, made by the converter."""
    found = []
    for path in sorted((root / "engine").rglob("*")):
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), start=1):
            match = FAMILIES.search(line)
            if match:
                found.append(f"{path.relative_to(root)}:{number}: names the family {match[0]!r}")
        if FAMILIES.search(path.name):
            found.append(f"{path.relative_to(root)}: its name names a family")
    return found


def _all_sources(root: Path, tops: tuple[str, ...]) -> Iterator[Path]:
    for top in tops:
        for path in sorted((root / top).rglob("*")):
            if path.suffix in CODE | {".py"} and path.is_file():
                yield path


def length_violations(root: Path) -> list[str]:
    """Source files of engine/ and python/ that are too long to be one concept."""
    found = []
    for path in _all_sources(root, ("engine", "python")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            found.append(f"{path.relative_to(root)}: {lines} lines, more than {MAX_LINES}")
    return found


def note_violations(root: Path) -> list[str]:
    """Notes to do something later, in any source file."""
    found = []
    for path in _all_sources(root, ("engine", "python", "tests")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if NOTES.search(line):
                found.append(f"{path.relative_to(root)}:{number}: {line.strip()}")
    return found
