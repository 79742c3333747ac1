"""What attention over integers costs in real vision towers, scheme by scheme.

    pip install onnx    # and onnxruntime, for --check
    PYTHONPATH=python python tests/bench/attention_quality.py [--tower clip] [--images N]

Needs torch and av (the extra `train`) and onnx. Weights and pictures are fetched, see
`attention_towers.py`. Every scheme runs through the whole tower over float linears, and some over
W8A8 linears too (weights: groups of 128 inputs; inputs: a scale per token); all are compared with
the float tower, and those over W8A8 with W8A8 alone. Of one head of dim d over T tokens:

    P = exp(S - max S), S = Q K^T / sqrt(d)    [T, T]        out = P V / (sum of P)    [T, d]

A scheme says what Q and K are rounded to (S0, a to d), and what P and V are (p0 to p4). Rounding
per token and the keys' mean are from SageAttention (arXiv 2410.02367, section 4), which keeps P and
V in 16-bit floats; P and V as integers are not. b+p1 is the engine's `attention=a8`, but for the
polynomial of its exp. Codes lie in float32: sums of products are exact up to 2^24.

Writes attention.json (the errors of every picture) and attention.md. Rows that are in the file are
not measured again. `--check` compares the float towers with onnxruntime, and ends.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from attention_towers import CHANNEL, HEAD, TOKEN, TOWERS, Tower, all_pictures, pixels, rounded
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


# Schemes. q, k, v: [batch, heads, tokens, head_dim].
def centred(k: torch.Tensor) -> torch.Tensor:
    """Keys without their mean over the tokens, which moves all scores of a query alike."""
    return k - k.mean(-2, keepdim=True)


QK: dict[str, Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "S0": lambda q, k: (q, k),
    "a": lambda q, k: (rounded(q, TOKEN, 127), rounded(k, TOKEN, 127)),
    "b": lambda q, k: (rounded(q, TOKEN, 127), rounded(centred(k), TOKEN, 127)),
    "c": lambda q, k: (rounded(q, TOKEN, 127), rounded(centred(k), HEAD, 127)),
    "d": lambda q, k: (rounded(q, HEAD, 2047), rounded(k, HEAD, 2047)),
}
# The code of exp(0), and the greatest code of V.
PV: dict[str, tuple[int, int] | None] = {
    "p0": None,
    "p1": (2**13, 1023),
    "p2": (255, 127),
    "p3": (2**13, 127),
    "p4": (2**12, 2047),
}
MEANING = {
    "a": "Q, K 8 bits per token",
    "b": "as a, K without its mean",
    "c": "as b, K one scale a head",
    "d": "Q, K 12 bits per head",
    "p1": "P 2^-13, V 11 bits per channel",
    "p2": "P u8, V 8 bits",
    "p3": "P 2^-13, V 8 bits",
    "p4": "P 2^-12, V 12 bits",
}
OVER_FLOAT = ("a+p0", "b+p0", "c+p0", "d+p0", "S0+p1", "S0+p2", "S0+p3", "S0+p4")
OVER_W8A8 = ("S0+p0", "a+p1", "b+p1", "b+p2")
ROWS = [f"float {s}" for s in OVER_FLOAT] + [f"W8A8 {s}" for s in OVER_W8A8]
PAIRS = (
    *((f"float {other}+p0", "float b+p0") for other in ("a", "c")),
    *((f"float S0+{other}", "float S0+p1") for other in ("p2", "p3", "p4")),
    *((f"W8A8 {other}", "W8A8 S0+p0") for other in OVER_W8A8[1:]),
    *((f"W8A8 {other}", "W8A8 b+p1") for other in ("a+p1", "b+p2")),
)


def attention(scheme: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention [batch, heads, tokens, head_dim] in a scheme such as "b+p1"; "S0+p0" is exact."""
    qk, pv = scheme.split("+")
    q, k = QK[qk](q, k)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    codes = PV[pv]
    if codes is not None:
        one, most = codes
        p, v = torch.round(p * one), rounded(v, CHANNEL, most)
    return p @ v / p.sum(-1, keepdim=True)


BATCH = 2  # pictures
CHECKED_SIZE = 224  # pixels, of the graphs

Errors = dict[str, list[float]]  # of a row, a number a picture: relative L2 error, and 1 - cosine
MEASURES = {"hidden": ("hidden, 10⁻³", 1e3), "cos": ("1 - cos, 10⁻⁶", 1e6)}


def measure(
    tower: Tower, x: torch.Tensor, row: str, exact: list[Any], step: Callable[[], None]
) -> Errors:
    """Errors of a row. `exact`: outputs of the float tower per batch, added where missing."""
    linears, scheme = row.split()
    found: Errors = {name: [] for name in MEASURES}
    for index, batch in enumerate(x.split(BATCH)):
        if len(exact) <= index:
            exact.append(tower.outputs(tower.run(batch, partial(attention, "S0+p0"), False)))
        want, want_embedding = exact[index]
        got, embedding = tower.outputs(
            tower.run(batch, partial(attention, scheme), linears == "W8A8")
        )
        found["hidden"] += ((got - want).norm(dim=(1, 2)) / want.norm(dim=(1, 2))).tolist()
        cosine = F.cosine_similarity(embedding.double(), want_embedding.double(), dim=-1)
        found["cos"] += (1 - cosine).tolist()
        step()
    return found


