"""The demo model in plain torch: SigLIP-shaped tower, projector, pooling, Qwen2-shaped LM.

Module names are chosen so that `export` only has to add prefixes to reach the published
LLaVA-Video tensor names. The LM takes embeddings and explicit positions; attention masks are the
caller's business (shared video prefix with several questions in training, plain causal otherwise).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class DemoConfig:
    """Sizes; lengths in elements, image sizes in pixels."""

    image_size: int = 64
    patch_size: int = 8
    tower_width: int = 96
    tower_layers: int = 3
    tower_heads: int = 3
    tower_mlp: int = 384
    width: int = 128
    layers: int = 12
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 256
    vocab: int = 512
    rope_theta: float = 10000.0
    eps: float = 1e-6

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def cells(self) -> int:
        """Pooled cells per side."""
        return (self.grid + 1) // 2

    @property
    def frame_tokens(self) -> int:
        """Visual tokens of one frame, newlines included: FrameFusion's P."""
        return self.cells * (self.cells + 1)

    def to_dict(self) -> dict[str, int | float]:
        """Plain values for JSON and checkpoints."""
        return asdict(self)


class TowerAttention(nn.Module):
    """Full self-attention with biases, SigLIP names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[images, patches, width] -> same."""
        b, n, d = x.shape
        shape = (b, n, self.heads, d // self.heads)
        q = self.q_proj(x).view(shape).transpose(1, 2)
        k = self.k_proj(x).view(shape).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).reshape(b, n, d))


class TowerMlp(nn.Module):
    """fc1, GELU (tanh form), fc2."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> same."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class TowerLayer(nn.Module):
    """Pre-norm encoder layer."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.tower_width, eps=1e-6)
        self.self_attn = TowerAttention(config.tower_width, config.tower_heads)
        self.layer_norm2 = nn.LayerNorm(config.tower_width, eps=1e-6)
        self.mlp = TowerMlp(config.tower_width, config.tower_mlp)

    def forward(self, x: Tensor) -> Tensor:
        """[images, patches, width] -> same."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Tower(nn.Module):
    """Patches to features, before any post layer norm."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.patch_embedding = nn.Conv2d(3, config.tower_width, p, p)
        self.position_embedding = nn.Embedding(config.grid**2, config.tower_width)
        self.layers = nn.ModuleList(TowerLayer(config) for _ in range(config.tower_layers))

    def forward(self, images: Tensor) -> Tensor:
        """[images, 3, size, size] in -1..1 -> [images, patches, tower_width]."""
        return self.features(images)[0]

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features after the last layer and after the first one."""
        w = self.patch_embedding
        p = w.kernel_size[0]
        b, c, h, _ = images.shape
        g = h // p
        rows = images.view(b, c, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(b, g * g, c * p * p)
        x = F.linear(rows, w.weight.view(w.out_channels, -1), w.bias)
        x = x + self.position_embedding.weight
        x = shallow = self.layers[0](x)
        for layer in self.layers[1:]:
            x = layer(x)
        return x, shallow


class Vision(nn.Module):
    """Tower, two-layer projector, bilinear 2x2 pooling, grid newlines."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = Tower(config)
        self.projector = nn.Sequential(
            nn.Linear(config.tower_width, config.width),
            nn.GELU(),
            nn.Linear(config.width, config.width),
        )
        self.image_newline = nn.Parameter(torch.randn(config.width))

    def pool(self, x: Tensor) -> Tensor:
        """[images, patches, width] -> [images, cells, cells, width], half-pixel bilinear."""
        g, c = self.config.grid, self.config.cells
        maps = x.transpose(1, 2).reshape(x.shape[0], -1, g, g)
        if g == 2 * c:  # exact factor 2: bilinear is the plain mean of 2 x 2
            pooled = F.avg_pool2d(maps, 2)
        else:
            pooled = F.interpolate(maps, size=(c, c), mode="bilinear", align_corners=False)
        return pooled.permute(0, 2, 3, 1)

    def add_newlines(self, cells: Tensor) -> Tensor:
        """[images, c, c, width] -> [images, c * (c + 1), width], newline after each row."""
        b, c, _, d = cells.shape
        newline = self.image_newline.to(cells.dtype).expand(b, c, 1, d)
        return torch.cat([cells, newline], 2).reshape(b, c * (c + 1), d)

    def forward(self, images: Tensor) -> Tensor:
        """[images, 3, size, size] -> [images, frame_tokens, width]."""
        return self.add_newlines(self.pool(self.projector(self.tower(images))))


class RmsNorm(nn.Module):
    """x / rms(x) * weight, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> same."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of shape positions.shape + [head_dim], halves repeated (Qwen2 layout)."""
    inverse = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = positions.to(torch.float32)[..., None] * inverse
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary positions to [..., rows, head_dim]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Attention(nn.Module):
    """Qwen2 projections; the attention pattern itself is given by the caller."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_dim = config.width // config.heads
        inner, kv = config.heads * self.head_dim, config.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.width, inner)
        self.k_proj = nn.Linear(config.width, kv)
        self.v_proj = nn.Linear(config.width, kv)
        self.o_proj = nn.Linear(inner, config.width, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[b, rows, width] -> rotated q [b, heads, rows, d], k and v repeated to all heads."""
        b, n, _ = x.shape
        q = self.q_proj(x).view(b, n, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        group = self.heads // self.kv_heads
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    def merge(self, out: Tensor) -> Tensor:
        """[b, heads, rows, d] -> [b, rows, width]."""
        b, h, n, d = out.shape
        return self.o_proj(out.transpose(1, 2).reshape(b, n, h * d))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp, bias=False)
        self.down_proj = nn.Linear(config.mlp, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm decoder layer."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.width, config.eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RmsNorm(config.width, config.eps)
        self.mlp = Mlp(config)


class LanguageModel(nn.Module):
    """Qwen2-shaped decoder."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RmsNorm(config.width, config.eps)
        self.lm_head = nn.Linear(config.width, config.vocab, bias=False)
        deep = 1.0 / math.sqrt(2 * config.layers)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.dim() == 2:
                std = 1.0 / math.sqrt(weight.shape[1])
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std *= deep
                nn.init.normal_(weight, std=std)
        nn.init.normal_(self.embed_tokens.weight, std=1.0)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin for positions [b, rows], shaped to broadcast over heads."""
        head_dim = self.config.width // self.config.heads
        cos, sin = rope_table(positions, head_dim, self.config.rope_theta)
        return cos.unsqueeze(1), sin.unsqueeze(1)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Plain causal forward: [b, rows, width], [b, rows] -> logits [b, rows, vocab]."""
        cos, sin = self.rope(positions)
        for layer in self.layers:
            q, k, v = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer.self_attn.merge(out)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.lm_head(self.norm(x))


class DemoModel(nn.Module):
    """Vision and language together."""

    def __init__(self, config: DemoConfig | None = None) -> None:
        super().__init__()
        self.config = config or DemoConfig()
        self.vision = Vision(self.config)
        self.language = LanguageModel(self.config)


def to_images(frames: Tensor) -> Tensor:
    """uint8 [n, size, size, 3] -> float [n, 3, size, size] in -1..1 (mean and std 0.5)."""
    return frames.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0
