"""Accuracy of a demo checkpoint on unseen videos, with and without FrameFusion.

    python -m framequilt.demo.evaluate --checkpoint DIR --out eval.json --each 200

Answers are greedy and count when they equal the expected text. The same questions are asked
at every cost. Intervals are Wilson's at 95%. The similarity threshold follows the paper's rule:
the median cosine between rows of the same slot in neighbouring frames at the first layer, per
video, averaged over videos (other videos than those asked about).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from framequilt.demo.export import load_checkpoint
from framequilt.demo.fusion import TEXT, Params, State, generate
from framequilt.demo.generate import read_mp4, resize_frames, write_mp4
from framequilt.demo.merging import frame_cosines
from framequilt.demo.model import DemoModel, to_images
from framequilt.demo.scenes import KINDS, QA, make_scene
from framequilt.demo.tokenizer import Prompts

THRESHOLD_SEED = 500_000_000
QUESTION_SEED = 600_000_000


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share."""
    if n == 0:
        return 0.0, 1.0
    p = hits / n
    middle = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (middle - spread) / scale, (middle + spread) / scale


def video_frames(seed: int, frames: int, size: int, mp4: bool) -> npt.NDArray[np.uint8]:
    """Frames of a held-out video, optionally through a 256 pixel H.264 file and bicubic resize."""
    if not mp4:
        return make_scene(seed, frames, size).frames
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, make_scene(seed, frames, 256).frames)
        return resize_frames(read_mp4(path), size)


def visual(model: DemoModel, frames: npt.NDArray[np.uint8]) -> Tensor:
    """[F, size, size, 3] -> visual rows [F, P, width]."""
    out: Tensor = model.vision(to_images(torch.from_numpy(frames)))
    return out


def median_cosine(model: DemoModel, videos: int, frames: int) -> float:
    """The paper's threshold rule."""
    medians = []
    for seed in range(THRESHOLD_SEED, THRESHOLD_SEED + videos):
        rows = visual(model, video_frames(seed, frames, model.config.image_size, False))
        medians.append(float(frame_cosines(rows[None]).median()))
    return float(np.mean(medians))


@dataclass
class Asker:
    """A video's visual rows between the prompt's fixed texts."""

    model: DemoModel
    prompts: Prompts

    def prompt(self, rows: Tensor, question: str) -> tuple[Tensor, Tensor]:
        """Embeddings [n, width] and slots [n] of a whole single-turn prompt."""
        embed = self.model.language.embed_tokens.weight
        before, after = self.prompts.prefix, self.prompts.question(question)
        x = torch.cat([embed[before], rows.flatten(0, 1), embed[after]])
        slots = torch.full((x.shape[0],), TEXT)
        per_frame = torch.arange(rows.shape[1]).repeat(rows.shape[0])
        slots[len(before) : len(before) + per_frame.numel()] = per_frame
        return x, slots

    def answer(
        self, rows: Tensor, question: str, params: Params | None
    ) -> tuple[str, State | None]:
        """Greedy answer."""
        x, slots = self.prompt(rows, question)
        ids, state = generate(self.model.language, x, slots, self.prompts.end, params)
        return self.prompts.tokenizer.decode(ids), state


@dataclass
class Score:
    """Hits per kind at one cost, and how much was really kept."""

    hits: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seen: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    split: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    kept: list[float] = field(default_factory=list)
    branches: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, question: QA, right: bool, state: State | None) -> None:
        """Counts one answer; the two questions of `same` are counted apart, too."""
        kind = question.kind
        self.seen[kind] += 1
        self.hits[kind] += int(right)
        if kind == "same":
            part = self.split["scene" if question.answer in ("yes", "no") else "still"]
            part[0] += int(right)
            part[1] += 1
        if state is not None:
            text = state.prompt_rows - state.visual_rows
            shares = [(n - text) / state.visual_rows for n in state.lengths]
            self.kept.append(float(np.mean(shares[: state.params.budget_layers])))
            self.branches["+".join(b for b in state.branches if b != "noop")] += 1

    def to_dict(self) -> dict[str, Any]:
        """JSON value: per kind and average over kinds, in shares of one."""
        rows = {}
        for kind in KINDS:
            if self.seen[kind]:
                low, high = wilson(self.hits[kind], self.seen[kind])
                rows[kind] = {
                    "n": self.seen[kind],
                    "accuracy": self.hits[kind] / self.seen[kind],
                    "interval": [low, high],
                }
        average = float(np.mean([r["accuracy"] for r in rows.values()])) if rows else 0.0
        hits, seen = sum(self.hits.values()), sum(self.seen.values())
        return {
            "kinds": rows,
            "average_over_kinds": average,
            "all_questions": {
                "n": seen,
                "accuracy": hits / max(seen, 1),
                "interval": list(wilson(hits, seen)),
            },
            "mean_visual_share": float(np.mean(self.kept)) if self.kept else 1.0,
            "same": {part: {"hits": h, "n": n} for part, (h, n) in sorted(self.split.items())},
            "branches": dict(self.branches),
        }


