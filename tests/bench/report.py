"""From series to rows, and from rows to JSON, a markdown table and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benches import VIDEO_FRAMES, Bench, Target
from measure import HOPELESS, QUIET, Series


def _best(bench: Bench, series: dict[str, Series], names: tuple[str, ...]) -> Series | None:
    """The best series whose name begins with one of `names`."""
    found = [
        s for s in series.values() if s.values and any(s.name.startswith(name) for name in names)
    ]
    pick = max if bench.higher_is_better else min
    return pick(found, key=lambda s: s.median) if found else None


# A read bandwidth that changed by more than this factor around a bench is said in its row.
STEADY = 1.2
VIDEO_FACTOR = 8.0  # of the question about a video, against llama.cpp


def rows(
    bench: Bench,
    series: dict[str, Series],
    read: float | None,
    least_read: float | None = None,
) -> list[dict[str, Any]]:
    """One row per target; `read` is the read bandwidth in GB/s, measured around the bench.

    `least_read` is the least of these measurements, where `read` is the greatest.
    """
    result = []
    for target in bench.targets:
        row: dict[str, Any] = {"bench": bench.name, "workload": bench.title, "what": target.what}
        row |= {"unit": bench.unit, "ours": None, "peer": None, "ratio": None, "reached": None}
        ours = _best(bench, series, target.ours)
        row["target"] = _target_text(target)
        row["notes"] = _notes(bench, series, target)
        if ours is not None:
            row["ours"] = ours.to_json()
            peer = _best(bench, series, target.peers)
            _judge(bench, target, row, ours, peer, read)
            around = read and least_read and read > STEADY * least_read
            if target.limit_share and around and not ours.reads:
                row["notes"].append(
                    f"read bandwidth {least_read:.1f} to {read:.1f} GB/s around this bench; "
                    "the share is of the greatest"
                )
            if any(s is not None and s.least_disturbance > HOPELESS for s in (ours, peer)):
                row["reached"] = None
                row["notes"].append("too disturbed to judge")
        result.append(row)
    return result


def _target_text(target: Target) -> str:
    if target.factor is not None:
        return f"{target.factor:g}x"
    if target.limit_share is not None:
        return f"{target.limit_share:.0%} of the limit"
    if target.most_share is not None:
        return f"under {target.most_share:.0%}"
    return f"{target.seconds:g} s" if target.seconds is not None else ""


def _judge(
    bench: Bench,
    target: Target,
    row: dict[str, Any],
    ours: Series,
    peer: Series | None,
    read: float | None,
) -> None:
    """Fills in peer, ratio and reached."""
    if target.seconds is not None:
        row["ratio"] = ours.median
        row["reached"] = ours.median < target.seconds
    elif target.limit_share is not None and (read or ours.reads):
        used, limit = _used_of_limit(row, ours, read)
        row["peer"] = {"name": "read bandwidth", "median": limit, "used_gbytes_per_s": used}
        row["ratio"] = used / limit
        row["reached"] = row["ratio"] >= target.limit_share
    elif target.most_share is not None:
        row["ratio"] = ours.detail[target.part] / ours.detail["seconds"]
        row["reached"] = row["ratio"] < target.most_share
    elif peer is not None:
        row["peer"] = peer.to_json()
        quotient = ours.median / peer.median
        row["ratio"] = quotient if bench.higher_is_better else 1 / quotient
        if target.factor is not None:
            # "Faster than" is a comparison without an equal sign.
            row["reached"] = row["ratio"] > target.factor if target.factor == 1.0 else (
                row["ratio"] >= target.factor
            )  # fmt: skip


def _used_of_limit(row: dict[str, Any], ours: Series, read: float | None) -> tuple[float, float]:
    """GB/s that ours used and that it could have used, of the sample with the median share.

    Each sample is compared with the greater of the rates right before and after it. Those during
    which the rate changed are left out, as long as there are others. Without such rates the median
    sample is compared with `read`.
    """
    # One step makes a token of every sequence.
    bytes_per_unit = 1e-9 * ours.detail["bytes_per_step"] / ours.detail["batch"]
    if not ours.reads:
        assert read is not None
        return bytes_per_unit * ours.median, read
    all_samples = list(zip(ours.values, ours.reads, ours.others, strict=True))
    quiet = [s for s in all_samples if s[2] <= QUIET]
    samples = [(value, reads) for value, reads, _ in quiet or all_samples]
    steady = [s for s in samples if max(s[1]) <= STEADY * min(s[1])]
    if len(steady) < len(samples):
        rates = [rate for _, reads in samples for rate in reads]
        kept = "left out" if steady else "judged all the same, by the greater"
        row["notes"].append(
            f"read bandwidth {min(rates):.1f} to {max(rates):.1f} GB/s; "
            f"{len(samples) - len(steady)} of {len(samples)} samples during which it changed "
            f"are {kept}"
        )
    shares = sorted((bytes_per_unit * v / max(r), bytes_per_unit * v, max(r))
                    for v, r in steady or samples)  # fmt: skip
    _, used, limit = shares[(len(shares) - 1) // 2]
    return used, limit


def _notes(bench: Bench, series: dict[str, Series], target: Target) -> list[str]:
    notes = [f"{s.name}: {s.skipped}" for s in series.values() if s.skipped]
    wanted = target.ours + target.peers
    for s in series.values():
        disturbed = len(s.values) - len(s.undisturbed)
        if disturbed and any(s.name.startswith(name) for name in wanted):
            load = max(s.others)
            notes.append(
                f"{s.name}: {disturbed} of {len(s.values)} disturbed (others up to {load:.1f} CPU)"
            )
    return notes + bench.missing


# The budget of one question about a video --------------------------------------------------------


SIDES = ("ours", "reduced", "llama", "peer")


def budget(
    results: dict[str, dict[str, Series]], earlier: Mapping[str, str] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """Seconds by stage: ours without and with reduction, llama.cpp's, with the best peer's tower.

    Empty if unmeasured. llama.cpp does not run the model, but its parts. Our time of the tower and
    onnxruntime's is scaled to 26 of the 27 layers. The decoder has a small head, on all sides.
    `earlier`: of benches of another call, which one that was.
    """
    needed = ("video-frames", "video-tower", "video-projector", "video-llm-28l", "tower")
    if any(name not in results for name in needed):
        return []

    def of(bench: str, *names: str) -> Series | None:
        found = [s for s in results[bench].values() if s.values and s.name.startswith(names)]
        return min(found, key=lambda s: s.median) if found else None

    def of_video(series: Series | None, layers: float = 1.0) -> float | None:
        return series.median * VIDEO_FRAMES * layers if series else None

    some = 26 / 27
    tower, best_tower = of("tower", "w4g128", "w8g128", "f32"), of("tower", "onnxruntime", "torch")
    llama_tower = of("video-tower", "llama.cpp")
    frames, projector = of("video-frames", "PyAV"), of("video-projector", "w4g128")
    plain, reduced = of("video-llm-28l", "cost 1"), of("video-llm-28l", "cost 0.3")
    prefill = of("video-llm-28l", "llama.cpp prefill")
    decode = of("video-llm-28l", "llama.cpp decode")
    rows_of_prompt = plain.detail["prompt_rows"] if plain else None
    parts = "from 4 and 1 of 28 layers; with reduction all 28"

    def row(stage: str, bench: str, values: Sequence[float | None], how: str) -> dict[str, Any]:
        """`values`: ours, ours with reduction, llama.cpp's, the best peers'."""
        if bench in earlier:
            how += f"; from the run of {earlier[bench]}"
        return {"stage": stage, "how": how} | dict(zip(SIDES, values, strict=True))

    def names(*series: Series | None) -> str:
        return ", ".join(s.name if s else "-" for s in series)

    def ours(key: str) -> list[float | None]:
        return [s.detail[key] if s else None for s in (plain, reduced)]

    prompt = rows_of_prompt / prefill.median if prefill and rows_of_prompt else None
    answer = 64 / decode.median if decode else None
    seconds = frames.median if frames else None
    projected = of_video(projector)
    stages = [
        row("decode and resize frames", "video-frames", [seconds] * 4, "peers: taken as ours"),
        row("vision tower", "tower", [of_video(tower, some)] * 2
            + [of_video(llama_tower), of_video(best_tower, some)],
            names(tower, llama_tower, best_tower)),
        row("projector", "video-projector", [projected] * 4, "peers: taken as ours"),
        row("prompt", "video-llm-28l", [*ours("prefill_s"), prompt, prompt], parts),
        row("64 tokens", "video-llm-28l", [*ours("decode_s"), answer, answer], parts),
    ]  # fmt: skip
    total: dict[str, Any] = {"stage": "sum", "how": ""}
    for side in SIDES:
        values = [stage[side] for stage in stages]
        total[side] = None if None in values else sum(values)
    return [*stages, total]


# Output ------------------------------------------------------------------------------------------


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def _cell(series: dict[str, Any] | None) -> str:
    if not series:
        return "-"
    text = f"{series['name']}: {_number(series['median'])}"
    if "used_gbytes_per_s" in series:
        return f"{text} GB/s, used {_number(series['used_gbytes_per_s'])}"
    return f"{text} ({_number(series['min'])}-{_number(series['max'])})"


def _ratio(row: dict[str, Any]) -> str:
    ratio, target = row["ratio"], row["target"]
    if ratio is None or target.endswith(" s"):
        return "-"
    if target.startswith("under "):
        return f"{ratio:.2%}"
    return f"{ratio:.0%}" if "of the limit" in target else f"{ratio:.2f}x"


def _limits(limits: dict[str, Any]) -> list[str]:
    """What the machine could do before and after a call, one text each."""
    texts = []
    for moment in ("before", "after"):
        found = limits.get(moment)
        if not found:
            continue
        parts = [
            f"read {_number(found['read_gbytes_per_s']['median'])} GB/s "
            f"({_number(found['read_gbytes_per_s']['min'])}-"
            f"{_number(found['read_gbytes_per_s']['max'])})",
            f"float32 {_number(found['float_gflops']['median'])} GFLOP/s",
            f"int8 {_number(found['int8_gops']['median'])} GOP/s ({found['int8_instruction']})",
        ]
        more = (("clock_ghz", "clock {} GHz"), ("core_to_core_ns", "cores {} ns apart"))
        for key, text in more:
            if key in found:  # not in results of earlier programs
                parts.append(text.format(_number(found[key]["median"])))
        texts.append(f"{moment}: {', '.join(parts)}")
    return texts


def _times(total: Mapping[str, Any]) -> str:
    """How many times faster the sum is; "" where a side is missing."""
    if None in (total["ours"], total["reduced"], total["llama"]):
        return ""
    text = ", ".join(
        f"{total['llama'] / total[side]:.2f}x llama.cpp's parts {how} reduction"
        for side, how in (("ours", "without"), ("reduced", "with"))
    )
    mark = "reached" if total["llama"] >= VIDEO_FACTOR * total["reduced"] else "**missed**"
    more = f", {total['peer'] / total['reduced']:.2f}x with the best tower" if total["peer"] else ""
    return f"{text} (target {VIDEO_FACTOR:g}x: {mark}){more}."


def markdown(document: dict[str, Any]) -> str:
    """The tables of a result document."""
    runs = document["runs"]
    several = len(runs) > 1
    when = f"{document['date']}; revision {document['revision']}"
    lines = [
        f"Machine: {document['machine']}, {document['threads']} threads; "
        f"{f'{len(runs)} runs, listed below' if several else when}. Median (least-greatest) of "
        f"{document['samples']} samples, programs taken in turn.",
        "",
    ]
    if document["clock"] == "CPU time":
        lines += ["Seconds are CPU seconds of one thread (README.md, busy machines).", ""]
    if document["versions"]:
        listed = ", ".join(f"{name} {text}" for name, text in document["versions"].items())
        lines += [f"Peers: {listed}.", ""]
    if not several:
        for text in _limits(document["limits"]):
            lines += [f"Limits {text}.", ""]
    lines += [
        "| workload | row | unit | ours | best peer | ratio | target | reached |"
        + (" run |" if several else ""),
        "|---|---|---|---|---|---|---|---|" + ("---|" if several else ""),
    ]
    notes: list[str] = []
    for row in document["rows"]:
        mark = {True: "yes", False: "**no**", None: "-"}[row["reached"]]
        text = _ratio(row)
        star = ""
        if row["notes"]:
            listed = "; ".join(row["notes"])
            if listed not in notes:
                notes.append(listed)
            star = f" [{notes.index(listed) + 1}]"
        lines.append(
            f"| {row['workload']} | {row['what']}{star} | {row['unit']} | {_cell(row['ours'])} | "
            f"{_cell(row['peer'])} | {text} | {row['target']} | {mark} |"
            + (f" {row['run']} |" if several else "")
        )
    lines += ["", *(f"[{i}] {note}" for i, note in enumerate(notes, 1))]
    if document["budget"]:
        lines += [
            "",
            f"A question about {VIDEO_FRAMES} frames, 7B, seconds by stage "
            "(measured in parts, scaled as said):",
            "",
            "| stage | ours | ours, cost 0.3 | llama.cpp's parts | with the best tower | how |",
            "|---|---|---|---|---|---|",
        ]
        for stage in document["budget"]:
            cells = [_number(stage[side]) for side in SIDES]
            lines.append(f"| {stage['stage']} | {' | '.join(cells)} | {stage['how']} |")
        times = _times(document["budget"][-1])
        if times:
            lines += ["", times]
    for number, run in enumerate(runs if several else [], 1):
        lines += [
            "",
            f"Run {number}: {run['date']}, revision {run['revision']}, samples: {run['samples']}; "
            f"{', '.join(run['benches'])}. Limits {'; '.join(_limits(run['limits']))}.",
        ]
    return "\n".join(lines) + "\n"


def plot(document: dict[str, Any], path: Path) -> bool:
    """Ratio of every row that has a factor, beside its target; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [r for r in document["rows"] if r["ratio"] is not None and r["target"].endswith("x")]
    if not shown:
        return False
    height = 0.32 * len(shown) + 1.2
    figure, axes = pyplot.subplots(figsize=(10, height), constrained_layout=True)
    places = range(len(shown))
    colors = ["#2a7f62" if r["reached"] else "#b5533c" for r in shown]
    axes.barh(places, [r["ratio"] for r in shown], color=colors, height=0.6)
    targets = [float(r["target"][:-1]) for r in shown]
    axes.plot(targets, places, "k|", markersize=12, markeredgewidth=2, label="target")
    axes.set_yticks(places, [f"{r['workload']}: {r['what']}" for r in shown], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1.0, color="gray", linewidth=0.8)
    axes.set_xlabel("times the best peer")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def write(document: dict[str, Any], folder: Path) -> None:
    """results.json, table.md and, with matplotlib, ratios.png."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1)
    (folder / "results.json").write_text(text + "\n")
    (folder / "table.md").write_text(markdown(document))
    plot(document, folder / "ratios.png")
