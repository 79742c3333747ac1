"""How far quantized KV caches, or inputs of linears, move the predictions of a real model.

    PYTHONPATH=python python tests/bench/kv_quality.py TEXT... --tokens 384

Converts SmolLM2-135M-Instruct (fetched as the tests do) to `--weights` and runs the first
`--tokens` tokens of every text once per format. Prints for each format the mean KL divergence of
the next token's distribution from that with kv32 and float32 inputs, its 99th percentile, the share
of equal most likely tokens, and the bytes of KV per token. Needs nothing but the compiled engine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
from oracles.native import NativeEngine

from framequilt.convert import convert
from framequilt.kv_format import parse_kv_format
from framequilt.model_directory import ModelDirectory
from framequilt.resources import smollm2_gguf
from framequilt.tokenizer import Tokenizer

FORMATS = (
    "kv32+rotate", "kv16", "kv8", "k8v4", "k4v8",
    "kv6", "kv4", "kv4+rotate", "kv4g32", "kv4g32+rotate", "kv4+ends16",
    "kv3", "kv3+rotate", "kv3g32", "kv3g32+rotate",
    "kv2", "kv2+rotate", "kv2g16", "kv2g16+rotate", "k4v2g32",
)  # fmt: skip


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log probabilities of rows of logits."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=384)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--weights", default="f32")
    parser.add_argument(
        "--activations",
        nargs="*",
        default=[],
        help="inputs of all linears, with kv32: abf16 a8 ...",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f32"
        convert(smollm2_gguf(), path, weights=args.weights, kv="kv32")
        config = ModelDirectory(path).config
        tokenizer = Tokenizer.open(path, config["tokens"]["tokenizer"])
        prompts = [tokenizer.encode(text.read_text())[: args.tokens] for text in args.texts]

        def run(kv: str, activations: str = "a16") -> list[NDArray[np.float64]]:
            engine = NativeEngine(
                path, kv=kv, activations=activations, memory_bytes=1 << 30, max_context=1024
            )
            rows = []
            for prompt in prompts:
                logits = engine.run(prompt, return_prompt_logits=True).prompt_logits
                assert logits is not None
                rows.append(log_softmax(logits))
            return rows

        exact = run("kv32")
        attention, layers = config["decoder"]["attention"], config["decoder"]["layers"]
        total = sum(len(prompt) for prompt in prompts)
        print(f"{len(prompts)} texts, {total} tokens, head_dim {attention['head_dim']}")
        print("| format | bytes per token | mean KL | 99th percentile | same first choice |")
        print("|---|---|---|---|---|")
        rows = [(kv, kv, "a16") for kv in args.formats]
        rows += [(a, "kv32", f"{a},head={a}") for a in args.activations]
        for name, kv, inputs in rows:
            kl, same = [], []
            for got, want in zip(run(kv, inputs), exact, strict=True):
                kl.append((np.exp(want) * (want - got)).sum(axis=1))
                same.append(got.argmax(axis=1) == want.argmax(axis=1))
            form = parse_kv_format(kv)
            size = sum(
                form.of_layer(layer, layers).bytes_per_token(attention["head_dim"])
                for layer in range(layers)
            )
            all_kl = np.concatenate(kl)
            print(
                f"| `{name}` | {size * attention['kv_heads']:,.0f} | {all_kl.mean():.2g} | "
                f"{np.quantile(all_kl, 0.99):.2g} | {np.concatenate(same).mean():.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