def evaluate(
    folder: Path,
    each: int = 200,
    frames: int = 32,
    costs: tuple[float, ...] = (1.0, 0.3),
    threshold: float | None = None,
    mp4: bool = False,
    first_seed: int = QUESTION_SEED,
) -> dict[str, Any]:
    """Asks until every kind has `each` questions (kinds that are full are skipped)."""
    model, prompts = load_checkpoint(folder)
    asker = Asker(model, prompts)
    layers = model.config.layers
    began = time.monotonic()
    with torch.inference_mode():
        found = median_cosine(model, 128, frames) if threshold is None else threshold
        scores = {cost: Score() for cost in costs}
        seed, idle = first_seed, 0
        while idle < 500:
            scene = make_scene(seed, frames, model.config.image_size)
            wanted = [q for q in scene.questions if scores[costs[0]].seen[q.kind] < each]
            seed, idle = seed + 1, 0 if wanted else idle + 1
            if all(scores[costs[0]].seen[k] >= each for k in KINDS):
                break
            if not wanted:
                continue
            pictures = scene.frames
            if mp4:
                pictures = video_frames(seed - 1, frames, model.config.image_size, True)
            rows = visual(model, pictures)
            for q in wanted:
                for cost, score in scores.items():
                    params = Params(cost, found, 0.1, layers) if cost < 1.0 else None
                    text, state = asker.answer(rows, q.question, params)
                    score.add(q, text == q.answer, state)
    return {
        "frames": frames,
        "mp4": mp4,
        "first_seed": first_seed,
        "last_seed": seed - 1,
        "similarity_lower_bound": found,
        "ratio_lower_bound": 0.1,
        "budget_layers": layers,
        "seconds": round(time.monotonic() - began, 1),
        "costs": {str(cost): score.to_dict() for cost, score in scores.items()},
    }


def draw_chart(result: dict[str, Any], path: Path) -> None:
    """Bars of accuracy by kind, one colour per cost, with the intervals as lines."""
    from PIL import Image, ImageDraw

    costs = list(result["costs"])
    tints = ("#3b6ea5", "#e08a1e", "#5a9e5a", "#8a5aa0")
    left, top, high, group = 50, 40, 260, 90
    image = Image.new("RGB", (left + group * len(KINDS) + 20, top + high + 50), "white")
    draw = ImageDraw.Draw(image)
    for percent in range(0, 101, 20):
        y = top + high - high * percent // 100
        draw.line([(left, y), (image.width - 10, y)], fill="#dddddd")
        draw.text((12, y - 6), f"{percent}%", fill="black")
    for i, kind in enumerate(KINDS):
        draw.text((left + group * i + 8, top + high + 8), kind, fill="black")
        for j, cost in enumerate(costs):
            row = result["costs"][cost]["kinds"].get(kind)
            if row is None:
                continue
            x = left + group * i + 8 + j * 28
            box = [x, top + high - high * row["accuracy"], x + 24, top + high]
            draw.rectangle(box, fill=tints[j % 4])
            ends = [top + high - high * v for v in row["interval"]]
            draw.line([(x + 12, ends[0]), (x + 12, ends[1])], fill="black", width=2)
    for j, cost in enumerate(costs):
        average = result["costs"][cost]["average_over_kinds"]
        text = f"cost {cost}: {100 * average:.1f}% average"
        draw.rectangle([left + 220 * j, 12, left + 220 * j + 14, 26], fill=tints[j % 4])
        draw.text((left + 220 * j + 20, 12), text, fill="black")
    image.save(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--out", type=Path, help="JSON; a PNG chart lies beside it")
    parser.add_argument("--each", type=int, default=200, help="questions of every kind")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--cost", type=float, nargs="+", default=[1.0, 0.3])
    parser.add_argument("--threshold", type=float, help="instead of the median cosine")
    parser.add_argument("--mp4", action="store_true", help="through a 256 pixel H.264 file")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = evaluate(
        args.checkpoint, args.each, args.frames, tuple(args.cost), args.threshold, args.mp4
    )
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")
        draw_chart(result, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
