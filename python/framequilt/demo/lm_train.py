"""Phase two: the language model learns to answer, on 1 to 32 frames.

All questions of a video share one pass over its visual rows: each question attends to the video
and to itself only, at the positions it would have alone, so training equals single-turn use.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framequilt.demo.fused import fused_forward
from framequilt.demo.fusion import Params
from framequilt.demo.labels import IGNORE
from framequilt.demo.lm_data import LATE, Plan, VideoBatch, video_batch
from framequilt.demo.merging import compact, frame_cosines, merge_runs, thin
from framequilt.demo.model import DemoConfig, DemoModel, to_images
from framequilt.demo.questions import KINDS
from framequilt.demo.runstate import Batches, Log, StopFlag, load_state, save_atomic
from framequilt.demo.tokenizer import Prompts
from framequilt.demo.world import COLOURS, STILL

AUX_LAYERS = (5, 8)  # layers before the auxiliary heads read the visual rows: places, motion
AUX_WEIGHTS = {"loss_motion": 1.0, "loss_partner": 0.4, "loss_late": 0.1, "loss_origin": 1.0}
COSTS = (0.25, 0.42)  # of FrameFusion in training, drawn evenly
RATIO_LOWER_BOUND = 0.1
FUSED_FRAMES = 8  # from this many frames on a batch may go through FrameFusion
LONGEST = 32  # frames of the videos whose median cosines make the threshold
LEAST = 0.25  # importance times rows kept: where things should be above and backgrounds below
MEDIAN_RATE = 0.03  # of the running mean, per batch


class AuxiliaryHeads(nn.Module):
    """Readers of visual rows in mid-LM: origin, touched partner, frame index; motion later on."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.splits = [STILL + 1, len(COLOURS), LATE]
        self.places = nn.Linear(config.width, config.cells**2)
        self.read = nn.Linear(config.width, sum(self.splits))

    def forward(
        self,
        early: Tensor,
        later: Tensor,
        motion: Tensor,
        partner: Tensor,
        late: Tensor,
        origin: Tensor,
    ) -> dict[str, Tensor]:
        """Rows [b, n, width] at two depths, labels [b, n] -> losses and hit rates."""
        x = F.rms_norm(early, (early.shape[-1],))
        y = F.rms_norm(later, (later.shape[-1],))
        out: dict[str, Tensor] = {}
        moves = self.read(y).split(self.splits, -1)[0]
        _, touches, frames = self.read(x).split(self.splits, -1)
        for name, want, logits in (
            ("motion", motion, moves),
            ("partner", partner, touches),
            ("late", late, frames),
            ("origin", origin, self.places(x)),
        ):
            known = want != IGNORE
            if known.any():
                picked, wanted = logits[known], want[known]
                out["loss_" + name] = F.cross_entropy(picked, wanted)
                out["hit_" + name] = (picked.argmax(-1) == wanted).float().mean()
        return out


def question_mask(tokens: Tensor, valid: Tensor) -> Tensor:
    """[b, Q, T] tokens, [b, n] valid prefix rows -> bool [b, 1, Q * T, n + Q * T]."""
    b, q, t = tokens.shape
    own = torch.ones(t, t, dtype=torch.bool).tril()
    block = torch.block_diag(*[own] * q) if q > 1 else own
    block = block.to(torch.bool).expand(b, 1, q * t, q * t)
    prefix = valid[:, None, None, :].expand(b, 1, q * t, valid.shape[1])
    return torch.cat([prefix, block], -1)


