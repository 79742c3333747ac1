"""Training-time stand-in for FrameFusion: merging of input embeddings and random thinning.

The real thing (`fusion`) works layer by layer on one prompt; this one works on a batch, before
the first layer, so that the LM meets averaged rows, gaps in positions and missing newlines.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def frame_cosines(visual: Tensor) -> Tensor:
    """Cosine of every row with the row before it in its slot, [b, F, P, D] -> [b, F - 1, P]."""
    return F.cosine_similarity(visual[:, 1:].float(), visual[:, :-1].float(), dim=-1)


def merge_runs(visual: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Averages runs of rows whose cosine with the row before reaches `threshold`.

    Returns the rows with run means at run starts [b, F, P, D], and which rows start a run.
    """
    b, f, p, d = visual.shape
    starts = torch.ones(b, f, p, dtype=torch.bool)
    if f > 1:
        starts[:, 1:] = frame_cosines(visual.detach()) < threshold
    run = starts.long().cumsum(1) - 1  # [b, F, P] run number within the slot
    index = run.unsqueeze(-1).expand(b, f, p, d)
    total = torch.zeros_like(visual).scatter_add(1, index, visual)
    count = torch.zeros(b, f, p).scatter_add(1, run, torch.ones(b, f, p)).clamp_min(1.0)
    mean = total / count.unsqueeze(-1)
    return mean.gather(1, index), starts


def compact(rows: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moves kept rows to the front: [b, n, D], [b, n] -> rows, original index, validity.

    Rows are in their order; the result is as long as the fullest sample, padded at the end.
    """
    longest = int(keep.sum(1).max())
    order = torch.argsort((~keep).to(torch.int8), dim=1, stable=True)[:, :longest]
    valid = keep.gather(1, order)
    picked = rows.gather(1, order.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
    return picked, order, valid


def thin(starts: Tensor, keep_share: float, generator: torch.Generator) -> Tensor:
    """Keeps each True of `starts` with chance `keep_share`."""
    return starts & (torch.rand(starts.shape, generator=generator) < keep_share)
