"""Compares Framequilt with its peers in one run on this machine.

    python tests/bench/run.py [--quick] [--only NAME] [--peers DIR] [--build DIR] [--out DIR]
                              [--merge RESULTS]

Writes results.json, table.md and ratios.png. Without --peers only ours is measured. README.md says
what each row means and how to set up the peers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "python")]

from rich.console import Console  # noqa: E402 (our own modules are beside this file)
from rich.markdown import Markdown  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from benches import Bench, all_benches, tiny_benches  # noqa: E402 isort: skip
from measure import alternate, machine  # noqa: E402 isort: skip
from merging import Mismatch, check, earlier, merge, series_of  # noqa: E402 isort: skip
from processor import processor_name  # noqa: E402 isort: skip
from programs import Programs, versions  # noqa: E402 isort: skip
from report import budget, markdown, rows, write  # noqa: E402 isort: skip


def _arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="one sample, short workloads, small models")
    add("--tiny", action="store_true", help="toy models only: does the harness work?")
    add("--only", action="append", default=[], help="benches whose name contains this; repeatable")
    add("--peers", type=Path, help="folder of the peers (see README.md)")
    add("--models", type=Path, help="folder of models (default: models in --peers, or .cache)")
    add("--build", type=Path, help="folder with bench_engine and limits")
    add("--out", type=Path, default=Path("build/bench-results"))
    add("--merge", type=Path, help="results.json of earlier calls: what is not run now is kept")
    add("--samples", type=int, help="of each program (3; quick: 1)")
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--activations", default="a8", help="of the long workloads (a8)")
    add("--cpu", action="store_true", help="compare CPU times of one thread: for busy machines")
    add("--patience", type=float, default=5.0, help="seconds to wait for a quiet machine")
    add("--list", action="store_true", help="names of the benches")
    return parser.parse_args(arguments)


def _build(chosen: Path | None) -> Path:
    """The folder with the programs. Errors: SystemExit, which says how to make them."""
    root = HERE.parents[1]
    places = [chosen] if chosen else [*root.glob("build/*/tests/bench")]
    for place in places:
        if (place / "bench_engine").is_file():
            return place.resolve()
    sys.exit(
        "bench_engine was not found: cmake --preset release -DFRAMEQUILT_BENCH=ON && "
        "cmake --build build/release --target bench_engine limits, or give --build"
    )


def _revision() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _read_bandwidth(limits: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """The best seen around a bench, as a share of a disturbed limit would flatter us; the least."""
    seen = [found["read_gbytes_per_s"]["max"] for found in limits if found]
    return (max(seen), min(seen)) if seen else (None, None)


def _save(
    document: dict[str, Any], before: dict[str, Any] | None, order: list[str], out: Path
) -> dict[str, Any]:
    """Writes and returns `document`, joined with the results of earlier calls."""
    merged = merge(before, document, order)
    if document["clock"] == "wall":  # CPU times of single threads do not add up to an answer
        merged["budget"] = budget(series_of(merged), earlier(merged))
    write(merged, out)
    return merged


def main(arguments: list[str]) -> int:
    """Runs what was asked and prints the table."""
    options = _arguments(arguments)
    console = Console()
    build = Path() if options.list else _build(options.build)
    limits = build / "limits"
    peers = options.peers.resolve() if options.peers else None
    models = options.models or (peers / "models" if peers else Path(".cache/bench"))
    threads = 1 if options.cpu else options.threads
    programs = Programs(
        build, models.resolve(), peers, threads, lambda text: console.log(text), options.cpu
    )
    samples = options.samples or (1 if options.quick or options.tiny else 3)
    found = (
        tiny_benches(programs)
        if options.tiny
        else all_benches(programs, options.quick, options.activations)
    )
    chosen = [b for b in found if not options.only or any(o in b.name for o in options.only)]
    if options.list:
        for bench in chosen:
            print(f"{bench.name:28s} {bench.title}")
        return 0
    if not chosen:
        sys.exit(f"no bench has {options.only} in its name; --list shows them")
    document: dict[str, Any] = {
        "machine": processor_name(),
        "threads": threads,
        "clock": "CPU time" if options.cpu else "wall",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "revision": _revision(),
        "samples": samples,
        "versions": versions(programs),
        "limits": {},
        "rows": [],
        "budget": [],
        "series": {},
    }
    before = None
    if options.merge:
        try:
            before = json.loads(options.merge.read_text())
            check(before, document)
        except (OSError, ValueError, Mismatch) as reason:
            sys.exit(f"--merge {options.merge}: {reason}")
    order = [bench.name for bench in found]
    for bench in chosen:
        bench.prepare()

    runs = 1 if options.tiny else 3
    measured: list[dict[str, Any]] = [machine(limits, runs, threads)]
    document["limits"]["before"] = measured[0]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=console) as progress:
        total = sum(samples * (len(b.ours) + len(b.peers)) for b in chosen)
        task = progress.add_task("", total=total)
        for bench in chosen:

            def step(name: str, bench: Bench = bench) -> None:
                progress.update(task, description=f"{bench.name}: {name}", advance=1)

            limited = tuple(
                name for target in bench.targets if target.limit_share for name in target.ours
            )

            def read_now(name: str, limited: tuple[str, ...] = limited) -> float | None:
                if options.cpu or not name.startswith(limited):
                    return None
                return _read_bandwidth([machine(limits, 1, threads)])[0]

            everyone = [*bench.ours, *bench.peers]
            series = alternate(everyone, samples, options.patience, step, options.cpu, read_now)
            measured.append(machine(limits, 1, threads))
            # One thread of a busy machine says nothing about the bandwidth of all.
            read = (None, None) if options.cpu else _read_bandwidth(measured[-2:])
            document["rows"] += rows(bench, series, *read)
            document["series"][bench.name] = [s.to_json() for s in series.values()]
            # Written after every bench: what was measured survives an interruption.
            _save(document, before, order, options.out)
    document["limits"]["after"] = machine(limits, runs, threads)
    console.print(Markdown(markdown(_save(document, before, order, options.out))))
    print(f"{options.out}/results.json, table.md, ratios.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
