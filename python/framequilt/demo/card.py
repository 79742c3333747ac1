"""Writes MODEL_CARD.md of a checkpoint from the JSON files of `evaluate`.

python -m framequilt.demo.card --eval eval.json --mp4 eval_mp4.json --run RUN_DIR
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from framequilt.demo.evaluate import wilson
from framequilt.demo.runstate import load_state

GROUPS = {
    "digit": "retrieval",
    "part": "retrieval",
    "direction": "question answering",
    "count": "question answering",
    "touch": "question answering",
    "attribute": "question answering",
    "where": "question answering",
    "order": "understanding",
    "same": "understanding",
}
ASKS = {
    "digit": "the digit on a sign that shows in one frame only (10 answers)",
    "part": "in which part of the video the sign shows (3)",
    "direction": "which way a shape moves (4)",
    "count": "how many shapes there are (4)",
    "touch": "what a shape touches (colour and shape, 24)",
    "attribute": "the shape of a colour, the colour of a shape (10)",
    "where": "left or right, or which quarter, at the start or at the end (2 and 4)",
    "order": "which of two shapes comes first; sign before or after an event (2)",
    "same": "which shape stays in place (24); whether the scene stays the same (2)",
}
TARGET = 0.9
TARGET_LOSS = 0.03
NO_CUT = 0.6  # share of videos whose scene stays the same (`world.sample_world`)


TEXT = """\
# Framequilt demo model

A vision-language model of 2.3 million parameters in the LLaVA-Video layout: SigLIP-shaped tower
(64 x 64 pixels, patch 8, 3 layers run, width 96), two-layer projector, bilinear 2 x 2 pooling, a
newline after every row (20 rows a frame), Qwen2-shaped language model (12 layers, width 128, 4
heads, 2 key-value heads, vocabulary 512). Weights are bfloat16. Licence: Apache-2.0. It exists to
show and test the engine; it knows nothing but its own world.

## Data

Videos drawn by `framequilt.demo.scenes`: one to four coloured shapes (6 colours, 4 shapes, a
light rim) that rest, move, meet, bounce or appear later, over static or scrolling textured
backgrounds, with cuts, camera shake, noise, blur, brightness flicker and grey dots that are not
shapes; a white sign with a digit in one frame. No recorded footage, no downloaded weights or
texts. Seeds below 1,000,000,000 are never trained on; the numbers here come from seeds {first}
to {last}.

## Training

`python -m framequilt.demo.train --resume RUN_DIR`, one thread of a shared two-core machine (AMD
EPYC, AVX-512). First tower and projector learn dense labels of single frames (colour, shape,
digit, contact, place; 2,750 steps, about 200,000 frames, 30 minutes), then the language model
learns to answer on 1 to 32 frames ({steps} of optimizer time, learning rate
1.5e-3 to 1.5e-5), the tower fixed for the first 3,660 steps and trained slowly along afterwards.
Dense auxiliary labels at two middle layers (where a shape began, which way it goes, whom it
touches, frame index) help and are dropped afterwards. In part of the batches similar neighbours
of a slot are averaged and survivors are thinned at random, rotary positions kept. From step 4,340
on most batches of 8 to 32 frames go through FrameFusion itself, layer by layer, with a cost
between 0.25 and 0.42 and a threshold around the paper's rule, and a small loss teaches the last
prompt token to look at shapes and signs in the layer where pruning reads its attention: unlike
the models the method was published with, this one has been trained for the reduction. Once, by
hand, the component of the projector's output that tells left from right was amplified, because
the language model did not pick it up.

## Accuracy on unseen videos of {frames} frames

Greedy answers, exact match, Wilson 95% intervals in brackets; the same questions at every cost.
FrameFusion with the paper's threshold rule: the median cosine at the first layer, averaged over
128 other videos, is **{threshold:.4f}**; N_th 0.1, budget depth {layers}.
"""


def percent(row: dict[str, Any]) -> str:
    """`91.5 (86.8 to 94.6)`."""
    low, high = row["interval"]
    return f"{100 * row['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def accuracy_table(result: dict[str, Any]) -> list[str]:
    """Markdown rows: kind, what is asked, n, accuracy at every cost."""
    costs = list(result["costs"])
    lines = [
        "| kind | asks for (number of answers) | n | " + " | ".join(map(cost_name, costs)) + " |",
        "| --- | --- | --- |" + " --- |" * len(costs),
    ]
    for kind, group in GROUPS.items():
        rows = [result["costs"][c]["kinds"].get(kind) for c in costs]
        if rows[0] is not None:
            cells = " | ".join(percent(r) for r in rows)
            lines.append(f"| {kind} ({group}) | {ASKS[kind]} | {rows[0]['n']} | {cells} |")
    mean = " | ".join(f"{100 * result['costs'][c]['average_over_kinds']:.1f}" for c in costs)
    n = result["costs"][costs[0]]["all_questions"]["n"]
    lines.append(f"| average over kinds | | {n} | {mean} |")
    return lines


def cost_name(cost: str) -> str:
    """Column head of a cost."""
    return "no reduction, %" if float(cost) >= 1.0 else f"FrameFusion, cost {cost}, %"


def verdict(result: dict[str, Any]) -> str:
    """Says whether the project's targets are met."""
    costs = result["costs"]
    full = costs["1.0"]["average_over_kinds"]
    out = f"Without reduction the average is {100 * full:.1f}% (target: {100 * TARGET:.0f}%, "
    out += "reached)" if full >= TARGET else "NOT reached)"
    for cost, row in costs.items():
        if float(cost) < 1.0:
            lost = full - row["average_over_kinds"]
            met = "reached" if lost <= TARGET_LOSS else "NOT reached"
            out += (
                f"; at cost {cost} {100 * lost:.1f} points are lost on average (target: at most "
                f"{100 * TARGET_LOSS:.0f}, {met}) with {100 * row['mean_visual_share']:.1f}% of "
                "the visual rows kept on average over the layers"
            )
    return out + "."