def mean_and_error(values: Sequence[float], clusters: Sequence[str]) -> tuple[float, float]:
    """Mean and its standard error; values of one cluster count as one observation."""
    sums: dict[str, float] = {}
    mean = float(np.mean(values))
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    n = len(sums)
    if n < 2:
        return mean, math.nan
    return mean, math.sqrt(sum(s * s for s in sums.values()) * n / (n - 1)) / len(values)


def number(mean: float, error: float, signed: bool = False) -> str:
    """A mean and its standard error, of which two digits are shown: 11.9 ± 1.8."""
    sign = "+" if signed else ""
    if math.isnan(error) or error == 0:
        return f"{mean:{sign}.3g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:{sign}.{digits}f} ± {error:.{digits}f}"


def table(found: dict[str, Any]) -> str:
    """Markdown: errors of every row, and differences of two rows on the same pictures."""
    names = [name for name in TOWERS if name in found]
    titles = [f"{TOWERS[n][0]}, n = {len(found[n]['clusters'])}: {what}" for n in names
              for what, _ in MEASURES.values()]  # fmt: skip

    def cell(name: str, key: str, row: str, other: str | None) -> str:
        measured, clusters = found[name]["rows"], found[name]["clusters"]
        if row not in measured or (other and other not in measured):
            return "-"
        values = np.array(measured[row][key])
        if other:
            values = values - np.array(measured[other][key])
        values = values * MEASURES[key][1]
        return number(*mean_and_error(values.tolist(), clusters), signed=bool(other))

    def lines(first: str, rows: Sequence[tuple[str, str, str | None]]) -> list[str]:
        made = [f"| {first} | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
        for label, row, other in rows:
            cells = [cell(name, key, row, other) for name in names for key in MEASURES]
            made.append(f"| {label} | " + " | ".join(cells) + " |")
        return [*made, ""]

    def label(row: str) -> str:
        parts = [MEANING[part] for part in row.split()[1].split("+") if part in MEANING]
        return f"{row}: {'; '.join(parts) or 'float attention'}"

    single = lines("linears, scheme", [(label(row), row, None) for row in ROWS])
    pairs = [(f"{row} - {other}", row, other) for row, other in PAIRS]
    return "\n".join([*single, *lines("difference on the same pictures", pairs)])


def check(tower: Tower, pictures: torch.Tensor) -> float:
    """Relative L2 error of the float tower against onnxruntime over float weights."""
    import onnx
    import onnxruntime

    graph = tower.graph.graph
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    sources = {name: node for node in graph.node for name in node.output}
    swapped = {}
    for node in graph.node:
        if node.op_type != "MatMulInteger":
            continue
        # Quantize -> MatMulInteger -> Cast -> Mul becomes MatMul of the same inputs.
        (cast,) = users[node.output[0]]
        (end,) = (user for user in users[cast.output[0]] if user.op_type == "Mul")
        weight = onnx.numpy_helper.from_array(tower.graph.weight(node).numpy(), f"{node.name}_w")
        graph.initializer.append(weight)
        inputs = [sources[node.input[0]].input[0], weight.name]
        swapped[end.output[0]] = onnx.helper.make_node("MatMul", inputs, [end.output[0]])
    nodes = [swapped.get(node.output[0], node) for node in graph.node]
    del graph.node[:], graph.output[:]
    graph.node.extend(nodes)
    output = onnx.helper.make_tensor_value_info(tower.hidden_name, onnx.TensorProto.FLOAT, None)
    graph.output.append(output)
    session = onnxruntime.InferenceSession(tower.graph.model.SerializeToString())
    (want,) = session.run(None, {session.get_inputs()[0].name: pictures.numpy()})
    got = tower.outputs(tower.run(pictures, partial(attention, "S0+p0"), False))[0]
    return float(np.linalg.norm(got.numpy() - want) / np.linalg.norm(want))


def main(arguments: list[str]) -> int:
    """Measures what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--tower", action="append", choices=list(TOWERS), help="repeatable (default: all)")
    add("--images", type=int, help="only the first of them")
    add("--row", action="append", choices=ROWS, help="repeatable (default: all)")
    add("--out", type=Path, default=Path("build/attention-quality"))
    add("--threads", type=int, help="of torch")
    add("--check", action="store_true", help="compare the towers with onnxruntime, and end")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    if not importlib.util.find_spec("onnx"):
        sys.exit("weights lie in ONNX files: pip install onnx")
    console = Console()
    everything = all_pictures()
    path = options.out / "attention.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=console) as progress:
        for name in options.tower or TOWERS:
            title, make, every = TOWERS[name]
            pictures = everything[::every][: options.images]
            tower = make()
            x = pixels(pictures, tower)
            if options.check:
                if tower.size == CHECKED_SIZE:
                    console.print(f"{title}: relative L2 error {check(tower, x[:BATCH]):.1e}")
                continue
            names = [picture.name for picture in pictures]
            here = found.setdefault(name, {"pictures": names, "rows": {}})
            here["clusters"] = [picture.cluster for picture in pictures]
            if here["pictures"] != names:
                sys.exit(f"{path}: {name} was measured with other pictures; give another --out")
            missing = [row for row in options.row or ROWS if row not in here["rows"]]
            task = progress.add_task(name, total=len(missing) * -(-len(pictures) // BATCH))
            exact: list[Any] = []
            for row in missing:
                progress.update(task, description=f"{name}: {row}")
                here["rows"][row] = measure(tower, x, row, exact, partial(progress.advance, task))
                # Written after every row: what was measured survives an interruption.
                options.out.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(found, indent=1) + "\n")
                (options.out / "attention.md").write_text(table(found))
    if not options.check:
        console.print(Markdown(table(found)))
        print(f"{path}, attention.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
