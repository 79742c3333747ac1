"""Shapes of the models under test: published sizes, written down as Framequilt descriptions.

Weights are random (see models.py): speed depends on shapes and formats, and on values only in that
activations have to be spread like real ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from framequilt.convert.spec import (
    Attention,
    Decoder,
    Mlp,
    Model,
    Norm,
    Projector,
    Rope,
    Vision,
    Visual,
)


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a gated pre-norm decoder; `bias`: q, k and v have one."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    tied: bool
    rope_base: float
    bias: bool
    context: int = 32768

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads

    @property
    def layer_weights(self) -> int:
        """Weights of the linears of one layer."""
        kv = self.kv_heads * self.head_dim
        return 2 * self.hidden * (self.hidden + kv) + 3 * self.hidden * self.mlp

    def decoder(self) -> Decoder:
        """The block of config.json."""
        return Decoder(
            hidden=self.hidden,
            layers=self.layers,
            vocab=self.vocab,
            context=self.context,
            tied_embedding=self.tied,
            embedding_scale=1.0,
            norm=Norm("rms", 1e-6),
            attention=Attention(
                self.heads, self.kv_heads, self.head_dim, self.bias, False, self.head_dim**-0.5
            ),
            rope=Rope(self.rope_base, self.head_dim),
            mlp=Mlp("gated", "silu", self.mlp, False),
        )


QWEN2_05B = DecoderShape(896, 24, 14, 2, 4864, 151936, True, 1e6, True)
QWEN2_7B = DecoderShape(3584, 28, 28, 4, 18944, 152064, False, 1e6, True)
# Prompt processing of the whole model takes minutes here: four of the 28 layers, and one, from
# which benches.py tells the time of all. The vocabulary is small: only the last row meets the head.
QWEN2_7B_28L = replace(QWEN2_7B, vocab=32000, tied=True)
QWEN2_7B_4L = replace(QWEN2_7B_28L, layers=4)
QWEN2_7B_1L = replace(QWEN2_7B_28L, layers=1)
SMOLLM2_135M = DecoderShape(576, 30, 9, 3, 1536, 49152, True, 1e5, False, 8192)
TINY = DecoderShape(64, 2, 2, 1, 128, 256, True, 1e4, True, 4096)

DECODERS = {
    "qwen2-0.5b": QWEN2_05B,
    "qwen2-7b": QWEN2_7B,
    "qwen2-7b-28l": QWEN2_7B_28L,
    "qwen2-7b-4l": QWEN2_7B_4L,
    "qwen2-7b-1l": QWEN2_7B_1L,
    "smollm2-135m": SMOLLM2_135M,
    "tiny": TINY,
}


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a vision tower."""

    image: int
    patch: int
    hidden: int
    layers: int
    heads: int
    mlp: int

    @property
    def patches(self) -> int:
        """Patches of a frame."""
        return (self.image // self.patch) ** 2

    @property
    def flop(self) -> float:
        """Multiply-adds of a frame, counted twice: linears and attention."""
        layer = self.patches * (4 * self.hidden**2 + 2 * self.hidden * self.mlp)
        layer += 2 * self.patches**2 * self.hidden
        return 2.0 * (self.layers * layer + self.patches * 3 * self.patch**2 * self.hidden)

    def vision(self) -> Vision:
        """The block of config.json."""
        head_dim = self.hidden // self.heads
        return Vision(
            image_size=self.image,
            patch=self.patch,
            channels=3,
            hidden=self.hidden,
            layers=self.layers,
            patch_bias=True,
            post_norm=False,
            norm=Norm("layer", 1e-6),
            attention=Attention(self.heads, self.heads, head_dim, True, True, head_dim**-0.5),
            mlp=Mlp("plain", "gelu_tanh", self.mlp, True),
        )


SIGLIP_SO400M = TowerShape(384, 14, 1152, 27, 16, 4304)
TINY_TOWER = TowerShape(56, 14, 64, 2, 2, 128)
# A decoder that costs nothing: what is measured is the tower before it.
NO_DECODER = DecoderShape(128, 1, 2, 1, 128, 256, True, 1e4, False, 65536)


def text_model(shape: DecoderShape) -> Model:
    """A model without vision."""
    return Model(shape.decoder())


def video_model(tower: TowerShape, shape: DecoderShape) -> Model:
    """Tower, two-layer projector, bilinear pooling by 2 with a newline per grid row, decoder."""
    return Model(
        decoder=shape.decoder(),
        vision=tower.vision(),
        projector=Projector("mlp", tower.hidden, shape.hidden, shape.hidden, "gelu"),
        visual=Visual("bilinear", 2, "grid", False, 0),
    )


MODELS = {name: text_model(shape) for name, shape in DECODERS.items()} | {
    "siglip": video_model(SIGLIP_SO400M, NO_DECODER),
    # For its projector: a layer of tower and decoder each is the least that a model has.
    "llava-video-1l": video_model(replace(SIGLIP_SO400M, layers=1), QWEN2_7B_1L),
    "tiny-video": video_model(TINY_TOWER, TINY),
}
