"""The training side's FrameFusion against vectors recorded from the published reference."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from framequilt.demo.fusion import (  # noqa: E402
    BudgetExhausted,
    Params,
    State,
    budget_bound,
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
