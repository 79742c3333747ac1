"""FrameFusion inside training: all questions of one video at once, with gradients.

`fusion.prefill` reduces one prompt; here the rows of a video are merged once for all questions,
because merging looks at visual rows only and those never see a question, and only the pruning,
which depends on the question, splits the video into one sequence per question. What survives is
decided on the values of the moment; gradients flow through the rows that survive and through the
averages. In evaluation the logits equal `fusion.prefill`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from framequilt.demo.fusion import TEXT, BudgetExhausted, Params, State
from framequilt.demo.model import LanguageModel, Layer


@dataclass
class Fused:
    """What the questions of one video give."""

    logits: Tensor  # [Q, T, vocab]
    middle: list[Tensor]  # per asked layer [1 or Q, rows, width]: visual rows that enter it
    index: list[Tensor]  # per asked layer [1 or Q, rows]: which visual row of the video each is
    state: State
    # Set when pruning happened: log importance [Q, rows] of the visual rows it chose among,
    # their indices [rows], and how many stayed.
    scores: Tensor | None = None
    candidates: Tensor | None = None
    kept: int = 0


@dataclass
class _Rows:
    """The video's rows and the questions' rows: together while merging, expanded afterwards."""

    video: Tensor  # [1 or Q, n, width]
    place: Tensor  # [1 or Q, n] original row, which is its position too
    asked: Tensor  # [Q, T, width]
    start: int  # position of the first question token
    mask: Tensor | None = None  # [1, 1, Q * T, n + Q * T] while together
    cos_sin: tuple[Tensor, Tensor] | None = field(default=None)

    def changed(self) -> None:
        """Forgets what depends on which rows there are."""
        self.mask = self.cos_sin = None


def question_blocks(questions: int, length: int, prefix: int) -> Tensor:
    """Who attends to whom: [1, 1, Q * T, prefix + Q * T], every question on its own."""
    own = torch.ones(length, length, dtype=torch.bool).tril()
    block = torch.block_diag(*[own] * questions).to(torch.bool)
    seen = torch.ones(questions * length, prefix, dtype=torch.bool)
    return torch.cat([seen, block], 1)[None, None]


def _attend(lm: LanguageModel, layer: Layer, rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of one layer added to the rows; returns its queries, keys and the new x.

    Together: [1, heads, n + Q * T, d] and x [1, n + Q * T, width]; expanded: Q sequences.
    """
    q, t, width = rows.asked.shape
    n = rows.video.shape[1]
    together = rows.video.shape[0] == 1
    asked = rows.asked.reshape(1, q * t, width) if together else rows.asked
    x = torch.cat([rows.video, asked], 1)
    if rows.cos_sin is None:
        own = (rows.start + torch.arange(t)).repeat(q if together else 1)
        places = torch.cat([rows.place, own.expand(rows.place.shape[0], -1)], 1)
        rows.cos_sin = lm.rope(places)
    query, key, value = layer.self_attn.project(layer.input_layernorm(x), *rows.cos_sin)
    if together:
        if rows.mask is None:
            rows.mask = question_blocks(q, t, n)
        first = F.scaled_dot_product_attention(
            query[:, :, :n], key[:, :, :n], value[:, :, :n], is_causal=True
        )
        then = F.scaled_dot_product_attention(query[:, :, n:], key, value, attn_mask=rows.mask)
        out = torch.cat([first, then], 2)
    else:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return query, key, x + layer.self_attn.merge(out)


def log_importance(query: Tensor, key: Tensor, ends: Tensor, questions: int, rows: int) -> Tensor:
    """Log of the attention from each question's last prompt token, mean over heads, [Q, rows].

    query, key [heads, rows + Q * T, d] of one video and its questions; ends [Q] the index of the
    last prompt token within its question.
    """
    heads, total, d = key.shape
    length = (total - rows) // questions
    last = rows + torch.arange(questions) * length + ends
    asking = query[:, last]  # [heads, Q, d]
    scale = 1.0 / math.sqrt(d)
    video = asking @ key[:, :rows].transpose(1, 2) * scale
    own = key[:, rows:].view(heads, questions, length, d)
    text = torch.einsum("hqd,hqtd->hqt", asking, own) * scale
    later = torch.arange(length)[None] > ends[:, None]
    text = text.masked_fill(later, float("-inf"))
    logs = torch.log_softmax(torch.cat([video, text], -1), -1)[:, :, :rows]
    return torch.logsumexp(logs, 0) - math.log(heads)


def fused_forward(
    lm: LanguageModel,
    head: Tensor,
    visual: Tensor,
    tokens: Tensor,
    ends: Tensor,
    params: Params,
    ask_layers: tuple[int, ...] = (),
) -> Fused:
    """All questions about one video under FrameFusion.

    head [h] token ids before the video, visual [F, P, width], tokens [Q, T] question, answer and
    padding, ends [Q] index of the last prompt token.
    """
    frames, per_frame, width = visual.shape
    h, n = head.numel(), frames * per_frame
    x = torch.cat([lm.embed_tokens(head), visual.reshape(n, width)])
    slots = torch.full((h + n,), TEXT)
    slots[h:] = torch.arange(per_frame).repeat(frames)
    state = State.begin(params, slots)
    rows = _Rows(x[None], torch.arange(h + n)[None], lm.embed_tokens(tokens), h + n)
    done = Fused(torch.empty(0), [], [], state)
    _merge(rows, state)
    state.lengths.append(rows.video.shape[1])
    for number, layer in enumerate(lm.layers):
        if number in ask_layers:
            done.middle.append(rows.video[:, h:])
            done.index.append(rows.place[:, h:] - h)
        query, key, x = _attend(lm, layer, rows)
        now = rows.video.shape[1]
        rows.video, rows.asked = x[:, :now], x[:, now:].reshape(rows.asked.shape)
        if state.wants_importance():
            scores = log_importance(query[0], key[0], ends, tokens.shape[0], now)
            _prune(rows, state, scores, done)
        elif not state.finish_prune:
            _merge(rows, state)
        state.lengths.append(rows.video.shape[1])
        rows.video = rows.video + layer.mlp(layer.post_attention_layernorm(rows.video))
        rows.asked = rows.asked + layer.mlp(layer.post_attention_layernorm(rows.asked))
    done.logits = lm.lm_head(lm.norm(rows.asked))
    return done


def _merge(rows: _Rows, state: State) -> None:
    """One merging call; a budget that merging has overspent ends the reduction.

    Inference refuses such a request; training, which draws its costs, goes on without it.
    """
    try:
        x, kept = state.call(rows.video[0])
    except BudgetExhausted:
        state.finish_merge = state.finish_prune = True
        return
    rows.video, rows.place = x[None], rows.place[:, kept]
    rows.changed()


def _prune(rows: _Rows, state: State, scores: Tensor, done: Fused) -> None:
    """The pruning call: one sequence per question from here on, unless the budget is overspent."""
    questions, now = scores.shape
    state.finish_prune = True
    try:
        begin, count, keep = state.prune_range(now)
    except BudgetExhausted:
        return
    done.scores = scores[:, begin : begin + count]
    done.candidates = rows.place[0, begin : begin + count] - begin
    order = torch.argsort(done.scores.detach(), dim=1, descending=True, stable=True)[:, :keep]
    done.kept = keep
    best = begin + order.sort(1).values
    text = torch.arange(begin).expand(questions, begin)
    survivors = torch.cat([text, best], 1)  # [Q, begin + keep]: the visual rows end the prefix
    rows.video, rows.place = rows.video[0][survivors], rows.place[0][survivors]
    rows.changed()
    state.branches.append("prune")