def shared_forward(
    model: DemoModel,
    prefix: Tensor,
    positions: Tensor,
    valid: Tensor,
    tokens: Tensor,
    start: int,
    aux_layers: tuple[int, ...] = AUX_LAYERS,
) -> tuple[Tensor, list[Tensor]]:
    """Logits of all questions and the prefix rows after each of `aux_layers` layers.

    prefix [b, n, width] with padding at the end, positions [b, n], valid [b, n], tokens
    [b, Q, T], `start` the position of the first question token -> [b, Q, T, vocab] and
    [b, n, width] each.
    """
    lm = model.language
    b, q, t = tokens.shape
    n = prefix.shape[1]
    x = torch.cat([prefix, lm.embed_tokens(tokens.view(b, q * t))], 1)
    own = (start + torch.arange(t)).repeat(q).expand(b, q * t)
    cos, sin = lm.rope(torch.cat([positions, own], 1))
    mask = question_mask(tokens, valid)
    middle: list[Tensor] = []
    aux_layers = tuple(min(a, len(lm.layers) - 1) for a in aux_layers)
    for index, layer in enumerate(lm.layers):
        if index in aux_layers:
            middle.append(x[:, :n])
        query, key, value = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
        seen = F.scaled_dot_product_attention(
            query[:, :, :n], key[:, :, :n], value[:, :, :n], is_causal=True
        )
        asked = F.scaled_dot_product_attention(query[:, :, n:], key, value, attn_mask=mask)
        x = x + layer.self_attn.merge(torch.cat([seen, asked], 2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits = lm.lm_head(lm.norm(x[:, n:]))
    return logits.view(b, q, t, -1), middle


def visual_rows(model: DemoModel, batch: VideoBatch, train_vision: bool) -> Tensor:
    """Visual embeddings of a batch, [b, F, P, width]."""
    b, f = batch.frames.shape[:2]
    images = to_images(torch.from_numpy(batch.frames).flatten(0, 1))
    vision = model.vision
    grad = torch.is_grad_enabled()
    with torch.set_grad_enabled(grad and train_vision and batch.plan.train_tower):
        features = vision.tower(images)
    with torch.set_grad_enabled(grad and train_vision):
        cells = vision.pool(vision.projector(features))
    return vision.add_newlines(cells).view(b, f, model.config.frame_tokens, -1)


def spread(labels: Tensor) -> Tensor:
    """[b, F, C, C] cell labels -> [b, F * P] with IGNORE at newlines."""
    return F.pad(labels, (0, 1), value=IGNORE).flatten(1)


def auxiliary_losses(
    heads: AuxiliaryHeads, batch: VideoBatch, early: Tensor, later: Tensor, index: Tensor
) -> dict[str, Tensor]:
    """Weighted losses and hit rates of the auxiliary heads.

    early, later [b, n, width] visual rows at two depths, index [b, n] which row of its video each
    one is, negative for padding.
    """
    places = batch.motion.shape[-1] * (batch.motion.shape[-1] + 1)
    valid = index >= 0
    picked = index.clamp_min(0)

    def at_rows(labels: npt.NDArray[np.int64]) -> Tensor:
        found = spread(torch.from_numpy(labels)).gather(1, picked)
        return torch.where(valid, found, torch.full_like(found, IGNORE))

    late = (picked // places).clamp_max(LATE - 1)
    late = torch.where(valid, late, torch.full_like(late, IGNORE))
    extra = heads(
        early, later, at_rows(batch.motion), at_rows(batch.partner), late, at_rows(batch.origin)
    )
    aux = batch.plan.aux
    return {k: v * aux * AUX_WEIGHTS[k] if k in AUX_WEIGHTS else v for k, v in extra.items()}


def answer_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of the answers, and which are right: [..., T, vocab], [..., T]."""
    known = targets != IGNORE
    loss = F.cross_entropy(logits[known], targets[known], reduction="sum")
    with torch.no_grad():
        right = ((logits.argmax(-1) == targets) | ~known).all(-1) & known.any(-1)
    return loss, right


def losses(
    model: DemoModel,
    heads: AuxiliaryHeads,
    prompts: Prompts,
    batch: VideoBatch,
    generator: torch.Generator,
    threshold: float | None = None,
) -> dict[str, Tensor]:
    """All losses and statistics of one batch; `threshold` is FrameFusion's by the paper's rule."""
    plan = batch.plan
    visual = visual_rows(model, batch, plan.vision_lr > 0)
    out: dict[str, Tensor] = {}
    if visual.shape[1] > 1:
        out["median"] = frame_cosines(visual.detach()).flatten(1).median(1).values.mean()
    if (
        threshold is not None
        and visual.shape[1] >= FUSED_FRAMES
        and float(torch.rand((), generator=generator)) < plan.fused
    ):
        return out | fused_losses(model, heads, prompts, batch, visual, threshold, generator)
    return out | plain_losses(model, heads, prompts, batch, visual, generator)


def fused_losses(
    model: DemoModel,
    heads: AuxiliaryHeads,
    prompts: Prompts,
    batch: VideoBatch,
    visual: Tensor,
    threshold: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """`losses` under FrameFusion with a cost and a threshold drawn for every video."""
    plan, layers = batch.plan, len(model.language.layers)
    ask = tuple(min(a, layers - 1) for a in AUX_LAYERS)
    head = torch.tensor(prompts.prefix)
    tokens = torch.from_numpy(batch.tokens)[:, : plan.fused_questions]
    targets = torch.from_numpy(batch.targets)[:, : plan.fused_questions]
    asked = torch.from_numpy(batch.kinds)[:, : plan.fused_questions] >= 0
    things = F.pad(torch.from_numpy(batch.thing), (0, 1)).flatten(1).float()
    right = torch.zeros_like(asked)
    answers, ranks, lengths = [], [], []
    early, later, index = [], [], []
    for k in range(visual.shape[0]):
        cost, looser = torch.rand(2, generator=generator).tolist()
        params = Params(
            COSTS[0] + (COSTS[1] - COSTS[0]) * cost,
            1.0 - (1.0 - threshold) * math.exp(looser - 0.5),
            RATIO_LOWER_BOUND,
            layers,
        )
        own, wanted = tokens[k, asked[k]], targets[k, asked[k]]
        ends = (wanted != IGNORE).int().argmax(1)
        done = fused_forward(model.language, head, visual[k], own, ends, params, ask)
        loss, hits = answer_losses(done.logits, wanted)
        answers.append(loss)
        right[k, asked[k]] = hits
        lengths.append(sum(done.state.lengths[:-1]) / layers)
        if done.scores is not None and done.candidates is not None and done.kept > 0:
            above = done.scores - math.log(LEAST / done.kept)
            want = things[k, done.candidates].expand_as(above)
            ranks.append(F.binary_cross_entropy_with_logits(above, want))
        if plan.aux > 0:
            early.append(done.middle[0].flatten(0, 1))
            later.append(done.middle[-1].flatten(0, 1))
            same = done.index[0].shape == done.index[-1].shape  # else merging went on in between
            own_index = done.index[-1].flatten()
            index.append(own_index if same else torch.full_like(own_index, -1))
    out = {"loss_answer_fused": torch.stack(answers).sum() / asked.sum()}
    if ranks and plan.rank > 0:
        out["loss_rank"] = plan.rank * torch.stack(ranks).mean()
    if plan.aux > 0:
        pad = nn.utils.rnn.pad_sequence
        out |= auxiliary_losses(
            heads,
            batch,
            pad(early, batch_first=True),
            pad(later, batch_first=True),
            pad(index, batch_first=True, padding_value=-1),
        )
    out["right"] = F.pad(right, (0, batch.kinds.shape[1] - right.shape[1]))
    out["mode"] = torch.tensor(2)
    out["rows_fused"] = torch.tensor(sum(lengths) / len(lengths))
    return out


def plain_losses(
    model: DemoModel,
    heads: AuxiliaryHeads,
    prompts: Prompts,
    batch: VideoBatch,
    visual: Tensor,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """`losses` without reduction, or with merging and random thinning before the first layer."""
    plan = batch.plan
    b, f, p, d = visual.shape
    merged = f > 1 and float(torch.rand((), generator=generator)) < plan.merge
    if merged:
        cosines = frame_cosines(visual.detach()).flatten()
        share = 0.3 + 0.45 * float(torch.rand((), generator=generator))
        threshold = float(cosines.kthvalue(max(1, int(cosines.numel() * share))).values)
        visual, keep = merge_runs(visual, threshold)
        if float(torch.rand((), generator=generator)) < plan.drop:
            kept = 0.45 + 0.5 * float(torch.rand((), generator=generator))
            keep = thin(keep, kept, generator)
        rows, index, valid = compact(visual.view(b, f * p, d), keep.view(b, f * p))
    else:
        rows = visual.view(b, f * p, d)
        index = torch.arange(f * p).expand(b, f * p)
        valid = torch.ones(b, f * p, dtype=torch.bool)
    head = torch.tensor(prompts.prefix)
    h = head.numel()
    prefix = torch.cat([model.language.embed_tokens(head).expand(b, h, d), rows], 1)
    positions = torch.cat([torch.arange(h).expand(b, h), h + index], 1)
    known = torch.cat([torch.ones(b, h, dtype=torch.bool), valid], 1)
    tokens, targets = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
    logits, middle = shared_forward(model, prefix, positions, known, tokens, h + f * p)
    loss, right = answer_losses(logits, targets)
    out = {"loss_answer": loss / (torch.from_numpy(batch.kinds) >= 0).sum(), "right": right}
    if plan.aux > 0:
        own = torch.where(valid, index, torch.full_like(index, -1))
        out |= auxiliary_losses(heads, batch, middle[0][:, h:], middle[-1][:, h:], own)
    out["mode"] = torch.tensor(int(merged))
    out["rows"] = torch.tensor(float(known.sum() / b))
    return out


class Tally:
    """Running answer accuracy by frame count, reduction and kind since the last report."""

    def __init__(self) -> None:
        self.hits: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])

    def add(self, batch: VideoBatch, right: Tensor, mode: int) -> None:
        """Counts one batch; mode 0 plain, 1 merged and thinned, 2 under FrameFusion."""
        group = f"{batch.frames.shape[1]}{('', 'm', 'f')[mode]}"
        asked = batch.plan.fused_questions if mode == 2 else batch.kinds.shape[1]
        kinds, hits = batch.kinds[:, :asked].ravel().tolist(), right[:, :asked].flatten().tolist()
        for kind, hit in zip(kinds, hits, strict=True):
            if kind >= 0:
                cell = self.hits[group, KINDS[kind]]
                cell[0] += int(hit)
                cell[1] += 1

    def report(self) -> dict[str, dict[str, int]]:
        """Percent right by group and kind, and starts again."""
        out: dict[str, dict[str, int]] = defaultdict(dict)
        for (group, kind), (hit, seen) in sorted(self.hits.items()):
            out[group][kind] = round(100 * hit / seen)
        self.hits.clear()
        return dict(out)


class LmRun:
    """State of a language model run in a folder; resumes from RUN/lm.pt."""

    def __init__(self, run: Path, config: DemoConfig, scale: float = 1.0) -> None:
        torch.manual_seed(1)
        self.run, self.config, self.scale = run, config, scale
        self.prompts = Prompts.of_run(run)
        self.model, self.heads = DemoModel(config), AuxiliaryHeads(config)
        self.generator = torch.Generator().manual_seed(2)
        vision = [*self.model.vision.tower.parameters(), *self.model.vision.projector.parameters()]
        language = [*self.model.language.parameters(), *self.heads.parameters()]
        language.append(self.model.vision.image_newline)
        decay = [w for w in language if w.dim() >= 2]
        plain = [w for w in language if w.dim() < 2]
        groups = [
            {"params": decay, "weight_decay": 0.05},
            {"params": plain, "weight_decay": 0.0},
            {"params": vision, "weight_decay": 0.02},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))
        self.language, self.vision = language, vision
        self.step, self.seconds, self.tower_time = 0, 0.0, 0.0
        self.threshold: float | None = None  # running mean of the videos' median cosines
        state = load_state(run / "lm.pt")
        if state is None:
            tower = load_state(run / "tower.pt")
            if tower is not None:
                self.model.vision.load_state_dict(tower["vision"])
        else:
            self.model.load_state_dict(state["model"])
            fresh = self.heads.load_state_dict(state["heads"], strict=False).missing_keys
            if not fresh:
                self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.threshold = state.get("threshold")

    def save(self, name: str = "lm.pt") -> None:
        """Writes the whole state atomically."""
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "config": self.config.to_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "threshold": self.threshold,
        }
        save_atomic(self.run / name, state)

    def follow_tower(self) -> None:
        """Takes over the newest tower while its own training still goes on."""
        path = self.run / "tower.pt"
        if not path.exists() or path.stat().st_mtime == self.tower_time:
            return
        self.tower_time = path.stat().st_mtime
        state = load_state(path)
        if state is not None:
            weights = {k: v for k, v in state["vision"].items() if k != "image_newline"}
            self.model.vision.load_state_dict(weights, strict=False)

    def make(self, index: int) -> VideoBatch:
        """Batch `index`, under the plan of this moment."""
        plan = Plan.read(self.run)
        return video_batch(self.config, self.prompts, plan, index, self.scale)

    def update(self, batch: VideoBatch) -> dict[str, Tensor]:
        """One optimizer step."""
        warm = min(1.0, (self.step + 1) / 80)
        first, second, third = self.optimizer.param_groups
        first["lr"] = second["lr"] = batch.plan.lr * warm
        third["lr"] = batch.plan.vision_lr * warm
        out = losses(self.model, self.heads, self.prompts, batch, self.generator, self.threshold)
        if batch.frames.shape[1] == LONGEST:
            median = float(out["median"])
            old = median if self.threshold is None else self.threshold
            self.threshold = old + MEDIAN_RATE * (median - old)
        loss = torch.stack([v for k, v in out.items() if k.startswith("loss")]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*self.language, *self.vision], 1.0)
        self.optimizer.step()
        self.step += 1
        return out


def train_lm(run: Path, config: DemoConfig, steps: int, report: int = 100) -> None:
    """Trains until `steps` or SIGTERM; checkpoints every three minutes."""
    work = LmRun(run, config)
    stop, log, tally = StopFlag(), Log(run / "lm.jsonl"), Tally()
    batches = Batches(work.make, work.step)
    saved = last = time.monotonic()
    sums: dict[str, list[float]] = defaultdict(list)
    for _, batch in batches:
        if work.step >= steps or stop.stopped:
            break
        began = time.monotonic()
        out = work.update(batch)
        work.seconds += time.monotonic() - began
        tally.add(batch, out.pop("right"), int(out.pop("mode")))
        for name, value in out.items():
            sums[name].append(value.item())
        if work.step % 50 == 0 and batch.plan.follow_tower:
            work.follow_tower()
        if work.step % report == 0:
            now = time.monotonic()
            row: dict[str, object] = {"step": work.step, "per_s": report / (now - last)}
            row.update({k: sum(v) / len(v) for k, v in sums.items()})
            row["right"] = tally.report()
            log.write(row)
            sums.clear()
            last = now
        if time.monotonic() - saved > 180:
            work.save()
            saved = time.monotonic()
    batches.close()
    work.save()
