"""Phase one: the tower and projector learn dense labels of single frames.

The heads read the pooled, projected tokens after an RMS norm, which is what the first LM layer
reads, so the labels end up linearly readable for the LM. The heads are dropped afterwards.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framequilt.demo.labels import PATCH_CLASSES, dense_labels
from framequilt.demo.model import DemoConfig, Vision, to_images
from framequilt.demo.render import render_with_mask
from framequilt.demo.runstate import Batches, Log, StopFlag, load_state, save_atomic
from framequilt.demo.world import COLOURS, SHAPES, sample_world

FRAMES_PER_SCENE = 4
TRAIN_SEED_BASE = 1_000_000_000


@dataclass
class TowerBatch:
    """Frames and labels of several scenes, one row per frame."""

    frames: npt.NDArray[np.uint8]  # [n, size, size, 3]
    mask: npt.NDArray[np.float32]  # [n, size, size] coverage by shapes
    patch: npt.NDArray[np.int64]
    patch_digit: npt.NDArray[np.int64]
    cell_shape: npt.NDArray[np.int64]
    cell_digit: npt.NDArray[np.int64]
    cell_share: npt.NDArray[np.float32]
    cell_touch: npt.NDArray[np.int64]


def tower_batch(config: DemoConfig, first_seed: int, scenes: int) -> TowerBatch:
    """Draws `scenes` worlds from consecutive seeds."""
    frames, masks, rows = [], [], []
    for seed in range(first_seed, first_seed + scenes):
        world = sample_world(np.random.default_rng(seed), FRAMES_PER_SCENE, plate_each=0.4)
        pictures, mask = render_with_mask(world, config.image_size)
        frames.append(pictures)
        masks.append(mask)
        rows.append(dense_labels(world, config.grid, config.cells))
    return TowerBatch(
        np.concatenate(frames),
        np.concatenate(masks),
        np.concatenate([r.patch for r in rows]),
        np.concatenate([r.patch_digit for r in rows]),
        np.concatenate([r.cell_shape for r in rows]),
        np.concatenate([r.cell_digit for r in rows]),
        np.concatenate([r.cell_share for r in rows]),
        np.concatenate([r.cell_touch for r in rows]),
    )


def balanced(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, things and emptiness weighted alike: [n, classes], [n]."""
    thing, empty = labels > 0, labels == 0
    full = F.cross_entropy(logits[thing], labels[thing]) if thing.any() else logits.sum() * 0
    return full + F.cross_entropy(logits[empty], labels[empty])


class DenseHeads(nn.Module):
    """Linear readers of tower features and pooled tokens."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.tower_width)
        self.patch = nn.Linear(config.tower_width, PATCH_CLASSES + 11)
        self.outline = nn.Linear(config.tower_width, config.patch_size**2)
        self.splits = [len(COLOURS) * (len(SHAPES) + 1), 11, len(COLOURS), 1, config.cells**2]
        self.cell = nn.Linear(config.width, sum(self.splits))

    def forward(self, vision: Vision, images: Tensor, batch: TowerBatch) -> dict[str, Tensor]:
        """Losses and hit rates by name."""
        feature, shallow = vision.tower.features(images)
        flat = self.patch(self.norm(feature)).flatten(0, 1)
        out: dict[str, Tensor] = {}
        patch = torch.from_numpy(batch.patch).flatten()
        digit = torch.from_numpy(batch.patch_digit).flatten()
        out["loss_patch"] = balanced(flat[:, :PATCH_CLASSES], patch)
        out["loss_patch_digit"] = balanced(flat[:, PATCH_CLASSES:], digit)
        n, g, p = images.shape[0], vision.config.grid, vision.config.patch_size
        mask = torch.from_numpy(batch.mask).view(n, g, p, g, p).transpose(2, 3)
        mask = mask.reshape(n, g * g, -1)
        outline = self.outline(F.layer_norm(shallow, shallow.shape[-1:]))
        out["loss_outline"] = F.binary_cross_entropy_with_logits(outline, mask) * 4
        tokens = vision.pool(vision.projector(feature))
        out["rms"] = tokens.detach().pow(2).mean().sqrt()
        tokens = F.rms_norm(tokens, (tokens.shape[-1],))
        b, c = tokens.shape[:2]
        shape, number, share, touch, place = self.cell(tokens).split(self.splits, -1)
        shape = shape.reshape(-1, len(SHAPES) + 1)
        cell_shape = torch.from_numpy(batch.cell_shape).flatten()
        cell_digit = torch.from_numpy(batch.cell_digit).flatten()
        number = number.reshape(-1, 11)
        out["loss_shape"] = balanced(shape, cell_shape)
        out["loss_digit"] = balanced(number, cell_digit)
        out["loss_share"] = F.mse_loss(share, torch.from_numpy(batch.cell_share)) * 5
        target = torch.from_numpy(batch.cell_touch).float()
        out["loss_touch"] = F.binary_cross_entropy_with_logits(touch[..., 0], target)
        where = torch.arange(c * c).repeat(b)
        out["loss_place"] = F.cross_entropy(place.reshape(-1, c * c), where) * 0.1
        with torch.no_grad():
            for name, logits, want in (
                ("shape", shape, cell_shape),
                ("digit", number, cell_digit),
                ("patch", flat[:, :PATCH_CLASSES], patch),
            ):
                rows = want > 0
                hit = logits[rows].argmax(-1) == want[rows]
                out["hit_" + name] = hit.float().mean()
        return out


def scheduled(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, flat, then linear decay to 5% over the last 40% of the steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    tail = 0.6 * steps
    if step < tail:
        return peak
    return peak * max(0.05, 1.0 - 0.95 * (step - tail) / (steps - tail))


def train_tower(
    run: Path, config: DemoConfig, steps: int, scenes: int = 14, peak: float = 1.5e-3
) -> None:
    """Trains until `steps`, from RUN/tower.pt when it is there."""
    torch.manual_seed(0)
    vision, heads = Vision(config), DenseHeads(config)
    weights = [*vision.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=peak, betas=(0.9, 0.98), weight_decay=0.02)
    path, step = run / "tower.pt", 0
    state = load_state(path)
    if state is not None:
        vision.load_state_dict(state["vision"])
        fresh = heads.load_state_dict(state["heads"], strict=False).missing_keys
        if not fresh:
            optimizer.load_state_dict(state["optimizer"])
        step = int(state["step"])

    def save() -> None:
        save_atomic(
            path,
            {
                "vision": vision.state_dict(),
                "heads": heads.state_dict(),
                "optimizer": optimizer.state_dict(),
                "config": config.to_dict(),
                "step": step,
            },
        )

    def make(index: int) -> TowerBatch:
        return tower_batch(config, TRAIN_SEED_BASE + index * 64, scenes)

    stop, log = StopFlag(), Log(run / "tower.jsonl")
    batches = Batches(make, step)
    began = saved = time.monotonic()
    first = step
    for _, batch in batches:
        if step >= steps or stop.stopped:
            break
        for group in optimizer.param_groups:
            group["lr"] = scheduled(step, steps, peak)
        out = heads(vision, to_images(torch.from_numpy(batch.frames)), batch)
        loss = torch.stack([v for k, v in out.items() if k.startswith("loss")]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            rate = (step - first) * batch.frames.shape[0] / (time.monotonic() - began)
            row: dict[str, float] = {"step": step, "frames_per_second": rate}
            row.update({k: v.item() for k, v in out.items()})
            log.write(row)
        if time.monotonic() - saved > 120:
            save()
            saved = time.monotonic()
    batches.close()
    save()
