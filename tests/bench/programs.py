"""The programs that are compared: ours and the peers', and the model files they need.

A folder for peers holds llama/bin (llama-bench, llama-batched-bench, llama-mtmd-cli,
llama-quantize), venv (torch, ctranslate2, onnxruntime, onnx, gguf) and models; README.md says how
to fill it. What is missing there makes rows without a peer, never a failure. Models are made on
first use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import Runner, last_json
from shapes import DECODERS

HERE = Path(__file__).parent
MODELS = HERE / "models.py"
WORKER = HERE / "peer_worker.py"


def _llama(text: str) -> dict[str, Any]:
    """llama-bench and llama-batched-bench with JSON lines."""
    found = last_json(text)
    if "samples_ts" in found:
        return {"value": found["samples_ts"][0], "unit": "tok/s"}
    return {"value": found["speed_tg"], "unit": "tok/s"}


class Missing(Exception):
    """A program, or a model that cannot be made here; the text says which."""


def run(command: Sequence[str | os.PathLike[str]], environment: dict[str, str]) -> None:
    """Runs a step of preparation. Errors: Missing, with the end of what it said."""
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise Missing(f"{' '.join(map(str, command))}: {lines[-1] if lines else 'failed'}")


@dataclass(frozen=True)
class Programs:
    """Where programs and models are, and how many threads all of them get."""

    build: Path  # has bench_engine and limits
    models: Path
    peers: Path | None
    threads: int
    say: Callable[[str], None]
    cpu: bool = False  # CPU times are compared, see measure.py

    # Models ---------------------------------------------------------------------------------------

    def _made(self, path: Path, make: Callable[[Path], None]) -> Path:
        """`path`, made under another name and renamed, so that half a model is never used."""
        if path.exists():
            return path
        self.say(f"making {path.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name("partial-" + path.name)
        if partial.exists():
            raise Missing(f"{partial} is in the way: another run makes it, or one was interrupted")
        make(partial)
        os.replace(partial, path)
        return path

    def _python(self, arguments: Sequence[str | Path], peers: bool = False) -> None:
        python = self._peer_python() if peers else Path(sys.executable)
        package = HERE.parents[1] / "python"
        run([python, MODELS, *arguments], {"PYTHONPATH": str(package)})

    def ours(self, name: str, weights: str) -> Path:
        """A Framequilt model directory."""
        path = self.models / f"{name}-{weights}"
        if name != "smollm2-135m":
            return self._made(path, lambda to: self._python(["ours", name, weights, to]))

        def convert(to: Path) -> None:
            from framequilt.convert import convert

            convert(self._smollm2(), to, weights=weights, kv="kv16")

        return self._made(path, convert)

    def _smollm2(self) -> Path:
        from framequilt.errors import FramequiltError
        from framequilt.resources import smollm2_gguf

        try:
            return smollm2_gguf()
        except FramequiltError as error:
            raise Missing(str(error)) from error

    def gguf(self, name: str, kind: str) -> Path:
        """A GGUF file; SmolLM2 is the published one, requantized where another type is asked."""
        path = self.models / f"{name}-{kind}.gguf"
        if name != "smollm2-135m":
            return self._made(path, lambda to: self._python(["gguf", name, kind, to]))
        if kind == "q4_1":
            return self._smollm2()
        tool = self._llama_program("llama-quantize")
        command = [tool, "--allow-requantize", self._smollm2()]
        return self._made(path, lambda to: run([*command, to, kind.upper(), "2"], {}))

    def imported(self, name: str, kind: str) -> Path:
        """A GGUF file in our format, its codes as they are."""

        def make(to: Path) -> None:
            from framequilt.convert import convert

            # The published file has a tokenizer, random ones have not.
            tokenizer = None if name == "smollm2-135m" else self.hf(name)
            convert(self.gguf(name, kind), to, kv="kv16", tokenizer=tokenizer)

        return self._made(self.models / f"{name}-{kind}-imported", make)

    def mmproj(self, kind: str) -> Path:
        """llama.cpp's tower, for SmolLM2, whose file has the vocabulary that its program needs."""
        width = str(DECODERS["smollm2-135m"].hidden)
        path = self.models / f"siglip-{kind}.gguf"
        return self._made(path, lambda to: self._python(["mmproj", kind, width, to]))

    def hf(self, name: str) -> Path:
        """A checkpoint folder for converters of peers."""
        return self._made(self.models / f"{name}-hf", lambda to: self._python(["hf", name, to]))

    def onnx(self, int8: bool) -> Path:
        """The vision tower, in a folder with its weights."""
        folder = self._made(self.models / "siglip-onnx", self._make_onnx)
        plain = folder / "siglip.onnx"
        if not int8:
            return plain
        quantized = folder / "int8" / "siglip.onnx"

        def make(to: Path) -> None:
            to.mkdir()
            python = self._peer_python()
            run([python, WORKER, "ort-quantize", plain, to / "siglip.onnx"], {})

        self._made(quantized.parent, make)
        return quantized

    def _make_onnx(self, to: Path) -> None:
        to.mkdir()
        self._python(["onnx", to / "siglip.onnx"], peers=True)

    def ct2(self, name: str) -> Path:
        """A CTranslate2 directory in int8."""
        python = self._peer_python()

        def make(to: Path) -> None:
            tool = python.parent / "ct2-transformers-converter"
            command = [tool, "--model", self.hf(name), "--output_dir", to]
            run([*command, "--quantization", "int8_float32", "--low_cpu_mem_usage"], {})

        return self._made(self.models / f"{name}-ct2", make)

    # Programs -------------------------------------------------------------------------------------

    def _llama_program(self, name: str) -> Path:
        if self.peers is None:
            raise Missing("no folder of peers was given")
        path = self.peers / "llama" / "bin" / name
        if not path.is_file():
            raise Missing(f"{path} is not there")
        return path

    def _peer_python(self) -> Path:
        if self.peers is None:
            raise Missing("no folder of peers was given")
        path = self.peers / "venv" / "bin" / "python"
        if not path.is_file():
            raise Missing(f"{path} is not there")
        return path

    # `less` replaces options for the short workload of a comparison of CPU times; `work` is what
    # the full one does more (see measure.Runner).

    def engine(
        self,
        label: str,
        model: Path,
        mode: str,
        less: dict[str, Any] | None = None,
        work: float = 0.0,
        rate: bool = True,
        **options: Any,
    ) -> Runner:
        """Ours: bench_engine."""

        def command(options: dict[str, Any]) -> tuple[str, ...]:
            result = [str(self.build / "bench_engine"), str(model), mode]
            # A warm-up of the full size would count twice in a CPU time.
            more = {"warm-up": 0} if self.cpu and mode in ("prefill", "vision") else {}
            for key, value in {"threads": self.threads, **more, **options}.items():
                if key == "activations" and value != "a16":
                    head = str(value).partition(",")[0]
                    value = f"{value},head={head}"  # a peer's head has integer inputs too
                result += [f"--{key.replace('_', '-')}", str(value)]
            return tuple(result)

        short = command(options | less) if less else ()
        return Runner(label, command(options), last_json, (), short, work, rate)

    def llama_bench(
        self,
        label: str,
        model: Path,
        less: dict[str, Any] | None = None,
        work: float = 0.0,
        **options: Any,
    ) -> Runner:
        """llama.cpp: prompt (p), generation (n), at a depth (d), with KV types (ctk, ctv)."""
        program = str(self._llama_program("llama-bench"))

        def command(options: dict[str, Any], *more: str) -> tuple[str, ...]:
            result = [program, "-m", str(model), "-r", "1", "-t", str(self.threads)]
            result += ["-o", "jsonl", *more]
            for key, value in options.items():
                result += [f"-{key}", str(value)]
            return tuple(result)

        # Its warm-up repeats the prompt, so that it would count twice in a CPU time.
        more = ("--no-warmup",) if self.cpu else ()
        short = command(options | less, *more) if less else ()
        return Runner(label, command(options, *more), _llama, (), short, work)

    def llama_batch(
        self, label: str, model: Path, prompt: int, tokens: int, less: int, batch: int
    ) -> Runner:
        """llama.cpp decoding `batch` sequences at once after prompts of `prompt` tokens."""
        program = str(self._llama_program("llama-batched-bench"))

        def command(tokens: int) -> tuple[str, ...]:
            result = [program, "-m", str(model), "-t", str(self.threads), "-npp", str(prompt)]
            result += ["-c", str(batch * (prompt + tokens)), "-ntg", str(tokens)]
            return (*result, "-npl", str(batch), "--output-format", "jsonl")

        work = batch * (tokens - less)
        return Runner(label, command(tokens), _llama, (), command(less), work)

    def llama_tower(self, kind: str) -> Runner:
        """llama.cpp's tower: seconds of a frame."""
        program = self._llama_program("llama-mtmd-cli")
        model = self.gguf("smollm2-135m", "q4_1")
        return self.worker(f"llama.cpp {kind}", "mtmd", program, model, self.mmproj(kind))

    def worker(
        self,
        label: str,
        *arguments: str | Path,
        less: Sequence[str | Path] = (),
        work: float = 0.0,
        rate: bool = True,
    ) -> Runner:
        """A peer that is a Python package."""
        python = str(self._peer_python())

        def command(arguments: Sequence[str | Path]) -> tuple[str, ...]:
            return (python, str(WORKER), *map(str, arguments))

        variables = (
            ("BENCH_THREADS", str(self.threads)),
            ("BENCH_WARM_UP", "short" if self.cpu else "full"),
            ("OMP_NUM_THREADS", str(self.threads)),
        )
        short = command(less) if less else ()
        return Runner(label, command(arguments), last_json, variables, short, work, rate)


def versions(programs: Programs) -> dict[str, str]:
    """Versions of the peers' packages."""
    found: dict[str, str] = {}
    if programs.peers is None:
        return found
    python = programs.peers / "venv" / "bin" / "python"
    if python.is_file():
        listed = subprocess.run(
            [python, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True
        )
        names = ("torch", "transformers", "ctranslate2", "onnxruntime")
        for entry in json.loads(listed.stdout or "[]"):
            if entry["name"] in names:
                found[entry["name"]] = entry["version"]
    bench = programs.peers / "llama" / "bin" / "llama-bench"
    if bench.is_file():
        shown = subprocess.run([bench, "--version"], capture_output=True, text=True)
        lines = [line for line in (shown.stdout + shown.stderr).splitlines() if "version" in line]
        found["llama.cpp"] = lines[0].split(":", 1)[-1].strip() if lines else "unknown"
    return found
