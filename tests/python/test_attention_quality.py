"""The study of attention over integers measures what it says, and says what it measured.

The towers themselves are checked against onnxruntime by `attention_quality.py --check`.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import attention_quality as study  # noqa: E402

sys.path.remove(str(BENCH))

SHAPE = (1, 2, 40, 16)


def random_heads(seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal(SHAPE)) for _ in range(3)]


def coded(x: Any, axis: int, most: int) -> tuple[Any, Any]:
    scale = np.abs(x).max(axis, keepdims=True) / most
    return np.rint(x / scale).astype(np.int64), scale


def test_the_adopted_scheme_is_what_integers_give() -> None:
    q, k, v = random_heads()
    want = np.zeros(SHAPE)
    for head in range(SHAPE[1]):
        x, y, z = (t[0, head].numpy() for t in (q, k, v))
        (a, a_scale), (b, b_scale) = coded(x, 1, 127), coded(y - y.mean(0), 1, 127)
        values, v_scale = coded(z, 0, 1023)
        scores = (a @ b.T) * a_scale * b_scale.T / math.sqrt(SHAPE[3])
        p = np.rint(np.exp(scores - scores.max(1, keepdims=True)) * 2**13).astype(np.int64)
        want[0, head] = (p @ values) * v_scale / p.sum(1, keepdims=True)
    got = study.attention("b+p1", q, k, v).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scheme", [row.split()[1] for row in study.ROWS])
def test_a_scheme_is_near_exact_attention_and_not_equal(scheme: str) -> None:
    q, k, v = random_heads()
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    error = float((study.attention(scheme, q, k, v) - exact).norm() / exact.norm())
    assert error < 0.02
    assert (error < 1e-14) == (scheme == "S0+p0")


def test_what_all_keys_have_in_common_costs_codes_only_where_it_stays() -> None:
    q, k, v = random_heads()
    exact = study.attention("S0+p0", q, k, v)
    moved = k + 20.0 * torch.ones(SHAPE[3], dtype=k.dtype)
    errors = {
        scheme: [float((study.attention(scheme, q, x, v) - exact).norm()) for x in (k, moved)]
        for scheme in ("S0+p0", "a+p0", "b+p0")
    }
    assert errors["S0+p0"][1] < 1e-11  # a softmax does not see it
    assert errors["b+p0"][1] == pytest.approx(errors["b+p0"][0], rel=1e-6)
    assert errors["a+p0"][1] > 5 * errors["a+p0"][0]


def test_pictures_of_one_scene_are_one_observation() -> None:
    values = [1.0, 2.0, 4.0, 7.0]
    mean, error = study.mean_and_error(values, ["a", "b", "c", "d"])
    assert mean == 3.5
    assert error == pytest.approx(np.std(values, ddof=1) / 2)
    twice = study.mean_and_error(values * 2, ["a", "b", "c", "d"] * 2)
    assert twice == pytest.approx((mean, error))
    assert math.isnan(study.mean_and_error([1.0, 2.0], ["a", "a"])[1])


def test_errors_are_of_every_picture_against_the_float_tower() -> None:
    """The stand-in's rows are off by 10 % over W8A8 linears and by 1 % in an integer scheme."""

    def run(x: Any, attention: Any, w8a8: bool) -> Any:
        q, k, v = random_heads()
        off = not torch.equal(attention(q, k, v), study.attention("S0+p0", q, k, v))
        return x * (1 + 0.1 * w8a8 + 0.01 * off)

    tower: Any = SimpleNamespace(run=run, outputs=lambda rows: (rows, rows[:, 0]))
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((3, 4, 8)))
    exact: list[Any] = []
    for row, want in (("float b+p1", 0.01), ("W8A8 S0+p0", 0.1), ("W8A8 b+p1", 0.11)):
        steps: list[int] = []
        errors = study.measure(tower, x, row, exact, lambda steps=steps: steps.append(1))
        assert errors["hidden"] == pytest.approx([want] * 3)
        assert errors["cos"] == pytest.approx([0.0] * 3, abs=1e-12)
        assert len(steps) == len(exact) == 2  # batches


def test_the_table_has_every_row_and_differences_of_the_same_pictures() -> None:
    def row(*values: float) -> dict[str, list[float]]:
        return {key: list(values) for key in study.MEASURES}

    rows = {"float a+p0": row(0.003, 0.009), "float b+p0": row(0.001, 0.006)}
    text = study.table({"clip": {"clusters": ["x", "y"], "rows": rows}})
    cells = {
        line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines() if line
    }
    assert [cell.strip() for cell in cells["float a+p0 - float b+p0"]] == [
        "+2.50 ± 0.50",
        "+2500 ± 500",
    ]
    labels = [label.split(":")[0] for label in cells]
    assert [label for label in labels if label in study.ROWS] == study.ROWS
    assert cells["float d+p0: Q, K 12 bits per head"] == [" - ", " - "]
