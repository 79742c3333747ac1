"""What a model is, as the converter fills it in: the blocks of config.json (engine/CONTRACT.md,
1.1) and the tensors that they need (1.2). Pure data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from framequilt.errors import Unsupported


@dataclass(frozen=True)
class Norm:
    """RMS norm (weight) or layer norm (weight and bias)."""

    kind: Literal["rms", "layer"]
    eps: float


@dataclass(frozen=True)
class Attention:
    """Sizes of an attention block; `scale` multiplies q.k."""

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool
    output_bias: bool
    scale: float


@dataclass(frozen=True)
class Rope:
    """Rotary positions, rotate-half, over the first `dims` of a head."""

    base: float
    dims: int
    scaling: dict[str, Any] = field(default_factory=lambda: {"kind": "none"})


@dataclass(frozen=True)
class Mlp:
    """plain: up, activation, down. gated: activation(gate) * up, then down."""

    kind: Literal["plain", "gated"]
    activation: str
    hidden: int
    bias: bool


@dataclass(frozen=True)
class Decoder:
    """A pre-norm decoder."""

    hidden: int
    layers: int
    vocab: int
    context: int
    tied_embedding: bool
    embedding_scale: float
    norm: Norm
    attention: Attention
    rope: Rope
    mlp: Mlp


@dataclass(frozen=True)
class Vision:
    """A pre-norm encoder over patches with learned positions; `layers` are those that run."""

    image_size: int
    patch: int
    channels: int
    hidden: int
    layers: int
    patch_bias: bool
    post_norm: bool
    norm: Norm
    attention: Attention
    mlp: Mlp


@dataclass(frozen=True)
class Projector:
    """Two linears with an activation between them."""

    kind: Literal["mlp"]
    input: int
    hidden: int
    output: int
    activation: str


@dataclass(frozen=True)
class Visual:
    """From projected patches to rows of the prompt."""

    pool: Literal["none", "bilinear", "average", "max"]
    pool_stride: int
    newline: Literal["none", "grid", "frame", "one_token"]
    image_newline: bool
    image_max_tiles: int


@dataclass(frozen=True)
class Model:
    """A decoder, with or without everything visual."""

    decoder: Decoder
    vision: Vision | None = None
    projector: Projector | None = None
    visual: Visual | None = None

    def to_json(self) -> dict[str, Any]:
        """The four blocks of config.json."""
        return asdict(self)


ACTIVATIONS: dict[str, str] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True)
class Slot:
    """One tensor that the model needs. Linears are [out, in] before they are stored."""

    shape: tuple[int, ...]
    linear: bool = False


def slots(model: Model) -> dict[str, Slot]:
    """All tensors of a model: `X.weight` and `X.bias` of each linear X, and the vectors."""
    result: dict[str, Slot] = {}

    def linear(name: str, out: int, inputs: int, bias: bool) -> None:
        result[f"{name}.weight"] = Slot((out, inputs), linear=True)
        if bias:
            result[f"{name}.bias"] = Slot((out,))

    def norm(name: str, kind: Norm, width: int) -> None:
        result[f"{name}.weight"] = Slot((width,))
        if kind.kind == "layer":
            result[f"{name}.bias"] = Slot((width,))

    def layers(part: str, block: Decoder | Vision) -> None:
        attention, mlp, hidden = block.attention, block.mlp, block.hidden
        inner = attention.heads * attention.head_dim
        kv = attention.kv_heads * attention.head_dim
        for n in range(block.layers):
            at = f"{part}.layers.{n}"
            norm(f"{at}.attention_norm", block.norm, hidden)
            linear(f"{at}.attention.q", inner, hidden, attention.qkv_bias)
            linear(f"{at}.attention.k", kv, hidden, attention.qkv_bias)
            linear(f"{at}.attention.v", kv, hidden, attention.qkv_bias)
            linear(f"{at}.attention.o", hidden, inner, attention.output_bias)
            norm(f"{at}.mlp_norm", block.norm, hidden)
            if mlp.kind == "gated":
                linear(f"{at}.mlp.gate", mlp.hidden, hidden, mlp.bias)
            linear(f"{at}.mlp.up", mlp.hidden, hidden, mlp.bias)
            linear(f"{at}.mlp.down", hidden, mlp.hidden, mlp.bias)

    if model.vision and model.projector and model.visual:
        vision, projector = model.vision, model.projector
        patch = vision.channels * vision.patch**2
        linear("vision.patch_embedding", vision.hidden, patch, vision.patch_bias)
        grid = vision.image_size // vision.patch
        result["vision.position"] = Slot((grid * grid, vision.hidden))
        layers("vision", vision)
        if vision.post_norm:
            norm("vision.post_norm", vision.norm, vision.hidden)
        linear("projector.layers.0", projector.hidden, projector.input, True)
        linear("projector.layers.1", projector.output, projector.hidden, True)
        if model.visual.newline != "none" or model.visual.image_newline:
            result["visual.newline"] = Slot((model.decoder.hidden,))
    decoder = model.decoder
    linear("decoder.embedding", decoder.vocab, decoder.hidden, False)
    layers("decoder", decoder)
    norm("decoder.final_norm", decoder.norm, decoder.hidden)
    if not decoder.tied_embedding:
        linear("decoder.head", decoder.vocab, decoder.hidden, False)
    return result


def check_limits(model: Model) -> None:
    """The limits of the format. Errors: Unsupported."""
    blocks = [model.decoder] + ([model.vision] if model.vision else [])
    widths = [width for block in blocks for width in (block.hidden, block.mlp.hidden)]
    bounds = [
        ("layers", max(block.layers for block in blocks), 1024),
        ("hidden width", max(block.hidden for block in blocks), 65536),
        ("MLP width", max(widths), 2**20),
        ("vocabulary", model.decoder.vocab, 2**22),
        ("context", model.decoder.context, 2**24),
    ]
    for what, value, limit in bounds:
        if not 1 <= value <= limit:
            raise Unsupported(f"{what} {value} is not in 1..{limit}")
    for block in blocks:
        attention = block.attention
        if attention.heads % attention.kv_heads:
            raise Unsupported(
                f"{attention.heads} heads are no multiple of {attention.kv_heads} KV heads"
            )
