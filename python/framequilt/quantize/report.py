"""Measures the methods: KL divergence, perplexity and size against round to nearest.

    python -m framequilt.quantize.report run --work WORK --model smollm2 \\
        --calibration-text calibration.txt --held-out-text test.txt
    python -m framequilt.quantize.report run --work WORK --model demo
    python -m framequilt.quantize.report table --work WORK --markdown table.md --json table.json
    python -m framequilt.quantize.report compare --work WORK --rows W8A8-asym.rtn W8A8.rtn

A model is `smollm2` (a package, see `framequilt.resources`), `demo` (the checkpoint of this
package: prompts with videos, generated), or the path of a checkpoint. Every finished row lies in
the work folder and is not measured again; unfinished layers go on where they stopped. Rows can be
shared out among processes with --schemes and --methods.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from framequilt.quantize.calibration.checkpoint import Checkpoint
from framequilt.quantize.calibration.samples import (
    Sample,
    TextCodec,
    digest,
    read_text,
    text_samples,
)
from framequilt.quantize.methods import calibrate, evaluation
from framequilt.quantize.methods.result import MethodResult, write_aside
from framequilt.quantize.methods.runner import MEDIA_WEIGHT, Options, plain_rounding

# Name -> weights, activations.
SCHEMES: dict[str, tuple[str, str]] = {
    "W4g128": ("w4g128", "a16"),
    "W3g128": ("w3g128", "a16"),
    "W2g64": ("w2g64", "a16"),
    "W4A8": ("w4g128", "a8"),
    "W8A8": ("w8g128", "a8"),
    "W4A8-asym": ("w4g128", "a8-asym"),
    "W8A8-asym": ("w8g128", "a8-asym"),
}
ROWS = ("rtn", "awq", "gptq", "smoothquant", "smoothquant-0.5")
# Disjoint from each other and from what the demo model was trained and is evaluated on.
CALIBRATION_SEED, HELD_OUT_SEED = 3_000_000, 4_000_000


@dataclass(frozen=True)
class Data:
    """A checkpoint with what it is calibrated and measured on."""

    checkpoint: Checkpoint
    calibration: list[Sample]
    held_out: list[Sample]
    visual: bool


def demo_samples(
    checkpoint: Checkpoint, codec: TextCodec, first_seed: int, videos: int, frames: int
) -> list[Sample]:
    """One question about each of `videos` generated videos, kinds in turn, with its answer."""
    from framequilt.demo.scenes import make_scene
    from framequilt.vision import Preprocessor

    assert checkpoint.model.vision is not None
    preprocessor = Preprocessor.from_record(
        checkpoint.description.preprocessor, checkpoint.model.vision.patch
    )
    samples = []
    for number in range(videos):
        scene = make_scene(first_seed + number, frames)
        asked = scene.questions[number % len(scene.questions)]
        content = [
            {"type": "video", "video": scene.frames},
            {"type": "text", "text": asked.question},
        ]
        pixels = np.ascontiguousarray(preprocessor.video(scene.frames).images, np.float32)
        prompt = codec.prompt([{"role": "user", "content": content}], [pixels], asked.answer)
        # The question's tokens are measured as well: there are ten times as many.
        samples.append(replace(prompt, scored=len(prompt.parts[-1]), answer=prompt.scored))
    return samples


def read_data(args: argparse.Namespace) -> Data:
    """Opens the model, and makes its samples."""
    work = Path(args.work)
    if args.model == "demo":
        from framequilt.demo.show import CHECKPOINT

        checkpoint = Checkpoint.open(CHECKPOINT)
        codec = TextCodec(checkpoint, work / "tokenizer.demo")
        calibration, held_out = (
            demo_samples(checkpoint, codec, seed, count, args.frames)
            for seed, count in (
                (CALIBRATION_SEED, args.calibration_samples),
                (HELD_OUT_SEED, args.held_out_samples),
            )
        )
        return Data(checkpoint, calibration, held_out, visual=True)
    if args.model == "smollm2":
        from framequilt.resources import smollm2_gguf

        path = smollm2_gguf()
    else:
        path = Path(args.model)
    checkpoint = Checkpoint.open(path)
    codec = TextCodec(checkpoint, work / f"tokenizer.{path.name}")
    return Data(
        checkpoint,
        text_samples(
            read_text(args.calibration_text), codec, args.calibration_samples,
            args.calibration_length,
        ),
        text_samples(
            read_text(args.held_out_text), codec, args.held_out_samples, args.held_out_length
        ),
        visual=False,
    )  # fmt: skip


def scheme_of(name: str, visual: bool) -> tuple[str, str]:
    """Weights and activations of a scheme; the tower's layers take part where there is one."""
    weights, activations = SCHEMES[name]
    if not visual:
        return weights, activations
    acts = activations if activations == "a16" else f"{activations},vision.layers.*={activations}"
    return f"{weights},vision.layers.*={weights}", acts


