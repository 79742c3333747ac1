"""Everything that reads the code without running it: `make lint`, or `.ci/lint.py STEP...`.

clang-tidy remembers what it found nothing in: a file is looked at again when the file, a header of
ours that it includes, the configuration or the tool changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
CACHE = ROOT / "build" / "lint-cache"
COMMANDS = ROOT / "build" / "dev" / "compile_commands.json"
CXX_TOPS = ("engine", "tests", "python/bindings")
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def run(*command: str | Path) -> bool:
    print("$", *(str(part).replace(f"{BIN}/", "") for part in command[:4]), "...", flush=True)
    return subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode == 0


def cxx_files() -> list[str]:
    found = (path for top in CXX_TOPS for path in (ROOT / top).rglob("*"))
    return sorted(str(p.relative_to(ROOT)) for p in found if p.suffix in {".cc", ".h"})


def clang_format() -> bool:
    return run(BIN / "clang-format", "--dry-run", "-Werror", *cxx_files())


def closure(path: Path, seen: dict[Path, bytes]) -> None:
    """Adds a file and, recursively, the headers of this repository that it includes."""
    if path in seen or not path.is_file():
        return
    seen[path] = path.read_bytes()
    for name in INCLUDE.findall(seen[path].decode("utf-8", "replace")):
        for base in (ROOT / "engine", ROOT / "engine" / "include"):
            closure(base / name, seen)


def tidy_key(source: Path, command: str) -> str:
    seen: dict[Path, bytes] = {}
    closure(source, seen)
    digest = hashlib.sha256(command.encode())
    for path in sorted(seen):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + seen[path] + b"\0")
    return digest.hexdigest()


def clang_tidy() -> bool:
    tool = BIN / "clang-tidy"
    version = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    base = version + (ROOT / ".clang-tidy").read_text()
    entries = [
        entry
        for entry in json.loads(COMMANDS.read_text())
        if (ROOT / "engine" / "src") in Path(entry["file"]).parents
    ]
    CACHE.mkdir(parents=True, exist_ok=True)

    def check(entry: dict[str, str]) -> tuple[str, bool, str]:
        source = Path(entry["file"])
        name = str(source.relative_to(ROOT))
        mark = CACHE / tidy_key(source, base + entry["command"])
        if mark.exists():
            mark.touch()
            return name, True, ""
        # One SIMD target is enough to read a kernel; all of them would cost ten times as much.
        command = [tool, "-p", COMMANDS.parent, "--quiet", source]
        command += ["--extra-arg=-DHWY_COMPILE_ONLY_STATIC"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode == 0:
            mark.touch()
        return name, done.returncode == 0, done.stdout + done.stderr

    print(f"$ clang-tidy, {len(entries)} files of engine/src", flush=True)
    good = True
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for name, ok, output in pool.map(check, entries):
            if not ok:
                print(f"--- {name}\n{output}", flush=True)
                good = False
    forget = time.time() - 30 * 86400
    for mark in CACHE.iterdir():
        if mark.stat().st_mtime < forget:
            mark.unlink()
    return good


def ruff() -> bool:
    tops = ("python", "tests", ".ci")
    return all([run(BIN / "ruff", "check", *tops), run(BIN / "ruff", "format", "--check", *tops)])


def mypy() -> bool:
    return run(BIN / "mypy")


def stubs() -> bool:
    return run(sys.executable, ROOT / ".ci" / "stubs.py", "--check")


STEPS: dict[str, Callable[[], bool]] = {
    "clang-format": clang_format,
    "ruff": ruff,
    "stubs": stubs,
    "mypy": mypy,
    "clang-tidy": clang_tidy,
}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        print(f"no such step: {shlex.join(unknown)}; there are: {', '.join(STEPS)}")
        return 2
    failed = []
    for name in names or list(STEPS):
        start = time.monotonic()
        ok = STEPS[name]()
        print(f"lint: {name}: {'ok' if ok else 'FAILED'} ({time.monotonic() - start:.0f} s)")
        if not ok:
            failed.append(name)
    print(f"lint: {'FAILED: ' + ', '.join(failed) if failed else 'clean'}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
