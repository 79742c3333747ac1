"""The training side's FrameFusion against vectors recorded from the published reference."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from framequilt.demo.fused import Fused, fused_forward  # noqa: E402
from framequilt.demo.fusion import (  # noqa: E402
    TEXT,
    BudgetExhausted,
    Params,
    State,
    budget_bound,
    decode_step,
    last_query_importance,
    prefill,
)
from framequilt.demo.model import DemoConfig, DemoModel  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(os.environ.get("FRAMEQUILT_SHARED", ROOT.parent / "shared")) / "golden/framefusion"


def cases() -> list[dict[str, Any]]:
    """Unit cases of the manifest, none where the vectors are absent."""
    if not (GOLDEN / "manifest.json").exists():
        return []
    found: list[dict[str, Any]] = json.loads((GOLDEN / "manifest.json").read_text())["unit_cases"]
    return found


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"no golden vectors in {GOLDEN}")
@pytest.mark.parametrize("case", cases(), ids=lambda c: c["name"])
def test_every_call_selects_and_averages_like_the_reference(case: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    p = case["params"]
    if p["dtype"] != "float32":
        pytest.skip("the reference ran in bfloat16; this implementation is float32")
    tensors = load_file(str(GOLDEN / f"{case['name']}.safetensors"))
    params = Params(
        p["cost"], p["similarity_lower_bound"], p["ratio_lower_bound"], p["num_layers_in_budget"]
    )
    state = State.begin(params, tensors["c0.patch_type_in"].long())
    for call in case["calls"]:
        i = call["call"]
        if "branch" not in call:
            with pytest.raises(BudgetExhausted):
                state.call(tensors[f"c{i}.hidden_in"])
            return
        importance = None
        if state.wants_importance():
            importance = tensors[f"c{i}.attn_mean"]
            q, k = tensors[f"c{i}.q_last"], tensors[f"c{i}.k"]
            own = last_query_importance(q, k, q.shape[1])
            assert (own - importance).abs().max() < 1e-6
        rows, kept = state.call(tensors[f"c{i}.hidden_in"], importance)
        assert state.branches[-1] == call["branch"]
        assert kept.tolist() == tensors[f"c{i}.kept"].tolist()
        assert (rows - tensors[f"c{i}.hidden_out"]).abs().max() < 1e-5


def test_cost_one_changes_nothing() -> None:
    torch.manual_seed(0)
    lm = DemoModel(DemoConfig(layers=3)).language.eval()
    x, slots = torch.randn(50, 128), torch.tensor([-1] * 5 + list(range(10)) * 4 + [-1] * 5)
    with torch.no_grad():
        plain, full = prefill(lm, x, slots), prefill(lm, x, slots, Params(1.0, 0.5, 0.1, 3))
    assert torch.equal(plain.logits, full.logits)


def test_the_mean_share_of_visual_rows_meets_the_budget() -> None:
    torch.manual_seed(1)
    lm = DemoModel(DemoConfig()).language.eval()
    frame = torch.randn(1, 20, 128)
    rows = (frame + 0.4 * torch.randn(16, 20, 128)).flatten(0, 1)
    x = torch.cat([torch.randn(6, 128), rows, torch.randn(9, 128)])
    slots = torch.tensor([-1] * 6 + list(range(20)) * 16 + [-1] * 9)
    with torch.no_grad():
        state = prefill(lm, x, slots, Params(0.4, 0.88, 0.1, 12)).state
    assert state is not None and "prune" in state.branches
    shares = [(n - 15) / 320 for n in state.lengths[:12]]
    assert abs(sum(shares) / 12 - 0.4) <= 0.5 / 320 + 1e-9


def test_budget_of_nothing_merged_is_the_whole_cost() -> None:
    assert budget_bound([], 0.3, 28) == pytest.approx(0.7)
    assert budget_bound([0.0], 0.3, 10) == pytest.approx(1 - 2 / 9)


class Questions:
    """A random model and video, three questions of different length with their answers."""

    frames, per_frame, ends, answers = 12, 20, (6, 8, 4), (2, 1, 3)

    def __init__(self, layers: int = 5) -> None:
        torch.manual_seed(2)
        self.config = DemoConfig(layers=layers)
        self.lm = DemoModel(self.config).language.eval()
        still = torch.randn(1, self.per_frame, self.config.width)
        noise = torch.linspace(0.05, 1.2, self.per_frame)[None, :, None]  # some slots move more
        change = torch.randn(self.frames, self.per_frame, self.config.width)
        self.visual = still + noise * change
        self.head = torch.arange(5)
        self.tokens = torch.randint(0, 500, (3, 12))

    def together(self, params: Params, visual: torch.Tensor | None = None) -> Fused:
        rows = self.visual if visual is None else visual
        ends = torch.tensor(self.ends)
        return fused_forward(self.lm, self.head, rows, self.tokens, ends, params, (2, 4))

    def alone(self, question: int, params: Params) -> tuple[list[torch.Tensor], State]:
        """Logits of the question's last prompt token and of every answer token after it."""
        end = self.ends[question] + 1
        embed = self.lm.embed_tokens.weight
        asked = embed[self.tokens[question, :end]]
        x = torch.cat([embed[self.head], self.visual.flatten(0, 1), asked])
        slots = torch.full((x.shape[0],), TEXT)
        slots[5 : 5 + self.frames * self.per_frame] = torch.arange(self.per_frame).repeat(12)
        done = prefill(self.lm, x, slots, params)
        logits = [done.logits]
        for i in range(self.answers[question]):
            logits.append(decode_step(self.lm, done, int(self.tokens[question, end + i])))
        assert done.state is not None
        return logits, done.state


