"""AWQ and SmoothQuant: factors, clips and their application, against brute force and vectors."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
torch = pytest.importorskip("torch")

from oracles.shared import shared

from framequilt.convert.coded import ArrayTensor
from framequilt.convert.spec import Attention, Decoder, Mlp, Norm, Rope, Vision
from framequilt.errors import InvalidArgument
from framequilt.quantize import dequantize, parse_activations, parse_format, quantize_as
from framequilt.quantize.calibration.blocks import Half, Linears, fake_quantize_rows, halves
from framequilt.quantize.calibration.rows import RowStore
from framequilt.quantize.methods import awq, search, smoothquant
from framequilt.quantize.methods.grids import fake_quantize
from framequilt.quantize.methods.rescale import (
    RescaledTensor,
    clip_groups,
    divide_outputs,
    scale_columns,
    scale_half,
)
from framequilt.quantize.methods.search import Budget, Setting, Statistics

HIDDEN, ROWS = 48, 40


def decoder(kv_heads: int = 3) -> Decoder:
    return Decoder(
        hidden=HIDDEN, layers=1, vocab=8, context=64, tied_embedding=True, embedding_scale=1.0,
        norm=Norm("rms", 1e-6), attention=Attention(3, kv_heads, 16, True, False, 0.25),
        rope=Rope(1e4, 16), mlp=Mlp("gated", "silu", 64, False),
    )  # fmt: skip


def tower(activation: str = "gelu") -> Vision:
    return Vision(
        image_size=8, patch=2, channels=3, hidden=HIDDEN, layers=1, patch_bias=True,
        post_norm=False, norm=Norm("layer", 1e-6), attention=Attention(3, 3, 16, True, True, 0.25),
        mlp=Mlp("plain", activation, 64, True),
    )  # fmt: skip


def layer(spec: Decoder | Vision, seed: int = 0) -> dict[str, Any]:
    """Random weights; a norm with a few large channels, as models have them."""
    rng = torch.Generator().manual_seed(seed)
    attention, mlp = spec.attention, spec.mlp
    inner, kv = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    gate = [("mlp.gate", mlp.hidden, HIDDEN)] if mlp.kind == "gated" else []
    shapes = [
        ("attention.q", inner, HIDDEN), ("attention.k", kv, HIDDEN), ("attention.v", kv, HIDDEN),
        ("attention.o", HIDDEN, inner), *gate, ("mlp.up", mlp.hidden, HIDDEN),
        ("mlp.down", HIDDEN, mlp.hidden),
    ]  # fmt: skip
    weights = {}
    for name, out, inputs in shapes:
        weights[f"{name}.weight"] = torch.randn(out, inputs, generator=rng) / inputs**0.5
        weights[f"{name}.bias"] = torch.randn(out, generator=rng) * 0.1
    for name in ("attention_norm", "mlp_norm"):
        weights[f"{name}.weight"] = (torch.randn(HIDDEN, generator=rng) * 1.2).exp()
        if spec.norm.kind == "layer":
            weights[f"{name}.bias"] = torch.randn(HIDDEN, generator=rng) * 0.1
    return weights


def found(half: Half, weights: Any, tmp_path: Path, budget: Budget | None = None) -> Statistics:
    rng = torch.Generator().manual_seed(9)
    store = RowStore([(1, ROWS // 2, HIDDEN)] * 2, tmp_path / "rows")
    for n in range(2):
        store.put(n, torch.randn(1, ROWS // 2, HIDDEN, generator=rng))
    return Statistics(half, weights, store, budget or Budget(10**6, 10**6))


def setting(half: Half, name: str = "w3g16", activations: str = "a16") -> Setting:
    forms = {linear: parse_format(name) for linear in half.linears}
    return Setting(forms, {linear: parse_activations(activations) for linear in half.linears})


# --- rows that count differently -----------------------------------------------------------------

COUNTS = (3.0, 1.0, 0.0, 2.0)  # of the rows of a sample, in turn


@pytest.mark.parametrize("part", [0, 1])
def test_a_row_of_weight_n_counts_as_n_rows(part: int, tmp_path: Path) -> None:
    """Two samples, one with weights; against sums over the rows that are written out n times."""
    spec = decoder()
    half, weights = halves(spec)[part], layer(spec)
    chosen = setting(half, activations="a8")
    count = ROWS // 2
    counts = torch.tensor(COUNTS).repeat(count // len(COUNTS))
    rng = torch.Generator().manual_seed(9)
    store = RowStore(
        [(1, count, HIDDEN)] * 2, tmp_path / "rows", weights=[counts, torch.ones(count)]
    )
    x = [torch.randn(1, count, HIDDEN, generator=rng) for _ in range(2)]
    for n in range(2):
        store.put(n, x[n])
    data = Statistics(half, weights, store, Budget(10**6, 10**6))

    times = [counts.long(), torch.ones(count).long()]
    linears = Linears(weights)
    normed = [half.normed(rows, weights) for rows in x]
    inner = [half.inner(rows, linears) for rows in normed]
    for place, values in enumerate((normed, inner)):
        often = torch.cat(
            [v[0].repeat_interleave(t, 0) for v, t in zip(values, times, strict=True)]
        )
        assert torch.allclose(data.mean[place], often.abs().mean(0), rtol=1e-5)
        most = torch.cat([v[0] for v in values]).abs().amax(0)
        assert torch.equal(data.most[place], most)
    assert data.rows == 2 * count
    assert torch.equal(data.token_weights, torch.cat([counts, torch.ones(count)]))

    factor = data.mean[0] ** 0.4
    scaled = scale_half(weights, half, factor, None)
    changed = dict(scaled)
    for name in half.linears:
        key = f"{name}.weight"
        changed[key] = fake_quantize(scaled[key], chosen.formats[name])
    rounded = Linears(changed, chosen.inputs_of(half.linears))
    error = size = 0.0
    for rows, t in zip(normed, times, strict=True):
        exact = half.branch(rows, linears)[0]
        difference = half.branch(rows / factor, rounded)[0] - exact
        error += float(difference.repeat_interleave(t, 0).double().square().sum())
        size += float(exact.repeat_interleave(t, 0).double().square().sum())
    got = data.branch_error(scaled, chosen, half.linears, factor)
    assert got == pytest.approx(error / size, rel=1e-5)


def test_a_candidate_does_not_see_roundings_of_the_one_before(tmp_path: Path) -> None:
    half, weights = halves(decoder())[1], layer(decoder())
    chosen, key = setting(half), "mlp.up.weight"
    data = found(half, weights, tmp_path / "a")
    first = data.branch_error(weights, chosen, half.linears)
    other = {**weights, key: weights[key] * torch.linspace(0.5, 2, HIDDEN)}
    second = data.branch_error(other, chosen, half.linears)
    assert second != first
    assert second == found(half, weights, tmp_path / "b").branch_error(other, chosen, half.linears)
    assert first == data.branch_error(weights, chosen, half.linears)


def test_roundings_of_a_candidate_go_with_it_and_shared_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, weights = halves(decoder())[1], layer(decoder())
    chosen, data = setting(half), found(half, weights, tmp_path / "a")
    made: list[weakref.ref[Any]] = []

    def recorded(*args: Any) -> Any:
        rounded = fake_quantize(*args)
        made.append(weakref.ref(rounded))
        return rounded

    def alive() -> int:
        return sum(rounded() is not None for rounded in made)

    monkeypatch.setattr(search, "fake_quantize", recorded)
    factor = torch.linspace(0.5, 2, HIDDEN)
    for candidates in range(1, 4):
        scaled = scale_half(weights, half, factor * candidates, None)
        data.branch_error(scaled, chosen, half.linears, factor * candidates)
        # Gate and up anew, and of the first candidate down, which all of them share.
        assert len(made) == 2 * candidates + 1
        assert alive() == 3
        del scaled
        assert alive() == 1


@pytest.mark.parametrize("activations", [None, "a4"])
def test_clips_are_chosen_by_weighted_rows(activations: Any) -> None:
    rng = torch.Generator().manual_seed(3)
    weight = torch.randn(40, 64, generator=rng) ** 3
    x = torch.randn(32, 64, generator=rng) * torch.randn(64, generator=rng).exp()
    x[1::4] *= 30  # of weight 0, and most of the error otherwise
    counts = torch.tensor([1.0, 0.0, 3.0, 2.0]).repeat(8)
    form = parse_format("w3g16")
    act = None if activations is None else parse_activations(activations)
    ours = awq.best_clip(weight, x, form, act, row_weights=counts)
    often = awq.best_clip(weight, x.repeat_interleave(counts.long(), 0), form, act)
    alike = awq.best_clip(weight, x, form, act)
    # Equal but for groups where two bounds are equally good to rounding.
    assert float((ours == often).float().mean()) > 0.98
    assert float((ours == alike).float().mean()) < 0.8


# --- application ------------------------------------------------------------------------------


def test_application_equals_the_reference_exactly() -> None:
    from safetensors.numpy import load_file

    golden = load_file(shared("golden", "quantization", "rescale_fp32.safetensors"))
    t = {name: torch.from_numpy(values.copy()) for name, values in golden.items()}
    assert torch.equal(clip_groups(t["w"], t["clip_max"][..., 0], 32), t["clip_out"])
    s = t["scales"]
    assert torch.equal(divide_outputs(t["ln_w"], s), t["ln_w_scaled"])
    assert torch.equal(divide_outputs(t["ln_b"], s), t["ln_b_scaled"])
    assert torch.equal(scale_columns(t["w"], s), t["fc_w_scaled"])
    assert torch.equal(divide_outputs(t["fc1_w"], s), t["fc1_w_scaled"])
    assert torch.equal(divide_outputs(t["fc1_b"], s), t["fc1_b_scaled"])
    assert torch.equal(scale_columns(t["w"], s), t["fc2_w_scaled"])
    mean = t["x"].abs().reshape(-1, 64).mean(0)
    assert torch.allclose(mean, t["act_scale"], rtol=1e-6, atol=0)


def test_a_linear_with_quantized_inputs_equals_the_reference() -> None:
    """Rows without a sign change are left out: the contract's range includes zero, theirs not."""
    from safetensors.numpy import load_file

    folder = shared("golden", "quantization")
    golden = load_file(folder / "walinear_fp32.safetensors")
    x = torch.from_numpy(load_file(folder / "inputs.safetensors")["activation"])
    mixed = (x.amin(-1) < 0) & (x.amax(-1) > 0)
    assert int(mixed.sum()) >= 5
    weight = {k: v for k, v in golden.items() if "weight" in k}
    bias = {k: v for k, v in golden.items() if "bias" in k}
    w, b = (torch.from_numpy(next(iter(d.values())).copy()) for d in (weight, bias))
    for name, form, act in (
        ("w8a8_g128", "w8g128-f32scale", "a8-asym"), ("w8a8_g32", "w8g32-f32scale", "a8-asym"),
        ("w4a8_g32", "w4g32-f32scale", "a8-asym"), ("w4a4_g128", "w4g128-f32scale", "a4-asym"),
        ("w3a8_g128", "w3g128-f32scale", "a8-asym"), ("w2a8_g32", "w2g32-f32scale", "a8-asym"),
    ):  # fmt: skip
        rounded = fake_quantize(w, parse_format(form), "reference")
        linears = Linears({"l.weight": rounded, "l.bias": b}, {"l": parse_activations(act)})
        expected = torch.from_numpy(golden[f"{name}.y"])
        assert torch.allclose(linears("l", x)[mixed], expected[mixed], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", [decoder(), decoder(1), tower(), tower("relu")])
def test_folded_factors_leave_the_float_model_as_it_was(spec: Any, tmp_path: Path) -> None:
    weights = layer(spec)
    x = torch.randn(2, 12, HIDDEN, generator=torch.Generator().manual_seed(1))
    rng = torch.Generator().manual_seed(2)
    for half in halves(spec):
        last = weights[f"{half.last}.weight"].shape[1]
        norm = torch.randn(HIDDEN, generator=rng).exp()
        fold = torch.randn(last, generator=rng).exp() if half.fold else None
        scaled = scale_half(weights, half, norm, fold)
        double = {k: v.double() for k, v in weights.items()}
        exact = half.forward(x.double(), Linears(double))
        noise = float((half.forward(x, Linears(weights)).double() - exact).abs().max())
        after = float((half.forward(x, Linears(scaled)).double() - exact).abs().max())
        # One more rounding per weight and per input: a small multiple of float32's own error.
        assert after <= 8 * noise
        assert not torch.equal(scaled[f"{half.last}.weight"], weights[f"{half.last}.weight"]) or (
            fold is None
        )
    assert halves(decoder(1))[0].fold is None and halves(tower())[1].fold is None
    with pytest.raises(InvalidArgument, match="can take a factor"):
        scale_half(weights, halves(tower())[1], None, torch.ones(64))


def test_a_rescaled_tensor_is_the_same_in_any_pieces() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((20, 24)).astype(np.float32)
    columns, divide = (np.exp(rng.standard_normal(n)).astype(np.float32) for n in (24, 20))
    most = np.abs(rng.standard_normal((20, 2))).astype(np.float32)
    tensor = RescaledTensor(
        ArrayTensor("w", w), columns=columns, divide=divide, most=most, group=16
    )
    expected = np.clip(
        w * columns / divide[:, None],
        -np.repeat(most, 16, 1)[:, :24],
        np.repeat(most, 16, 1)[:, :24],
    )
    assert np.array_equal(tensor.all(), expected)
    pieces = [tensor.rows(at, min(at + 7, 20)) for at in range(0, 20, 7)]
    assert np.array_equal(np.concatenate(pieces), expected)
    vector = RescaledTensor(ArrayTensor("v", divide.copy()), divide=divide)
    assert np.array_equal(vector.rows(3, 9), np.ones(6, np.float32))


# --- searches -----------------------------------------------------------------------------------


def loss(half: Half, weights: Any, rounded: Any, x: Any, acts: Any = None) -> float:
    """||f(rounded) - f(weights)||^2 / ||f(weights)||^2 over whole samples, written out."""
    error = size = 0.0
    for rows in x:
        exact = half.forward(rows, Linears(weights)) - rows
        ours = half.forward(rows, Linears(rounded, acts)) - rows
        error += float((ours - exact).double().square().sum())
        size += float(exact.double().square().sum())
    return error / size


@pytest.mark.parametrize("activations", ["a16", "a8", "a4-asym"])
@pytest.mark.parametrize(
    "spec, which", [(decoder(), 0), (decoder(1), 0), (decoder(), 1), (tower(), 1)]
)
def test_awq_takes_the_best_ratio_of_the_grid(
    spec: Any, which: int, activations: str, tmp_path: Path
) -> None:
    weights, half = layer(spec), halves(spec)[which]
    data, chosen = found(half, weights, tmp_path), setting(half, activations=activations)
    result = awq.search_half(half, weights, data, chosen)
    rng = torch.Generator().manual_seed(9)
    x = [torch.randn(1, ROWS // 2, HIDDEN, generator=rng) for _ in range(2)]
    normed = torch.cat([half.normed(rows, weights)[0] for rows in x])
    sx = normed.abs().mean(0)
    errors, factors = [], []
    for n in range(20):
        s = (sx ** (n / 20)).clamp_min(1e-4)
        s = s / (s.max() * s.min()) ** 0.5
        changed = dict(weights)
        for suffix in ("weight", "bias"):
            name = f"{half.norm_name}.{suffix}"
            if name in weights:
                changed[name] = weights[name] / s
        for name in half.linears:
            scaled = weights[f"{name}.weight"] * (s if name in half.firsts else 1)
            changed[f"{name}.weight"] = torch.from_numpy(
                dequantize(quantize_as(scaled.numpy(), parse_format("w3g16")))
            )
        errors.append(loss(half, weights, changed, x, chosen.activations))
        factors.append(s)
    # Quantized inputs that lie near a border may round differently: then by a whole step.
    close = {"a16": 1e-4, "a8": 1e-3, "a4-asym": 2e-3}[activations]
    report = result.report["norm"]
    assert report["errors"] == pytest.approx(errors, rel=close)
    best = report["errors"].index(min(report["errors"]))
    assert report["ratio"] == best / 20
    assert torch.allclose(data.mean[0], sx, rtol=1e-5)
    if half.norm_name in result.scales:
        assert torch.allclose(result.scales[half.norm_name], factors[best])
    if half.fold is not None:  # beside the norm's factors
        fold = result.report["fold"]
        errors = []
        for n in range(20):
            s = (data.mean[1] ** (n / 20)).clamp_min(1e-4)
            s = s / (s.max() * s.min()) ** 0.5
            scaled = scale_half(weights, half, factors[best], s)
            errors.append(data.branch_error(scaled, chosen, half.linears, factors[best]))
        assert fold["errors"] == pytest.approx(errors, rel=close)
        assert fold["ratio"] == fold["errors"].index(min(fold["errors"])) / 20
    assert set(result.scales) <= {half.norm_name, *([half.fold] if half.fold else [])}
    # What was kept is what the report says, and never above plain rounding.
    changed = scale_half(
        weights, half, result.scales.get(half.norm_name),
        result.scales.get(half.fold) if half.fold else None,
    )  # fmt: skip
    for name, most in result.clips.items():
        changed[f"{name}.weight"] = clip_groups(changed[f"{name}.weight"], most, 16)
    norm = result.scales.get(half.norm_name)
    error = data.branch_error(changed, chosen, half.linears, norm)
    assert error == result.report["error"]
    assert error <= data.branch_error(weights, chosen, half.linears)


@pytest.mark.parametrize("activations", [None, "a8", "a4"])
@pytest.mark.parametrize("name", ["w3g16", "w2g32-sym", "w3row"])
def test_the_clip_of_every_group_is_the_best_of_the_grid(name: str, activations: Any) -> None:
    rng = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 56, generator=rng) ** 3  # heavy tails: clipping pays
    x = torch.randn(30, 56, generator=rng) * (torch.randn(56, generator=rng)).exp()
    form = parse_format(name)
    act = None if activations is None else parse_activations(activations)
    ours = awq.best_clip(weight, x, form, act)
    size = min(form.group or 56, 56)
    y = x if act is None else fake_quantize_rows(x, act)
    clipped = 0
    for row in range(6):
        for g, at in enumerate(range(0, 56, size)):
            w = weight[row : row + 1, at : at + size]
            errors = []
            for n in range(10):
                most = w.abs().max() * (1 - n / 20)
                bounded = w.clamp(-most, most)
                q = fake_quantize(bounded.contiguous(), form)
                difference = y[:, at : at + size] @ q[0] - x[:, at : at + size] @ w[0]
                errors.append(float(difference.double().square().sum()))
            chosen = round((1 - float(ours[row, g] / w.abs().max())) * 20)
            clipped += chosen > 0
            assert errors[chosen] <= min(errors) * (1 + 1e-4)
    assert clipped > 3


def test_awq_lowers_the_error_and_clips_no_q_and_k(tmp_path: Path) -> None:
    for spec in (decoder(), tower()):
        weights = layer(spec)
        for half in halves(spec):
            data, chosen = found(half, weights, tmp_path), setting(half)
            plain = data.branch_error(weights, chosen, half.linears)
            result = awq.search_half(half, weights, data, chosen)
            assert result.report["error"] < plain
            assert result.clips.keys() <= set(half.linears) - {"attention.q", "attention.k"}
            assert result.clips


def test_smoothquant_is_its_formula(tmp_path: Path) -> None:
    spec = decoder()
    weights, half = layer(spec), halves(spec)[0]
    data, chosen = found(half, weights, tmp_path), setting(half, "w8g16", "a8")
    result = smoothquant.search_half(half, weights, data, chosen, 0.5)
    rng = torch.Generator().manual_seed(9)
    x = torch.cat([torch.randn(1, ROWS // 2, HIDDEN, generator=rng)[0] for _ in range(2)])
    largest = half.normed(x[None], weights)[0].abs().amax(0)
    columns = torch.cat([weights[f"attention.{n}.weight"] for n in "qkv"]).abs().amax(0)
    assert torch.allclose(result.scales["attention_norm"], largest**0.5 / columns**0.5, rtol=1e-5)
    assert set(result.scales) == {"attention_norm"} and not result.clips
    with pytest.raises(InvalidArgument, match="alpha"):
        smoothquant.search_half(half, weights, data, chosen, 1.5)


def test_smoothquant_auto_never_ends_above_plain_rounding(tmp_path: Path) -> None:
    for spec in (decoder(), tower()):
        weights = layer(spec)
        for half in halves(spec):
            data, chosen = found(half, weights, tmp_path), setting(half, "w4g16", "a4")
            result = smoothquant.search_half(half, weights, data, chosen, "auto")
            errors = result.report["norm"]["errors"]
            assert errors[0] == data.branch_error(weights, chosen, half.firsts)
            assert min(errors) <= errors[0]
            alpha = result.report["norm"]["alpha"]
            fixed = None if alpha is None else alpha
            if fixed is not None:
                again = smoothquant.search_half(half, weights, data, chosen, fixed)
                assert again.report["norm"]["errors"] == [min(errors)]


def test_channels_that_were_never_seen_keep_the_factor_one() -> None:
    s = smoothquant.candidate(torch.tensor([0.0, 4.0, 1.0]), torch.tensor([1.0, 1.0, 0.0]), 0.5)
    assert s.tolist() == [1.0, 2.0, 1.0]


def test_only_whole_samples_within_the_budget_are_kept(tmp_path: Path) -> None:
    half = halves(decoder())[1]
    weights = layer(decoder())
    data = found(half, weights, tmp_path, Budget(search_rows=ROWS // 2, clip_rows=6))
    assert len(data.normed) == len(data.reference) == 1 and data.normed[0].shape[1] == ROWS // 2
    assert [len(rows) for rows in data.tokens] == [6, 6]
    assert data.rows == ROWS


def test_only_the_last_outputs_are_divided() -> None:
    """As in a fused q, k and v, of which v alone feeds what comes next."""
    w = torch.arange(1.0, 13.0).view(6, 2)
    assert divide_outputs(w, torch.tensor([2.0, 4.0])).tolist() == [
        [1, 2], [3, 4], [5, 6], [7, 8], [4.5, 5], [2.75, 3],
    ]  # fmt: skip
    assert divide_outputs(w[:, 0], torch.tensor([2.0])).tolist() == [1, 3, 5, 7, 9, 5.5]
    with pytest.raises(InvalidArgument, match="factors"):
        divide_outputs(w, torch.ones(7))
