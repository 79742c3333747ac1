"""FrameFusion (arXiv 2501.01986, section 3) in plain torch, one prompt at a time.

The training side's own implementation: it evaluates the demo model with reduction and is an
independent oracle for the engine. Similarities, group sums and importance are float32; ties go
to the lower row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from framequilt.demo.model import LanguageModel

TEXT = -1
NONE = -2.0


@dataclass(frozen=True)
class Params:
    """cost: mean share of visual rows over the layers; the bounds are S_th and N_th."""

    cost: float = 0.3
    similarity_lower_bound: float = 0.6
    ratio_lower_bound: float = 0.1
    budget_layers: int = 28


class BudgetExhausted(ValueError):
    """Merging has spent more than the whole budget."""


def budget_bound(shares: list[float], cost: float, layers: int) -> float:
    """Share of the current visual rows to drop now so that the budget is met exactly."""
    kept, spent = 1.0, 0.0
    for share in shares:
        kept *= 1.0 - share
        spent += kept
    left = layers * cost - spent
    if left < 0:
        raise BudgetExhausted(f"fusion: cost {cost} of {layers} layers is spent after {shares}")
    wanted = left / ((layers - len(shares)) * kept)
    return 0.0 if wanted > 1.0 else 1.0 - wanted


def similarities(x: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine with the previous row of the same slot, NONE where there is none, and that row.

    x [rows, width], slots [rows] (TEXT or 0..P-1) -> [rows] float32, [rows] int64 (-1 = none).
    """
    rows = x.shape[0]
    order = torch.argsort(slots, stable=True)
    previous = torch.full((rows,), -1, dtype=torch.long)
    same = (slots[order][1:] == slots[order][:-1]) & (slots[order][1:] != TEXT)
    previous[order[1:][same]] = order[:-1][same]
    sim = torch.full((rows,), NONE)
    later = (previous >= 0).nonzero()[:, 0]
    a, b = x[later].float(), x[previous[later]].float()
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    sim[later] = torch.where(cosine.isfinite(), cosine, torch.full_like(cosine, NONE))
    return sim, previous


def merge_groups(x: Tensor, previous: Tensor, merged: Tensor) -> Tensor:
    """Every chain of merged rows is averaged into its root; returns all rows, roots updated."""
    rows = x.shape[0]
    root = torch.arange(rows)
    for i in merged.nonzero()[:, 0].tolist():  # row order: the root of previous[i] is final
        root[i] = root[previous[i]]
    total = torch.zeros(x.shape, dtype=torch.float32).index_add_(0, root, x.float())
    count = torch.zeros(rows).index_add_(0, root, torch.ones(rows))
    changed = count > 1
    out = x.clone()
    out[changed] = (total[changed] / count[changed, None]).to(x.dtype)
    return out


