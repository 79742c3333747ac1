"""`framequilt inspect`: what a model directory holds, and what it needs to run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from framequilt.cli import common
from framequilt.cli.common import guarded, human_bytes, out, pairs, print_json
from framequilt.errors import FramequiltError
from framequilt.kv_format import parse_kv_format

# Shown beside the model's default.
_KV_FORMATS = ("kv16", "kv8", "kv4", "kv2")


def kv_bytes_per_token(config: Mapping[str, Any], kv: str) -> float:
    """Bytes of KV cache per token over all layers; scales and zeros included."""
    layers, attention = config["decoder"]["layers"], config["decoder"]["attention"]
    formats = [parse_kv_format(kv).of_layer(layer, layers) for layer in range(layers)]
    head = sum(f.bytes_per_token(attention["head_dim"]) for f in formats)
    return float(attention["kv_heads"] * head)


def describe(path: str, *, verify: bool) -> dict[str, Any]:
    """What the directory says, as plain data. Errors: not_found, corrupt_model, ..."""
    from framequilt.model_directory import ModelDirectory

    directory = ModelDirectory(path, verify=verify)
    config = directory.config
    formats: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for slot, entry in config["linears"].items():
        inputs = directory.activations_of(slot)
        name = directory.format_of(slot).name
        row = formats[name if inputs is None else f"{name} {inputs.name}"]
        row["linears"] += 1
        row["parameters"] += entry["out"] * entry["in"]
        row["bytes"] += directory.linear_bytes(slot)
    table = {
        name: {
            "linears": int(row["linears"]),
            "parameters": int(row["parameters"]),
            "bytes": int(row["bytes"]),
            "effective_bits": 8 * row["bytes"] / max(row["parameters"], 1),
        }
        for name, row in sorted(formats.items())
    }
    parameters = sum(row["parameters"] for row in table.values())
    stored = sum(row["bytes"] for row in table.values())
    listed = {entry["name"] for entry in config["files"]} | {"config.json"}
    others = sorted(p.name for p in Path(path).iterdir() if p.name not in listed)
    default = parse_kv_format(config["defaults"]["kv"]).name
    shown = dict.fromkeys((*_KV_FORMATS, default))
    return {
        "path": str(directory.path),
        "name": config["name"],
        "source": config["source"],
        "weights": config["weights"],
        "activations": config["source"].get("activations", "a16"),
        "decoder": config["decoder"],
        "vision": config["vision"],
        "projector": config["projector"],
        "visual": config["visual"],
        "tokens": config["tokens"],
        "defaults": config["defaults"],
        "parameters": parameters,
        "effective_bits": 8 * stored / max(parameters, 1),
        "formats": table,
        "files": config["files"],
        "other_files": others,
        "verified": verify,
        "kv_bytes_per_token": {kv: kv_bytes_per_token(config, kv) for kv in shown},
    }


def memory_plan(path: str, kv: str | None, memory: str, threads: int) -> dict[str, Any]:
    """Where memory goes, from the engine itself."""
    from framequilt.engine import Engine

    with Engine(path, kv=kv, memory=memory, threads=threads) as engine:
        return {**engine.plan(), "kernels": engine.describe_kernels()}


def _decoder_line(decoder: Mapping[str, Any]) -> str:
    attention = decoder["attention"]
    return (
        f"{decoder['layers']} layers of {decoder['hidden']}, {attention['heads']} heads "
        f"({attention['kv_heads']} KV) of {attention['head_dim']}, {decoder['mlp']['kind']} MLP of "
        f"{decoder['mlp']['hidden']}, vocabulary {decoder['vocab']:,}, "
        f"context {decoder['context']:,}"
    )


def _show(record: Mapping[str, Any], plan: Mapping[str, Any] | None, refusal: str) -> None:
    console = out()
    vision = record["vision"]
    said = {key: value for key, value in record["source"].items() if value}
    chosen = [(key, said.pop(key)) for key in ("preset", "method", "quantization") if key in said]
    said.pop("activations", None)
    rows = [
        ("name", record["name"]),
        ("source", ", ".join(f"{key} {value}" for key, value in said.items())),
        *chosen,
        ("decoder", _decoder_line(record["decoder"])),
    ]
    if vision is not None:
        rows.append(
            (
                "vision",
                f"{vision['layers']} layers of {vision['hidden']}, {vision['image_size']} pixels "
                f"in patches of {vision['patch']}, pool {record['visual']['pool']}, "
                f"newline {record['visual']['newline']}",
            )
        )
    bits = f"{record['effective_bits']:.2f} bits each"
    rows.append(("weights", f"{record['weights']}: {record['parameters']:,}, {bits}"))
    rows.append(("activations", record["activations"]))
    default = parse_kv_format(record["defaults"]["kv"]).name
    per_token = ", ".join(
        f"{kv} {human_bytes(size)}{' (default)' if kv == default else ''}"
        for kv, size in record["kv_bytes_per_token"].items()
    )
    rows.append(("KV per token", per_token))
    console.print(pairs(record["path"], rows))
    table = Table(title="\nweight formats", title_justify="left", box=None)
    for column in ("format", "linears", "parameters", "size", "bits"):
        table.add_column(column, justify="left" if column == "format" else "right")
    for name, row in record["formats"].items():
        table.add_row(
            name,
            str(row["linears"]),
            f"{row['parameters']:,}",
            human_bytes(row["bytes"]),
            f"{row['effective_bits']:.2f}",
        )
    console.print(table)
    table = Table(title="\nfiles", title_justify="left", box=None)
    for column in ("name", "size", "SHA-256 (checked)" if record["verified"] else "SHA-256"):
        table.add_column(column)
    for entry in record["files"]:
        table.add_row(entry["name"], human_bytes(entry["bytes"]), entry["sha256"][:16])
    for name in record["other_files"]:
        table.add_row(name, "-", "not part of the model")
    console.print(table)
    if plan is not None:
        rows = [
            ("weights", f"{human_bytes(plan['weight_bytes'])} (mapped)"),
            ("workspace", human_bytes(plan["workspace_bytes"])),
            ("KV pages", f"{human_bytes(plan['kv_bytes'])}, {plan['pages']} pages"),
            ("fits", f"{plan['tokens']:,} tokens of one unreduced sequence"),
        ]
        console.print(pairs("\nmemory plan", rows))
    elif refusal:
        console.print(f"\nno memory plan: {refusal}", markup=False)


@guarded
def command(
    model: common.ModelArgument,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte and compare SHA-256.")
    ] = False,
    kv: common.KvOption = None,
    memory: common.MemoryOption = "1GiB",
    threads: common.ThreadsOption = 0,
    as_json: common.JsonOption = False,
) -> None:
    """Show a model: its parts, formats, sizes, files, KV bytes and memory plan."""
    record = describe(model, verify=verify)
    plan, refusal = None, ""
    try:
        plan = memory_plan(model, kv, memory, threads)
    except FramequiltError as error:  # the description is worth showing without it
        refusal = str(error)
    if as_json:
        print_json({**record, "plan": plan, "plan_error": refusal or None})
    else:
        _show(record, plan, refusal)
