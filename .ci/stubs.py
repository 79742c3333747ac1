"""Writes python/framequilt/_framequilt.pyi from the compiled module; with --check, compares."""

from __future__ import annotations

import difflib
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
MODULE = "framequilt._framequilt"
STUB = ROOT / "python" / "framequilt" / "_framequilt.pyi"
HEADER = "# Made from the compiled module by `make stubs`; do not edit.\n"


def generate() -> str:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pybind11_stubgen", MODULE, "--output-dir", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"pybind11-stubgen failed:\n{done.stdout}{done.stderr}")
        made = Path(folder, *MODULE.split(".")).with_suffix(".pyi")
        made.write_text(HEADER + made.read_text())
        ruff = [BIN / "ruff", "--quiet", "--config", ROOT / "pyproject.toml"]
        subprocess.run(
            [ruff[0], "check", *ruff[1:], "--fix", "--select", "I", made], check=True, cwd=folder
        )
        subprocess.run([ruff[0], "format", *ruff[1:], made], check=True, cwd=folder)
        return made.read_text()


def main() -> int:
    check = "--check" in sys.argv[1:]
    if not any((ROOT / "python" / "bindings").glob("**/*.cc")):
        print("stubs: there is no compiled module yet")
        return 0
    text = generate()
    have = STUB.read_text() if STUB.exists() else ""
    if text == have:
        print("stubs: up to date")
        return 0
    if not check:
        STUB.write_text(text)
        print(f"stubs: wrote {STUB.relative_to(ROOT)}")
        return 0
    diff = difflib.unified_diff(
        have.splitlines(), text.splitlines(), "committed", "compiled", lineterm=""
    )
    print("\n".join(list(diff)[:60]))
    print("stubs: the stub does not describe the compiled module: run `make stubs`")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
