"""Accuracy of the demo model as the engine runs it: real codes, quantized KV, token reduction.

    python -m framequilt.demo.engine_eval --weights f32,w8,w4g128 --kv kv32,kv8,kv8 --each 100
    python -m framequilt.demo.engine_eval --weights w8,w8 --kv kv8,kv8 \\
        --activations "a8;a8,attention=a8"

Every combination answers the same questions about the same held-out scenes, so that differences are
paired. The training side's `evaluate` is the other implementation of the same measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from framequilt import Engine, FrameFusion, Sampling
from framequilt.convert import convert
from framequilt.demo.scenes import KINDS, QA, Scene, make_scene
from framequilt.demo.show import CHECKPOINT

# Held out from training (`scenes.HELD_OUT_END`), apart from the seeds the demo shows.
FIRST_SEED = 2_000_000
GREEDY = Sampling(temperature=0.0, max_tokens=8)


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share (Wilson, 1927)."""
    if n == 0:
        return 0.0, 1.0
    p = hits / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def collect(each: int, frames: int, first_seed: int = FIRST_SEED) -> list[tuple[Scene, list[QA]]]:
    """Scenes with questions until every kind has `each` (or 500 scenes in a row add none)."""
    seen: dict[str, int] = defaultdict(int)
    out = []
    seed, idle = first_seed, 0
    while idle < 500 and any(seen[kind] < each for kind in KINDS):
        scene = make_scene(seed, frames)
        wanted = [qa for qa in scene.questions if seen[qa.kind] < each]
        seed, idle = seed + 1, 0 if wanted else idle + 1
        for qa in wanted:
            seen[qa.kind] += 1
        if wanted:
            out.append((scene, wanted))
    return out


def run(
    engine: Engine, scenes: Sequence[tuple[Scene, list[QA]]], costs: Sequence[float], name: str
) -> dict[str, Any]:
    """Asks everything at every cost; returns hits by kind and what was kept."""
    hits: dict[float, dict[str, list[int]]] = {c: {k: [0, 0] for k in KINDS} for c in costs}
    kept: dict[float, list[float]] = {c: [] for c in costs}
    for scene, questions in track(scenes, description=name, transient=True):
        for cost in costs:
            way = FrameFusion(cost=cost) if cost < 1.0 else None
            results = engine.generate_batch(
                [
                    {
                        "prompt": qa.question,
                        "video": scene.frames,
                        "reduction": way,
                        "sampling": GREEDY,
                    }
                    for qa in questions
                ]
            )
            for qa, result in zip(questions, results, strict=True):
                count = hits[cost][qa.kind]
                count[0] += result.text.strip() == qa.answer
                count[1] += 1
                usage = result.usage
                kept[cost].append(
                    float(np.mean(usage.visual_per_layer)) / max(1, usage.visual_tokens)
                )
    return {
        str(cost): {
            "kinds": {
                kind: {"n": n, "accuracy": h / n, "interval": wilson(h, n)}
                for kind, (h, n) in hits[cost].items()
                if n
            },
            "average_over_kinds": float(
                np.mean([h / n for h, n in hits[cost].values() if n] or [0.0])
            ),
            "mean_visual_share": float(np.mean(kept[cost])),
        }
        for cost in costs
    }


def table_of(results: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="accuracy in percent (95% interval)", title_justify="left")
    table.add_column("kind")
    columns = [(name, cost) for name, by_cost in results.items() for cost in by_cost]
    for name, cost in columns:
        header = name.replace("/", "\n").replace(",", ",\n")
        table.add_column(f"{header}\ncost {cost}", justify="right", overflow="fold")
    for kind in KINDS:
        cells = []
        for name, cost in columns:
            found = results[name][cost]["kinds"].get(kind)
            if found is None:
                cells.append("")
                continue
            low, high = found["interval"]
            cells.append(f"{100 * found['accuracy']:.0f} ({100 * low:.0f}-{100 * high:.0f})")
        table.add_row(kind, *cells)
    for label, key in (("mean of kinds", "average_over_kinds"), ("kept", "mean_visual_share")):
        table.add_row(label, *(f"{100 * results[n][c][key]:.1f}" for n, c in columns))
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--weights", default="f32,w4g128", help="formats, comma separated")
    parser.add_argument("--kv", default="kv32,kv8", help="one KV format for each weight format")
    parser.add_argument(
        "--activations",
        default="a16",
        help="one for each weight format, with ; between; or for all",
    )
    parser.add_argument("--costs", default="1.0,0.3")
    parser.add_argument("--each", type=int, default=100, help="questions of each kind")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    weights_of, kv_of = args.weights.split(","), args.kv.split(",")
    inputs_of = args.activations.split(";")
    if len(inputs_of) == 1:
        inputs_of *= len(weights_of)
    formats = list(zip(weights_of, kv_of, inputs_of, strict=True))
    costs = [float(c) for c in args.costs.split(",")]
    scenes = collect(args.each, args.frames)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (weights, kv, inputs) in enumerate(formats):
            name = f"{weights}/{kv}" + ("" if inputs == "a16" else f"/{inputs}")
            model = Path(folder) / str(number)
            convert(args.checkpoint, model, weights=weights, kv=kv, activations=inputs)
            with Engine(model, memory="512MiB") as engine:
                results[name] = run(engine, scenes, costs, name)
    # A file takes any width: nothing has to be folded.
    Console(width=None if sys.stdout.isatty() else 400).print(table_of(results))
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