@dataclass
class State:
    """What one prompt's reduction remembers between calls, and what it reports."""

    params: Params
    slots: Tensor  # [rows] of the current rows while merging
    visual_start: int
    visual_rows: int
    prompt_rows: int
    finish_merge: bool = False
    finish_prune: bool = False
    shares: list[float] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    @classmethod
    def begin(cls, params: Params, slots: Tensor) -> State:
        """State for a prompt whose rows have these slots."""
        visual = (slots != TEXT).nonzero()[:, 0]
        start, end = int(visual[0]), int(visual[-1])
        return cls(params, slots, start, end - start + 1, slots.shape[0])

    def wants_importance(self) -> bool:
        """Whether the next call prunes."""
        return self.finish_merge and not self.finish_prune

    def call(self, x: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One hook call: [rows, width] -> reduced rows and the indices that survive."""
        rows = x.shape[0]
        everything = torch.arange(rows)
        if rows <= 1 or self.finish_prune:
            self.branches.append("noop")
            return x, everything
        if self.finish_merge:
            if importance is None:
                raise ValueError("State.call: this call prunes and needs importance")
            keep = self._prune(importance, rows)
            self.branches.append("prune")
            return x[keep], keep
        out, kept = self._merge(x)
        self.slots = self.slots[kept]
        return out[kept], kept

    def _merge(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.params
        bound = budget_bound(self.shares, p.cost, p.budget_layers)
        visual = int((self.slots != TEXT).sum())
        sim, previous = similarities(x, self.slots)
        merged = sim >= p.similarity_lower_bound
        share = int(merged.sum()) / visual
        if share < bound:
            self.shares.append(share)
            self.finish_merge = share < p.ratio_lower_bound
            self.branches.append("merge_and_stop" if self.finish_merge else "merge_continue")
        else:
            count = math.floor(bound * visual)
            best = torch.argsort(sim, descending=True, stable=True)[:count]
            merged = torch.zeros_like(merged)
            merged[best] = True
            self.finish_merge = self.finish_prune = True
            self.branches.append("budget_topk")
        return merge_groups(x, previous, merged), (~merged).nonzero()[:, 0]

    def prune_range(self, rows: int) -> tuple[int, int, int]:
        """Of `rows` rows: the first that may go, how many may, and how many of those stay."""
        p = self.params
        count = self.visual_rows - (self.prompt_rows - rows)
        keep = round(count * (1.0 - budget_bound(self.shares, p.cost, p.budget_layers)))
        return self.visual_start, count, keep

    def _prune(self, importance: Tensor, rows: int) -> Tensor:
        begin, count, keep = self.prune_range(rows)
        scores = importance[begin : begin + count]
        best = torch.argsort(scores, descending=True, stable=True)[:keep]
        mask = torch.ones(rows, dtype=torch.bool)
        mask[begin : begin + count] = False
        mask[begin + best] = True
        self.finish_prune = True
        return mask.nonzero()[:, 0]


def last_query_importance(q: Tensor, k: Tensor, queries: int = 1) -> Tensor:
    """Attention received from the last `queries` rows, [heads, rows, d] twice -> [rows]."""
    rows = k.shape[1]
    scores = q[:, -queries:].float() @ k.float().transpose(1, 2) / math.sqrt(q.shape[-1])
    at = torch.arange(rows - min(queries, q.shape[1]), rows)
    scores = scores.masked_fill(torch.arange(rows)[None] > at[:, None], float("-inf"))
    out: Tensor = torch.softmax(scores, -1).mean((0, 1))
    return out


@dataclass
class Prefilled:
    """Result of a prefill: logits of the last row and the rows each layer's KV cache holds."""

    logits: Tensor  # [vocab]
    keys: list[Tensor]  # per layer [heads, rows, d]
    values: list[Tensor]
    next_position: int
    state: State | None


def prefill(lm: LanguageModel, x: Tensor, slots: Tensor, params: Params | None = None) -> Prefilled:
    """Runs the prompt [rows, width] through the LM, reducing when `params` are given."""
    state = State.begin(params, slots) if params is not None else None
    prompt_rows = x.shape[0]
    positions = torch.arange(prompt_rows)
    keys, values = [], []
    if state is not None:
        x, kept = state.call(x)
        positions = positions[kept]
        state.lengths.append(x.shape[0])
    for layer in lm.layers:
        cos, sin = lm.rope(positions[None])
        q, k, v = layer.self_attn.project(layer.input_layernorm(x[None]), cos, sin)
        keys.append(k[0])
        values.append(v[0])
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + layer.self_attn.merge(out)[0]
        if state is not None:
            weights = last_query_importance(q[0], k[0]) if state.wants_importance() else None
            x, kept = state.call(x, weights)
            positions = positions[kept]
            state.lengths.append(x.shape[0])
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits = lm.lm_head(lm.norm(x[-1]))
    return Prefilled(logits, keys, values, prompt_rows, state)


def decode_step(lm: LanguageModel, done: Prefilled, token: int) -> Tensor:
    """Feeds one token after a prefill, growing its caches; returns logits [vocab]."""
    x = lm.embed_tokens.weight[token][None, None]
    cos, sin = lm.rope(torch.tensor([[done.next_position]]))
    done.next_position += 1
    for index, layer in enumerate(lm.layers):
        q, k, v = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
        done.keys[index] = torch.cat([done.keys[index], k[0]], 1)
        done.values[index] = torch.cat([done.values[index], v[0]], 1)
        out = F.scaled_dot_product_attention(q, done.keys[index][None], done.values[index][None])
        x = x + layer.self_attn.merge(out)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return lm.lm_head(lm.norm(x[0, 0]))


def generate(
    lm: LanguageModel,
    x: Tensor,
    slots: Tensor,
    end: int,
    params: Params | None = None,
    limit: int = 8,
) -> tuple[list[int], State | None]:
    """Greedy answer to a prompt: token ids without the end token, and the reduction's state."""
    done = prefill(lm, x, slots, params)
    logits, out = done.logits, []
    for _ in range(limit):
        token = int(logits.argmax())
        if token == end:
            break
        out.append(token)
        logits = decode_step(lm, done, token)
    return out, done.state