def float_states(data: Data, folder: Path) -> evaluation.Scored:
    """The float model's states on the held-out samples, kept in a file."""
    file = folder / f"float.{digest(data.held_out)[:16]}.pt"
    if not file.exists():
        scored = evaluation.run(data.checkpoint, data.held_out, None, folder)
        aside = file.with_suffix(f".{time.time_ns()}")
        torch.save((scored.states, scored.targets, scored.sample), aside)
        aside.replace(file)
    return evaluation.Scored(*torch.load(file, weights_only=False))


def _answers(samples: Sequence[Sample], owner: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the scored tokens are of an answer: the last of each sample."""
    left = np.array([int((owner == n).sum()) for n in range(len(samples))])
    place = np.concatenate([np.arange(count) for count in left])
    length = np.array([sample.answer for sample in samples])
    result: NDArray[np.bool_] = place >= (left - length)[owner]
    return result


def measure(
    data: Data, exact: evaluation.Scored, scheme: str, row: str, args: argparse.Namespace
) -> dict[str, Any]:
    """One row: calibrates and measures."""
    console = Console(stderr=True)
    weights, activations = scheme_of(scheme, data.visual)
    folder = Path(args.work) / args.name
    method, _, alpha = row.partition("-")
    began = time.monotonic()
    result: MethodResult
    if method == "rtn":
        result = plain_rounding(data.checkpoint, weights, activations, folder / f"{scheme}.{row}")
    else:
        options = Options(
            alpha=float(alpha) if alpha else "auto", search_rows=args.search_rows,
            ratio_steps=args.ratio_steps, media_weight=args.media_weight,
        )  # fmt: skip

        def show(step: Any) -> None:
            spent = time.monotonic() - began
            console.print(f"{args.name} {scheme} {row}: {step.done} of {step.total}, {spent:.0f} s")

        result = calibrate(
            data.checkpoint, data.calibration, method=method, weights=weights,
            activations=activations, work=folder / f"{scheme}.{row}", options=options,
            progress=show,
        )  # fmt: skip
    calibrated = time.monotonic() - began
    found = evaluation.run(data.checkpoint, data.held_out, result, folder)
    comparison = evaluation.compare(data.checkpoint, exact, found, result)
    answers: dict[str, Any] = {}
    if data.visual:
        answers["answers"] = comparison.take(_answers(data.held_out, comparison.sample)).summary()
    np.savez(folder / f"{scheme}.{row}.npz", kl=comparison.kl, sample=comparison.sample)
    return {
        "model": args.name,
        "scheme": scheme,
        "method": row,
        "weights": result.weights,
        "activations": result.activations,
        "bytes": evaluation.stored_bytes(data.checkpoint, result.weights, result.activations),
        "bytes_bf16": evaluation.stored_bytes(data.checkpoint, None),
        "calibration": {
            "samples": len(data.calibration),
            "rows": sum(len(part) for s in data.calibration for part in s.parts if part.ndim == 1),
            "seconds": calibrated,
        },
        **comparison.summary(),
        **answers,
        "layers": result.reports(),
    }


def run(args: argparse.Namespace) -> None:
    """Measures every row that is not there yet."""
    torch.set_num_threads(args.threads)
    folder = Path(args.work) / args.name
    folder.mkdir(parents=True, exist_ok=True)
    data = read_data(args)
    exact = float_states(data, folder)
    for scheme in args.schemes.split(","):
        for row in args.methods.split(","):
            file = folder / f"{scheme}.{row}.json"
            if not file.exists():
                found = measure(data, exact, scheme, row, args)
                write_aside(file, json.dumps(found, indent=1).encode())
                kl = found["kl"]
                print(f"{args.name} {scheme} {row}: KL {kl['mean']:.5f} +- {kl['half']:.5f}")


def rows_of(work: Path) -> list[dict[str, Any]]:
    """All rows of a work folder, in the order of the table, with the change against RTN."""
    rows = []
    for folder in sorted(path for path in work.iterdir() if path.is_dir()):
        for scheme in SCHEMES:
            plain = None
            for method in ROWS:
                file = folder / f"{scheme}.{method}.json"
                if not file.exists():
                    continue
                row = json.loads(file.read_text(encoding="utf-8"))
                with np.load(folder / f"{scheme}.{method}.npz") as arrays:
                    kl, sample = arrays["kl"], arrays["sample"]
                if method == "rtn":
                    plain = kl
                elif plain is not None:
                    row["kl_change"] = evaluation.clustered(kl - plain, sample).to_json()
                    row["kl_ratio"] = float(kl.mean() / plain.mean())
                    row["kl_typical"] = evaluation.typical_change(kl, plain, sample)
                rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table for each model."""
    lines: list[str] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        first = mine[0]
        spoken = "answers" in first
        exact = first.get("answers", first)["float_perplexity"]
        lines += [
            f"n = {first['tokens']} held-out tokens in {first['samples']} samples"
            + (f", {first['answers']['tokens']} of them of answers" if spoken else "")
            + f"; float perplexity{' of the answers' if spoken else ''} {exact['value']:.3f} "
            f"({exact['low']:.3f} to {exact['high']:.3f}); {first['bytes_bf16'] / 2**20:.1f} MiB "
            "in bfloat16.",
            "",
            "| scheme | method | MiB | KL (nats) | less KL of RTN | KL / RTN | typical KL / RTN "
            "| perplexity | same choice |" + (" answers right |" if spoken else ""),
            "|---|---|---|---|---|---|---|---|---|" + ("---|" if spoken else ""),
        ]
        for row in mine:
            kl, same, said = row["kl"], row["same_choice"], row.get("answers", row)
            change = row.get("kl_change")
            typical = row.get("kl_typical", {})
            cells = [
                row["scheme"], row["method"], f"{row['bytes'] / 2**20:.1f}",
                f"{kl['mean']:.5f} ± {kl['half']:.5f}",
                f"{change['mean']:+.5f} ± {change['half']:.5f}" if change else "",
                f"{row['kl_ratio']:.2f}" if change else "",
                "{value:.2f} ({low:.2f} to {high:.2f})".format(**typical) if typical else "",
                f"{said['perplexity']['value']:.3f}",
                f"{100 * same['mean']:.1f} % ± {100 * same['half']:.1f}",
                *([f"{said['all_right']} of {said['samples']}"] if spoken else []),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def compare(work: Path, one: str, other: str) -> list[str]:
    """For each model what one row's KL has more than another's, token by token."""
    lines = []
    for folder in sorted(path for path in work.iterdir() if path.is_dir()):
        files = [folder / f"{row}.npz" for row in (one, other)]
        if not all(file.exists() for file in files):
            continue
        (kl, sample), (base, _) = (
            (arrays["kl"], arrays["sample"]) for arrays in (np.load(file) for file in files)
        )
        change = evaluation.clustered(kl - base, sample)
        typical = evaluation.typical_change(kl, base, sample)
        lines.append(
            f"{folder.name}: {one} - {other} = {change.mean:+.5f} ± {change.half:.5f}, "
            f"ratio {kl.mean() / base.mean():.2f}, typical "
            + "{value:.2f} ({low:.2f} to {high:.2f})".format(**typical)
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="measure rows")
    one.add_argument("--work", required=True)
    one.add_argument("--model", required=True, help="smollm2, demo, or a checkpoint")
    one.add_argument("--name", help="the model's name in the table")
    one.add_argument("--schemes", default=",".join(SCHEMES))
    one.add_argument("--methods", default="rtn,awq,gptq,smoothquant")
    one.add_argument("--calibration-text", nargs="+", default=[])
    one.add_argument("--held-out-text", nargs="+", default=[])
    one.add_argument("--calibration-samples", type=int, default=32)
    one.add_argument("--calibration-length", type=int, default=512, help="tokens")
    one.add_argument("--held-out-samples", type=int, default=16)
    one.add_argument("--held-out-length", type=int, default=256, help="tokens")
    one.add_argument("--frames", type=int, default=8, help="of a generated video")
    one.add_argument("--search-rows", type=int, default=2048)
    one.add_argument("--ratio-steps", type=int, default=20)
    one.add_argument("--media-weight", type=float, default=MEDIA_WEIGHT)
    one.add_argument("--threads", type=int, default=1)
    two = commands.add_parser("table", help="print what was measured")
    two.add_argument("--work", required=True)
    two.add_argument("--markdown", type=Path)
    two.add_argument("--json", type=Path)
    three = commands.add_parser("compare", help="compare two rows token by token")
    three.add_argument("--work", required=True)
    three.add_argument("--rows", nargs=2, required=True, metavar="SCHEME.METHOD")
    args = parser.parse_args(arguments)
    if args.command == "compare":
        print("\n".join(compare(Path(args.work), *args.rows)))
        return
    if args.command == "run":
        args.name = args.name or Path(args.model).name
        run(args)
        return
    rows = rows_of(Path(args.work))
    text = table(rows)
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
