"""Phase two: the language model learns to answer, on 1 to 32 frames.

All questions of a video share one pass over its visual rows: each question attends to the video
and to itself only, at the positions it would have alone, so training equals single-turn use.
"""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framequilt.demo.labels import IGNORE
from framequilt.demo.lm_data import LATE, Plan, VideoBatch, video_batch
from framequilt.demo.merging import compact, frame_cosines, merge_runs, thin
from framequilt.demo.model import DemoConfig, DemoModel, to_images
from framequilt.demo.questions import KINDS
from framequilt.demo.runstate import Batches, Log, StopFlag, load_state, save_atomic
from framequilt.demo.tokenizer import Prompts
from framequilt.demo.world import COLOURS, STILL

AUX_LAYERS = (5, 8)  # layers before the auxiliary heads read the visual rows: places, motion


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


def losses(
    model: DemoModel,
    heads: AuxiliaryHeads,
    prompts: Prompts,
    batch: VideoBatch,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """All losses and statistics of one batch."""
    plan = batch.plan
    visual = visual_rows(model, batch, plan.vision_lr > 0)
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
    flat = F.cross_entropy(
        logits.flatten(0, 2), targets.flatten(), ignore_index=IGNORE, reduction="none"
    ).view(targets.shape)
    asked = torch.from_numpy(batch.kinds) >= 0
    out = {"loss_answer": flat.sum() / asked.sum()}
    if plan.aux > 0:

        def at_rows(labels: Tensor) -> Tensor:
            picked = labels.gather(1, index)
            return torch.where(valid, picked, torch.full_like(picked, IGNORE))

        late = (torch.arange(f * p) // p).clamp_max(LATE - 1).expand(b, f * p)
        extra = heads(
            middle[0][:, h:],
            middle[-1][:, h:],
            at_rows(spread(torch.from_numpy(batch.motion))),
            at_rows(spread(torch.from_numpy(batch.partner))),
            at_rows(late),
            at_rows(spread(torch.from_numpy(batch.origin))),
        )
        weights = {
            "loss_motion": 1.0,
            "loss_partner": 0.4,
            "loss_late": 0.1,
            "loss_origin": 1.0,
        }
        for name, value in extra.items():
            out[name] = value * plan.aux * weights.get(name, 1.0 / plan.aux)
    with torch.no_grad():
        right = (logits.argmax(-1) == targets) | (targets == IGNORE)
        out["right"] = right.all(-1) & asked
        out["merged"] = torch.tensor(float(merged))
        out["rows"] = torch.tensor(float(known.sum() / b))
    return out


class Tally:
    """Running answer accuracy by frame count, merging and kind since the last report."""

    def __init__(self) -> None:
        self.hits: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])

    def add(self, batch: VideoBatch, right: Tensor, merged: bool) -> None:
        """Counts one batch."""
        group = f"{batch.frames.shape[1]}{'m' if merged else ''}"
        for kind, hit in zip(batch.kinds.ravel().tolist(), right.flatten().tolist(), strict=True):
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
        out = losses(self.model, self.heads, self.prompts, batch, self.generator)
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
        tally.add(batch, out.pop("right"), bool(out.pop("merged")))
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
