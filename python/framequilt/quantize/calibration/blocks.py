"""Forward pass of one layer in torch, in halves: attention, and MLP.

A half is a norm, the linears that read it, something without weights between them (attention
proper, or the activation), one last linear, and the sum with its input. Everything that a method
wants to know or to change happens at the linears, so they are a callable that the halves are given.

Rows are [batch, rows, hidden]; a causal half has positions 0, 1, ... in every batch entry.
Memory: temporaries of one call. Any thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from framequilt.convert.spec import Attention, Decoder, Mlp, Model, Norm, Rope, Vision
from framequilt.errors import InvalidArgument
from framequilt.quantize.formats import ActivationFormat
from framequilt.quantize.rtn import RANGE_FLOOR

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}
PARTS = ("vision", "decoder")


def fake_quantize_rows(x: Tensor, form: ActivationFormat) -> Tensor:
    """Input rows [..., inputs] as the engine multiplies them (engine/CONTRACT.md, 1.4)."""
    if form.bf16:
        return x.to(torch.bfloat16).to(x.dtype)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    floor = float(RANGE_FLOOR)
    if form.symmetric:
        top = 2 ** (form.bits - 1)
        scale = torch.maximum(-low, high).clamp_min(floor) / (top - 1)
        return (x / scale).round_().clamp_(-top, top - 1).mul_(scale)
    low, high = low.clamp_max(0), high.clamp_min(0)
    top = 2**form.bits - 1
    scale = (high - low).clamp_min(floor) / top
    zero = (-(low / scale).round()).clamp(0, top)
    return (x / scale).round_().add_(zero).clamp_(0, top).sub_(zero).mul_(scale)


class Linears:
    """The linears of a layer: name, input rows -> output rows.

    `weights` are a layer's tensors by local name; `activations` says how the inputs of a linear are
    quantized (absent or None: not at all); `observe` sees the input rows before that.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        activations: Mapping[str, ActivationFormat | None] | None = None,
        observe: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        self.weights = weights
        self._activations = activations or {}
        self._observe = observe
        self._last: tuple[Tensor, ActivationFormat, Tensor] | None = None  # q, k and v share theirs

    def __call__(self, name: str, x: Tensor) -> Tensor:
        if self._observe is not None:
            self._observe(name, x)
        form = self._activations.get(name)
        if form is not None:
            if self._last is None or self._last[0] is not x or self._last[1] != form:
                self._last = (x, form, fake_quantize_rows(x, form))
            x = self._last[2]
        return functional.linear(
            x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        )


def apply_norm(x: Tensor, weights: Mapping[str, Tensor], at: str, norm: Norm) -> Tensor:
    """RMS or layer norm of rows [..., hidden]."""
    weight = weights[f"{at}.weight"]
    if norm.kind == "layer":
        return functional.layer_norm(x, (x.shape[-1],), weight, weights[f"{at}.bias"], norm.eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * weight


def inverse_frequencies(rope: Rope) -> Tensor:
    """Angle per position [dims / 2], float64."""
    inverse = rope.base ** (-torch.arange(0, rope.dims, 2, dtype=torch.float64) / rope.dims)
    kind = rope.scaling["kind"]
    if kind == "none":
        return inverse
    if kind == "linear":
        return inverse / rope.scaling["factor"]
    if kind == "llama3":
        low, high = rope.scaling["low_freq_factor"], rope.scaling["high_freq_factor"]
        turns = rope.scaling["original_context"] * inverse / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * inverse / rope.scaling["factor"] + smooth * inverse
    raise InvalidArgument(f"unknown rotary scaling {kind!r}")


def rotate(x: Tensor, inverse: Tensor) -> Tensor:
    """Heads [batch, heads, rows, head_dim]; row n has position n. The first dims turn by halves."""
    angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * inverse
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    half = len(inverse)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


@dataclass(frozen=True)
class Half:
    """One half of a layer: `core` turns the outputs of the first linears into the last one's input.

    `fold` is the first linear whose outputs the core passes on in proportion, channel by channel,
    so that a factor can move from its rows to the columns of the last linear; None where there is
    none.
    """

    name: str  # "attention" or "mlp"
    norm_name: str
    norm: Norm
    firsts: tuple[str, ...]
    last: str
    fold: str | None
    core: Callable[[Mapping[str, Tensor]], Tensor]

    @property
    def linears(self) -> tuple[str, ...]:
        """Local names of all linears, in the order in which they run."""
        return (*self.firsts, self.last)

    def normed(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What the first linears read."""
        return apply_norm(x, weights, self.norm_name, self.norm)

    def inner(self, normed: Tensor, linears: Linears) -> Tensor:
        """What the last linear reads, from the output of the norm."""
        return self.core({name: linears(name, normed) for name in self.firsts})

    def branch(self, normed: Tensor, linears: Linears) -> Tensor:
        """What is added to the rows, from the output of the norm."""
        return linears(self.last, self.inner(normed, linears))

    def forward(self, x: Tensor, linears: Linears) -> Tensor:
        """The whole half."""
        return x + self.branch(self.normed(x, linears.weights), linears)


def halves(spec: Decoder | Vision) -> tuple[Half, Half]:
    """Both halves of every layer of a part; a decoder's attention is causal and rotary."""
    rope = spec.rope if isinstance(spec, Decoder) else None
    return _attention(spec.attention, spec.norm, rope), _mlp(spec.mlp, spec.norm)


def _attention(spec: Attention, norm: Norm, rope: Rope | None) -> Half:
    inverse = None if rope is None else inverse_frequencies(rope)

    def core(parts: Mapping[str, Tensor]) -> Tensor:
        def heads(name: str, count: int) -> Tensor:
            x = parts[f"attention.{name}"]
            return x.view(*x.shape[:2], count, spec.head_dim).transpose(1, 2)

        q, k, v = heads("q", spec.heads), heads("k", spec.kv_heads), heads("v", spec.kv_heads)
        if inverse is not None:
            q, k = rotate(q, inverse), rotate(k, inverse)
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=inverse is not None, scale=spec.scale,
            enable_gqa=spec.heads != spec.kv_heads,
        )  # fmt: skip
        return out.transpose(1, 2).flatten(2)

    firsts = ("attention.q", "attention.k", "attention.v")
    # With grouped queries one row of v feeds several columns of o.
    fold = "attention.v" if spec.heads == spec.kv_heads else None
    return Half("attention", "attention_norm", norm, firsts, "attention.o", fold, core)


def _mlp(spec: Mlp, norm: Norm) -> Half:
    act = ACTIVATIONS[spec.activation]
    if spec.kind == "gated":
        return Half(
            "mlp", "mlp_norm", norm, ("mlp.gate", "mlp.up"), "mlp.down", "mlp.up",
            lambda parts: act(parts["mlp.gate"]) * parts["mlp.up"],
        )  # fmt: skip
    # relu(x / s) = relu(x) / s for s > 0; the other activations are not homogeneous.
    fold = "mlp.up" if spec.activation == "relu" else None
    return Half(
        "mlp", "mlp_norm", norm, ("mlp.up",), "mlp.down", fold, lambda parts: act(parts["mlp.up"])
    )


def part_of(model: Model, name: str) -> Decoder | Vision:
    """The blocks of a part. Errors: InvalidArgument."""
    part: Any = {"decoder": model.decoder, "vision": model.vision}.get(name)
    if part is None:
        raise InvalidArgument(f"the model has no part {name!r}")
    found: Decoder | Vision = part
    return found