def engine_table(engine: dict[str, Any]) -> list[str]:
    """Markdown of `engine_eval`'s figures: averages by weight and KV format and by cost."""
    costs = list(next(iter(engine.values())))
    n = sum(row["n"] for row in next(iter(engine.values()))[costs[0]]["kinds"].values())
    lines = [
        f"As the engine runs it (other held-out scenes, n = {n} a cell, average over kinds):",
        "",
        "| weights/KV | " + " | ".join(map(cost_name, costs)) + " |",
        "| --- |" + " --- |" * len(costs),
    ]
    for name, by_cost in engine.items():
        cells = " | ".join(f"{100 * by_cost[c]['average_over_kinds']:.1f}" for c in costs)
        lines.append(f"| {name} | {cells} |")
    return [*lines, ""]


def same_limit(result: dict[str, Any]) -> list[str]:
    """How the two questions of `same` differ, without and with reduction."""
    parts = [row.get("same", {}) for row in result["costs"].values()]
    if not all("still" in p and "scene" in p for p in parts):
        return []

    def right(part: str) -> str:
        counts = [f"{p[part]['hits']} of {p[part]['n']}" for p in parts]
        return counts[0] + "".join(f" ({c} with FrameFusion)" for c in counts[1:])

    plain = parts[0]["scene"]
    low, high = wilson(plain["hits"], plain["n"])
    guess = (
        "no more than always answering yes: the tower learned to ignore backgrounds"
        if low <= NO_CUT <= high
        else f"where always answering yes is right in {100 * NO_CUT:.0f}%"
    )
    text = (
        f"- `same`: asked which shape stays in place the model is right in {right('still')} "
        f"videos, asked whether the scene stays the same in {right('scene')}, {guess}."
    )
    return textwrap.wrap(text, 99, subsequent_indent="  ")


def card(
    result: dict[str, Any],
    mp4: dict[str, Any] | None,
    run: dict[str, Any] | None,
    engine: dict[str, Any] | None = None,
) -> str:
    """The whole text."""
    steps = f"{run['step']} steps, {run['seconds'] / 60:.0f} minutes" if run else "unknown time"
    first = result["first_seed"], result["last_seed"], result["frames"]
    text = TEXT.format(
        first=first[0],
        last=first[1],
        frames=first[2],
        steps=steps,
        threshold=result["similarity_lower_bound"],
        layers=result["budget_layers"],
    )
    lines = [text, *accuracy_table(result), "", verdict(result), ""]
    if mp4 is not None:
        lines += [
            "Through a real file (drawn at 256 x 256, H.264, decoded, bicubic resize to 64 x 64):",
            "",
            *accuracy_table(mp4),
            "",
        ]
    if engine is not None:
        lines += engine_table(engine)
    lines += [
        "## Limits",
        "",
        "- It answers only the questions of `framequilt.demo.questions`, in their wordings, about",
        "  videos of this generator; anything else gives a word of its small vocabulary.",
        "- Prompts carry no time instruction (`add_time_instruction` is false) and one video each.",
        "- More than 32 frames, other frame sizes and several turns were not trained.",
        *same_limit(result),
        "- Compare accuracies with the number of possible answers: guessing one of 2 gives 50%.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--mp4", type=Path)
    parser.add_argument("--engine", type=Path, help="JSON of `engine_eval`")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--state", default="lm.pt")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "checkpoint" / "MODEL_CARD.md"
    )
    args = parser.parse_args()
    result = json.loads(args.eval.read_text(encoding="utf-8"))
    mp4 = json.loads(args.mp4.read_text(encoding="utf-8")) if args.mp4 else None
    state = load_state(args.run / args.state) if args.run else None
    engine = json.loads(args.engine.read_text(encoding="utf-8")) if args.engine else None
    args.out.write_text(card(result, mp4, state, engine), encoding="utf-8")


if __name__ == "__main__":
    main()
