"""`framequilt doctor`: is this machine, this installation and this model fit to run?"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from framequilt import _native
from framequilt.cli import common
from framequilt.cli.common import guarded, human_bytes, out, pairs, print_json
from framequilt.errors import FramequiltError

if TYPE_CHECKING:
    from framequilt.engine import Engine

_OPTIONAL = {
    "av": "video files (extra: video)",
    "gguf": "converting GGUF files (extra: convert)",
    "torch": "training the demo model (extra: train)",
}


def _memory() -> dict[str, int]:
    """Total and available bytes of the machine; empty where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
        return {
            name: int(lines[key].split()[0]) * 1024
            for name, key in (("total", "MemTotal"), ("available", "MemAvailable"))
        }
    except (OSError, KeyError, ValueError):
        return {}


def _physical_cores() -> int | None:
    """Distinct cores among those this process may use; None where the system does not say."""
    seen = set()
    try:
        for cpu in sorted(os.sched_getaffinity(0)):
            base = f"/sys/devices/system/cpu/cpu{cpu}/topology"
            with open(f"{base}/physical_package_id") as a, open(f"{base}/core_id") as b:
                seen.add((a.read().strip(), b.read().strip()))
    except (OSError, AttributeError):
        return None
    return len(seen)


def machine() -> dict[str, Any]:
    """What is here, as plain data."""
    import framequilt

    native: dict[str, Any] = {"available": False, "version": None, "simd": [], "error": None}
    try:
        module = _native.load()
        native.update(available=True, version=module.version(), simd=list(module.cpu_targets()))
    except FramequiltError as error:
        native["error"] = str(error)
    return {
        "framequilt": framequilt.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "machine": platform.machine(),
        "engine": native,
        "logical_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "physical_cores": _physical_cores(),
        "memory_bytes": _memory(),
        "optional": {name: importlib.util.find_spec(name) is not None for name in _OPTIONAL},
    }


def self_test(engine: Engine) -> list[dict[str, Any]]:
    """Small checks that need no known answer: each must hold for any model."""
    import numpy as np

    ids = engine.chat.encode([{"role": "user", "content": "Hello"}])
    greedy = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    results: list[dict[str, Any]] = []

    def check(name: str, body: Callable[[], str | None]) -> None:
        try:
            trouble = body()
        except FramequiltError as error:
            trouble = str(error)
        results.append({"check": name, "passed": trouble is None, "trouble": trouble})

    def differ(name: str, *answers: tuple[int, ...]) -> str | None:
        return None if len(set(answers)) == 1 else f"{name}: {answers}"

    def repeats() -> str | None:
        one, two = (engine.generate(ids, sampling=greedy).token_ids for _ in range(2))
        return differ("two runs differ", one, two)

    def together() -> str | None:
        alone = engine.generate(ids, sampling=greedy).token_ids
        both = engine.generate_batch([{"prompt": ids, "sampling": greedy}] * 2)
        return differ("company changes the answer", alone, *(r.token_ids for r in both))

    def finite() -> str | None:
        logits = engine.prompt_logits(ids)
        return None if np.isfinite(logits).all() else "logits are not finite"

    def video() -> str | None:
        noise = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), np.uint8)
        whole = engine.generate("What is this?", video=noise, sampling=greedy)
        same = engine.generate("What is this?", video=noise, sampling=greedy, reduction=1.0)
        reduced = engine.generate("What is this?", video=noise, sampling=greedy, reduction=0.5)
        if reduced.usage.reduction.mean_kept_share >= 1.0:
            return "cost 0.5 removed nothing"
        return differ("cost 1 is not the identity", whole.token_ids, same.token_ids)

    def clean() -> str | None:
        engine.check_integrity()
        stats = engine.stats()
        held = stats["pages_total"] - stats["pages_free"]
        return None if held == 0 else f"{held} KV pages are still held"

    check("logits are finite", finite)
    check("the same question has the same answer", repeats)
    check("answers do not depend on company", together)
    if engine.preprocessor is not None:
        check("video with and without token reduction", video)
    check("every KV page came back", clean)
    return results


def _show(record: dict[str, Any]) -> None:
    console = out()
    engine, memory = record["engine"], record["memory_bytes"]
    state = f"{engine['version']}, SIMD: {', '.join(engine['simd'])}"
    rows = [
        ("framequilt", record["framequilt"]),
        ("engine", state if engine["available"] else engine["error"]),
        ("python", record["python"]),
        ("platform", record["platform"]),
        ("cores", f"{record['physical_cores'] or '?'} of {record['logical_cores']} threads"),
    ]
    if memory:
        total, available = human_bytes(memory["total"]), human_bytes(memory["available"])
        rows.append(("memory", f"{available} available of {total}"))
    for name, present in record["optional"].items():
        rows.append((name, ("present" if present else "absent") + f": {_OPTIONAL[name]}"))
    console.print(pairs("machine", rows))
    if record["self_test"] is not None:
        rows = [
            (
                "pass" if entry["passed"] else "FAIL",
                entry["check"] + ("" if entry["passed"] else f": {entry['trouble']}"),
            )
            for entry in record["self_test"]
        ]
        console.print(pairs("\nself-test", rows))


@guarded
def command(
    model: Annotated[str | None, typer.Argument(help="Model directory to test.")] = None,
    memory: common.MemoryOption = "256MiB",
    as_json: common.JsonOption = False,
) -> None:
    """Check this machine and installation; with a model, run a short self-test."""
    record = {**machine(), "self_test": None}
    if model is not None:
        from framequilt.engine import Engine

        with Engine(model, memory=memory) as engine:
            record["self_test"] = self_test(engine)
    if as_json:
        print_json(record)
    else:
        _show(record)
    failed = any(not entry["passed"] for entry in record["self_test"] or ())
    if failed or not record["engine"]["available"]:
        raise typer.Exit(1)