@pytest.mark.parametrize(
    ("cost", "threshold", "branches"),
    [
        (0.3, 0.6, "merge_continue+merge_continue+merge_continue+merge_and_stop+prune"),
        (0.3, 0.99, "merge_and_stop+prune"),
        (0.6, 0.3, "budget_topk"),
        (1.0, 0.6, "budget_topk"),
    ],
)
def test_training_reduces_every_question_as_inference_does(
    cost: float, threshold: float, branches: str
) -> None:
    sample = Questions()
    params = Params(cost, threshold, 0.1, 5)
    with torch.no_grad():
        done = sample.together(params)
        assert "+".join(done.state.branches) == branches
        for j, end in enumerate(sample.ends):
            wanted, state = sample.alone(j, params)
            assert [b for b in state.branches if b != "noop"] == done.state.branches
            assert [n - end - 1 for n in state.lengths] == done.state.lengths
            for i, logits in enumerate(wanted):
                # Logits reach about 0.1 and sum 128 products in another order: 1e-5 is 100 eps.
                assert (logits - done.logits[j, end + i]).abs().max() < 1e-5


def test_the_rows_of_a_question_are_named_by_their_place_in_the_video() -> None:
    sample = Questions()
    with torch.no_grad():
        done = sample.together(Params(0.3, 0.6, 0.1, 5))
    assert done.scores is not None and done.candidates is not None
    keep = done.index[-1].shape[1]
    assert keep == done.kept
    for j in range(3):
        chosen = done.candidates[done.scores[j].topk(keep).indices.sort().values]
        assert chosen.tolist() == done.index[-1][j].tolist()
    assert done.middle[-1].shape == (3, keep, sample.config.width)


def test_gradients_reach_the_rows_that_survive_and_those_averaged_into_them() -> None:
    sample = Questions()
    visual = sample.visual.clone().requires_grad_()
    done = sample.together(Params(0.3, 0.6, 0.1, 5), visual)
    done.logits.sum().backward()
    assert visual.grad is not None
    touched = visual.grad.flatten(0, 1).norm(dim=1) > 0
    alive = torch.zeros(240, dtype=torch.bool)
    alive[done.index[-1].flatten()] = True
    assert bool((touched >= alive).all())
    assert int(touched.sum()) > int(alive.sum())


def test_answers_have_no_say_in_what_is_pruned() -> None:
    sample = Questions()
    with torch.no_grad():
        before = sample.together(Params(0.3, 0.6, 0.1, 5))
        for j, end in enumerate(sample.ends):
            sample.tokens[j, end + 1 :] += 7
        after = sample.together(Params(0.3, 0.6, 0.1, 5))
    assert before.scores is not None and after.scores is not None
    assert torch.equal(before.scores, after.scores)
    for j, end in enumerate(sample.ends):
        assert torch.equal(before.logits[j, : end + 1], after.logits[j, : end + 1])


def test_an_overspent_budget_ends_the_reduction_in_training() -> None:
    sample = Questions(layers=2)
    with torch.no_grad():
        done = sample.together(Params(0.4, 0.9, 0.1, 2))
        with pytest.raises(BudgetExhausted):
            sample.alone(0, Params(0.4, 0.9, 0.1, 2))
    assert done.state.finish_prune and done.kept == 0
    assert done.logits.shape == (3, 12, sample.config.vocab)
