"""A plain numpy forward pass over a model directory, as engine/CONTRACT.md describes the model.

Float64 throughout, dense weights, whole prompt at once, no cache: slow and simple, an oracle for
what a converted directory means. Weights come dequantized through `ModelDirectory`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framequilt.model_directory import ModelDirectory

Rows = NDArray[np.float64]


def erf(x: Rows) -> Rows:
    """The error function, elementwise."""
    return np.vectorize(math.erf, otypes=[np.float64])(x)


ACTIVATIONS: dict[str, Any] = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


class Forward:
    """Reads a directory once; the methods are the stages of the model."""

    def __init__(self, path: Path) -> None:
        self.directory = ModelDirectory(path)
        self.config = self.directory.config

    def linear(self, x: Rows, slot: str) -> Rows:
        y = x @ self.directory.linear(slot).astype(np.float64).T
        bias = self.directory.tensors.get(f"{slot}.bias")
        return y if bias is None else y + bias.data

    def norm(self, x: Rows, slot: str, spec: dict[str, Any]) -> Rows:
        weight = self.directory.vector(f"{slot}.weight").astype(np.float64)
        if spec["kind"] == "rms":
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + spec["eps"]) * weight
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + spec["eps"])
        return x * weight + self.directory.vector(f"{slot}.bias")

    def inverse_frequencies(self) -> Rows:
        rope = self.config["decoder"]["rope"]
        inverse = rope["base"] ** (-np.arange(0, rope["dims"], 2) / rope["dims"])
        scaling = rope["scaling"]
        if scaling["kind"] == "linear":
            return inverse / scaling["factor"]
        if scaling["kind"] == "llama3":
            turns = scaling["original_context"] * inverse / (2 * np.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            smooth = np.clip((turns - low) / (high - low), 0, 1)
            return (1 - smooth) * inverse / scaling["factor"] + smooth * inverse
        return inverse

    def rotate(self, x: Rows) -> Rows:
        """[rows, heads, head_dim]; row n has position n."""
        angles = np.arange(len(x))[:, None, None] * self.inverse_frequencies()
        half = angles.shape[-1]
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def attention(self, x: Rows, at: str, spec: dict[str, Any], causal: bool) -> Rows:
        heads, kv_heads, size = spec["heads"], spec["kv_heads"], spec["head_dim"]
        q = self.linear(x, f"{at}.q").reshape(len(x), heads, size)
        k = self.linear(x, f"{at}.k").reshape(len(x), kv_heads, size)
        v = self.linear(x, f"{at}.v").reshape(len(x), kv_heads, size)
        if causal:
            q, k = self.rotate(q), self.rotate(k)
        k, v = (np.repeat(each, heads // kv_heads, axis=1) for each in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) * spec["scale"]
        if causal:
            scores = np.where(np.tril(np.ones((len(x), len(x)), bool)), scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        return self.linear(np.einsum("hqk,khd->qhd", scores, v).reshape(len(x), -1), f"{at}.o")

    def block(self, x: Rows, at: str, spec: dict[str, Any], causal: bool) -> Rows:
        x = x + self.attention(
            self.norm(x, f"{at}.attention_norm", spec["norm"]),
            f"{at}.attention",
            spec["attention"],
            causal,
        )
        y = self.norm(x, f"{at}.mlp_norm", spec["norm"])
        act = ACTIVATIONS[spec["mlp"]["activation"]]
        if spec["mlp"]["kind"] == "gated":
            y = act(self.linear(y, f"{at}.mlp.gate")) * self.linear(y, f"{at}.mlp.up")
        else:
            y = act(self.linear(y, f"{at}.mlp.up"))
        return x + self.linear(y, f"{at}.mlp.down")

    def embed(self, ids: list[int]) -> Rows:
        """[rows] -> [rows, hidden]."""
        table = self.directory.linear("decoder.embedding").astype(np.float64)
        return table[ids] * self.config["decoder"]["embedding_scale"]

    def logits(self, rows: Rows) -> Rows:
        """Input rows [rows, hidden] -> logits [rows, vocab]."""
        spec = self.config["decoder"]
        for n in range(spec["layers"]):
            rows = self.block(rows, f"decoder.layers.{n}", spec, causal=True)
        rows = self.norm(rows, "decoder.final_norm", spec["norm"])
        return self.linear(rows, "decoder.embedding" if spec["tied_embedding"] else "decoder.head")

    def patches(self, pixels: Rows) -> Rows:
        """One image [3, size, size] -> projected patches [grid * grid, decoder hidden]."""
        spec = self.config["vision"]
        grid, patch = spec["image_size"] // spec["patch"], spec["patch"]
        x = pixels[:, : grid * patch, : grid * patch].reshape(-1, grid, patch, grid, patch)
        x = x.transpose(1, 3, 0, 2, 4).reshape(grid * grid, -1)
        x = self.linear(x, "vision.patch_embedding") + self.directory.vector("vision.position")
        for n in range(spec["layers"]):
            x = self.block(x, f"vision.layers.{n}", spec, causal=False)
        if spec["post_norm"]:
            x = self.norm(x, "vision.post_norm", spec["norm"])
        act = ACTIVATIONS[self.config["projector"]["activation"]]
        return self.linear(act(self.linear(x, "projector.layers.0")), "projector.layers.1")

    def pool(self, patches: Rows) -> Rows:
        """[grid * grid, hidden] -> [side, side, hidden]."""
        mode, stride = self.config["visual"]["pool"], self.config["visual"]["pool_stride"]
        grid = round(len(patches) ** 0.5)
        maps = patches.reshape(grid, grid, -1)
        if mode == "none":
            return maps
        if mode == "bilinear":
            weights = bilinear(grid, -(-grid // stride))
            return np.einsum("ay,bx,yxd->abd", weights, weights, maps)
        side = grid // stride
        cut = maps[: side * stride, : side * stride].reshape(side, stride, side, stride, -1)
        return cut.mean((1, 3)) if mode == "average" else cut.max((1, 3))

    def video(self, frames: Rows) -> Rows:
        """Frames [n, 3, size, size] -> rows of the prompt [rows, hidden]."""
        mode = self.config["visual"]["newline"]
        newline = self.directory.vector("visual.newline").astype(np.float64)
        result = []
        for frame in frames:
            rows = self.pool(self.patches(frame))
            if mode == "grid":
                end = np.broadcast_to(newline, (len(rows), 1, newline.size))
                rows = np.concatenate([rows, end], 1)
            result.append(rows.reshape(-1, newline.size))
            if mode == "frame":
                result.append(newline[None])
        if mode == "one_token":
            result.append(newline[None])
        return np.concatenate(result)


def bilinear(source: int, target: int) -> Rows:
    """Weights [target, source] of a half-pixel bilinear resize without antialiasing."""
    at = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, source - 1)
    weights = np.zeros((target, source))
    weights[np.arange(target), low] += 1 - (at - low)
    weights[np.arange(target), high] += at - low
    return weights
