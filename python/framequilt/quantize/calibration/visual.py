"""From pixels to rows of a prompt, in torch: patches, projector, pooling, newlines.

Frames are [frames, channels, size, size], normalised; rows are [rows, decoder hidden]. The stages
between the layers of the tower only: the layers themselves are `blocks`. Any thread.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from framequilt.convert.spec import Model, Visual
from framequilt.errors import InvalidArgument
from framequilt.quantize.calibration.blocks import ACTIVATIONS, Linears, apply_norm
from framequilt.quantize.calibration.checkpoint import Checkpoint


def side_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of everything visual but the layers, by slot name."""
    names = [
        name
        for name in checkpoint.wanted
        if name.startswith(("vision.", "projector.", "visual."))
        and not name.startswith("vision.layers.")
    ]
    return {name: checkpoint.tensor(name) for name in names}


def embed_patches(pixels: Tensor, model: Model, tensors: dict[str, Tensor]) -> Tensor:
    """[frames, channels, size, size] -> [frames, grid * grid, tower hidden].

    Errors: InvalidArgument for pictures of another size.
    """
    spec = model.vision
    if spec is None:
        raise InvalidArgument("the model sees no pictures")
    grid, patch = spec.image_size // spec.patch, spec.patch
    expected = (spec.channels, spec.image_size, spec.image_size)
    if pixels.dim() != 4 or tuple(pixels.shape[1:]) != expected:
        raise InvalidArgument(f"frames are {list(pixels.shape)}, the tower takes {list(expected)}")
    x = pixels[:, :, : grid * patch, : grid * patch]
    x = x.reshape(len(x), spec.channels, grid, patch, grid, patch)
    x = x.permute(0, 2, 4, 1, 3, 5).reshape(len(x), grid * grid, -1)
    return Linears(tensors)("vision.patch_embedding", x) + tensors["vision.position"]


def project(states: Tensor, model: Model, tensors: dict[str, Tensor]) -> Tensor:
    """Tower output [frames, patches, tower hidden] -> [frames, patches, decoder hidden]."""
    assert model.vision is not None and model.projector is not None
    if model.vision.post_norm:
        states = apply_norm(states, tensors, "vision.post_norm", model.vision.norm)
    linears = Linears(tensors)
    act = ACTIVATIONS[model.projector.activation]
    return linears("projector.layers.1", act(linears("projector.layers.0", states)))


def video_rows(patches: Tensor, visual: Visual, tensors: dict[str, Tensor]) -> Tensor:
    """Projected patches of a video's frames -> its rows: pooling, then newlines."""
    frames, count, hidden = patches.shape
    grid = round(count**0.5)
    maps = _pool(patches.view(frames, grid, grid, hidden).permute(0, 3, 1, 2), visual)
    rows = maps.permute(0, 2, 3, 1)
    mode = visual.newline
    if mode == "none":
        return rows.reshape(-1, hidden)
    newline = tensors["visual.newline"]
    if mode == "grid":
        rows = torch.cat([rows, newline.expand(frames, rows.shape[1], 1, hidden)], 2)
    elif mode == "frame":
        rows = torch.cat([rows.flatten(1, 2), newline.expand(frames, 1, hidden)], 1)
    rows = rows.reshape(-1, hidden)
    return torch.cat([rows, newline[None]]) if mode == "one_token" else rows


def _pool(maps: Tensor, visual: Visual) -> Tensor:
    """[frames, hidden, grid, grid] -> [frames, hidden, side, side]."""
    stride = visual.pool_stride
    if visual.pool == "bilinear":
        side = -(-maps.shape[-1] // stride)
        return functional.interpolate(maps, size=(side, side), mode="bilinear")
    if visual.pool == "average":
        return functional.avg_pool2d(maps, stride)
    return functional.max_pool2d(maps, stride) if visual.pool == "max" else maps
