"""Counts the instructions of the main kernels under callgrind and compares them with a baseline.

    python tests/bench/instructions.py [--build DIR] [--update] [--only TEXT]

Counts repeat where timings do not: this gate works on a busy machine. Kernels run on the avx2
target, which valgrind can emulate, with one thread and fixed input. A case fails when it takes more
than `TOLERANCE` more instructions than instructions.json says; much fewer are reported too, so that
the baseline follows. `--update` writes what was counted: commit it with the change that caused it,
and say why in the message. The baseline belongs to a compiler: with another one it is not compared.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
BASELINE = HERE / "instructions.json"
TARGET = "avx2"
TOLERANCE = 0.03
FUNCTION = "fq_counted_call"


def compiler(program: Path) -> str:
    """The compiler that built `program`, as it noted in the file."""
    for match in re.finditer(
        rb"(GCC: \([^)]*\) [0-9.]+|clang version [0-9.]+)", program.read_bytes()
    ):
        return match[1].decode()
    return "unknown"


def build_type(program: Path) -> str:
    """CMAKE_BUILD_TYPE of the build folder that `program` is in."""
    for folder in program.resolve().parents:
        cache = folder / "CMakeCache.txt"
        if cache.is_file():
            found = re.search(r"^CMAKE_BUILD_TYPE:\w+=(.*)$", cache.read_text(), re.MULTILINE)
            return found[1] if found and found[1] else "none"
    return "unknown"


def choose(build: Path | None, root: Path) -> Path:
    """count_kernels of `build`, or of a Release build below `root`. Errors: RuntimeError.

    Assertions and a lower optimisation cost instructions: only a Release build is comparable.
    """
    places = [build] if build else sorted(root.glob("build/*/tests/bench"))
    programs = [place / "count_kernels" for place in places if (place / "count_kernels").is_file()]
    for program in programs:
        if build_type(program) == "Release":
            return program
    what = "; ".join(f"{p} is of build type {build_type(p)}" for p in programs)
    raise RuntimeError(
        f"{what or 'no count_kernels found'}. The baseline is of a Release build: cmake --preset "
        "release -DFRAMEQUILT_BENCH=ON && cmake --build build/release --target count_kernels"
    )


def count(program: Path, case: str) -> int:
    """Instructions inside the counted call of one case. Errors: RuntimeError."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        done = subprocess.run(
            [
                "valgrind", "--tool=callgrind", f"--toggle-collect={FUNCTION}",
                f"--callgrind-out-file={out}", str(program), TARGET, case,
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{case}: {done.stderr.strip().splitlines()[-1]}")
        found = re.search(r"^(?:totals|summary): (\d+)", out.read_text(), re.MULTILINE)
        if found is None or int(found[1]) == 0:
            raise RuntimeError(f"{case}: callgrind counted nothing")
        return int(found[1])


def compare(counted: dict[str, int], baseline: dict[str, int]) -> list[str]:
    """What is wrong: cases above the tolerance, and cases that only one side has."""
    wrong = []
    for case, instructions in counted.items():
        if case not in baseline:
            wrong.append(f"{case}: {instructions} instructions, not in the baseline")
        elif instructions > baseline[case] * (1 + TOLERANCE):
            share = instructions / baseline[case] - 1
            wrong.append(
                f"{case}: {instructions} instructions, {share:+.1%} (was {baseline[case]})"
            )
    wrong += [f"{case}: in the baseline only" for case in baseline if case not in counted]
    return wrong


def main(arguments: list[str]) -> int:
    """0 when nothing got slower, 1 when something did, 2 when it cannot be measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", type=Path, help="folder with count_kernels")
    parser.add_argument("--update", action="store_true", help="write the baseline")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args(arguments)
    try:
        program = choose(options.build, HERE.parents[1])
    except RuntimeError as reason:
        print(reason)
        return 2
    if shutil.which("valgrind") is None:
        print("needs valgrind")
        return 2
    listed = subprocess.run([program, "--list"], capture_output=True, text=True, check=True)
    cases = [case for case in listed.stdout.splitlines() if options.only in case]
    with ThreadPoolExecutor(2) as workers:
        counted = dict(zip(cases, workers.map(lambda c: count(program, c), cases), strict=True))
    stored = json.loads(BASELINE.read_text()) if BASELINE.is_file() else {}
    baseline = {c: n for c, n in stored.get("instructions", {}).items() if options.only in c}
    for case, instructions in counted.items():
        change = f"{instructions / baseline[case] - 1:+7.1%}" if case in baseline else "    new"
        print(f"{instructions:>12,} {change}  {case}")
    if options.update:
        merged = counted if not options.only else stored.get("instructions", {}) | counted
        document = {"compiler": compiler(program), "target": TARGET, "instructions": merged}
        BASELINE.write_text(json.dumps(document, indent=1) + "\n")
        return 0
    if stored.get("compiler") != compiler(program):
        print(f"built by {compiler(program)}, the baseline by {stored.get('compiler')}: "
              "not compared")  # fmt: skip
        return 2
    wrong = compare(counted, baseline)
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
