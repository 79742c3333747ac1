"""GPTQ against its definition: one column at a time with the explicit inverse, in float64."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")

from framequilt.errors import InvalidArgument
from framequilt.quantize import dequantize, pack_quantized, parse_format, quantize_as, unpack_linear
from framequilt.quantize.methods import gptq
from framequilt.quantize.methods.grids import Grid, fake_quantize

F64 = NDArray[np.float64]


def problem(out: int, inputs: int, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and correlated inputs, some channels much larger than others."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((inputs, inputs)) * np.exp(rng.standard_normal(inputs))
    x = rng.standard_normal((rows, inputs)) @ mix
    w = rng.standard_normal((out, inputs)) / inputs**0.5
    return torch.from_numpy(w.astype(np.float32)), torch.from_numpy(x.astype(np.float32))


def brute_force(
    w: F64, h: F64, name: str, order: list[int], static: bool
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Codes by optimal brain quantization in a given order of columns.

    After column j is rounded, the others move by -(w_j - q_j) / [H^-1]_jj * [H^-1]_j, and j leaves
    the inverse. Also returns which codes are certain: no rounding so far in that row was closer to
    its border than float32 arithmetic can tell.
    """
    form = parse_format(name)
    w, inverse = w.copy(), np.linalg.inv(h + 0.01 * np.diag(h).mean() * np.eye(len(h)))
    size = min(form.group or w.shape[1], w.shape[1])
    plain = quantize_as(w.astype(np.float32), form)
    codes = np.zeros(w.shape, np.uint8)
    certain = np.ones(w.shape, bool)
    sure = np.ones(len(w), bool)
    left = list(order)
    for j in order:
        group = j // size
        if not static and j % size == 0:
            own = quantize_as(w[:, j : j + size].astype(np.float32), form)
            plain.scales[:, group], plain.zeros[:, group] = own.scales[:, 0], own.zeros[:, 0]
        scale = plain.scales[:, group].astype(np.float64)
        zero = plain.zeros[:, group].astype(np.float64)
        position = w[:, j] / scale
        sure &= np.abs(position - np.floor(position) - 0.5) > 1e-3
        certain[:, j] = sure
        q = np.clip(np.rint(position) + zero, 0, 2**form.bits - 1)
        codes[:, j] = q
        error = (w[:, j] - (q - zero) * scale) / inverse[j, j]
        left.remove(j)
        w[:, left] -= error[:, None] * inverse[j, left]
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes, certain


@pytest.mark.parametrize("name", ["w4g16", "w3g32-sym", "w2g16", "w4row", "w4g32"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block", [8, 20, 128])
def test_codes_equal_the_definition(name: str, act_order: bool, block: int) -> None:
    w, x = problem(24, 56, 200)  # groups of 16 and 32 leave a shorter last one
    moments = gptq.Moments(56)
    moments.add(x[:120])
    moments.add(x[120:])
    h = moments.matrix()
    exact = 2 / 200 * x.double().numpy().T @ x.double().numpy()
    assert np.allclose(h.numpy(), exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())
    diagonal = h.diagonal().numpy()
    order = list(np.argsort(-diagonal, kind="stable")) if act_order else list(range(56))
    expected, certain = brute_force(
        w.double().numpy(), h.double().numpy(), name, [int(j) for j in order], act_order
    )
    solved = gptq.solve(w, h, parse_format(name), act_order=act_order, block=block)
    assert certain.mean() > 0.8
    assert np.array_equal(solved.quantized.codes[certain], expected[certain])
    assert np.array_equal(dequantize(solved.quantized), solved.values.numpy())


def test_moments_of_weighted_rows_are_those_of_rows_written_out() -> None:
    _, x = problem(4, 24, 60)
    counts = torch.tensor([2.0, 0.0, 3.0]).repeat(20)
    weighted, often = gptq.Moments(24), gptq.Moments(24)
    weighted.add(x[None, :30], counts[:30])
    weighted.add(x[30:], counts[30:])
    often.add(x.repeat_interleave(counts.long(), 0))
    assert torch.allclose(weighted.matrix(), often.matrix(), rtol=1e-5, atol=1e-6)


def test_offsets_are_solved_too() -> None:
    w, x = problem(16, 48, 300)
    moments = gptq.Moments(48)
    moments.add(x)
    form, h = parse_format("w3g16-offset"), moments.matrix()
    for act_order in (False, True):
        solved = gptq.solve(w, h, form, act_order=act_order)
        assert solved.quantized.offsets is not None
        assert np.array_equal(dequantize(solved.quantized), solved.values.numpy())
        plain = gptq.output_error(w, fake_quantize(w, form), h)
        assert gptq.output_error(w, solved.values, h) < plain


def test_groups_that_share_a_step_are_solved_in_act_order() -> None:
    w, x = problem(16, 296, 400)
    moments = gptq.Moments(296)
    moments.add(x)
    form, h = parse_format("w3g32-offset-i8scale"), moments.matrix()
    solved = gptq.solve(w, h, form)
    packed = pack_quantized(solved.quantized, form)
    stored = unpack_linear(form, 16, 296, lambda suffix: packed[suffix])
    assert np.array_equal(stored, solved.values.numpy())
    assert gptq.output_error(w, solved.values, h) < gptq.output_error(w, fake_quantize(w, form), h)
    with pytest.raises(InvalidArgument, match="share a step"):
        gptq.solve(w, h, form, act_order=False)


@pytest.mark.parametrize("name", ["w4g32", "w3g32", "w2g32", "w8g32"])
def test_the_output_error_is_below_plain_rounding(name: str) -> None:
    w, x = problem(32, 96, 600, seed=1)
    moments = gptq.Moments(96)
    moments.add(x)
    h, form = moments.matrix(), parse_format(name)
    for act_order in (False, True):
        solved = gptq.solve(w, h, form, act_order=act_order)
        ours, plain = (x @ (v - w).T for v in (solved.values, fake_quantize(w, form)))
        assert float(ours.square().sum()) < float(plain.square().sum())
        reported = gptq.output_error(w, solved.values, h)
        assert reported == pytest.approx(
            float(ours.square().sum() / (x @ w.T).square().sum()), 1e-3
        )


def test_inputs_that_are_always_zero_get_weights_of_zero() -> None:
    w, x = problem(8, 32, 100)
    x[:, [3, 17]] = 0
    moments = gptq.Moments(32)
    moments.add(x)
    solved = gptq.solve(w, moments.matrix(), parse_format("w4g16"))
    assert solved.dead == 2
    assert not solved.values[:, [3, 17]].any()


def test_too_few_rows_are_solved_with_more_damping_and_said_so() -> None:
    w, x = problem(8, 64, 5)  # rank 5 of 64
    moments = gptq.Moments(64)
    moments.add(x)
    h = moments.matrix()
    solved = gptq.solve(w, h, parse_format("w4g16"))
    assert (solved.damping, solved.double) == (gptq.DAMPING, False)
    # No positive matrix whatever its rounding: float32 fails, float64 fails, damping grows.
    broken = h - 0.05 * h.diagonal().mean() * torch.eye(64)
    _, damping, double = gptq.inverse_factor(broken, gptq.DAMPING)
    assert double and damping == pytest.approx(0.1)
    with pytest.raises(InvalidArgument, match="positive definite"):
        gptq.inverse_factor(torch.full((4, 4), torch.nan), 0.01)
    with pytest.raises(InvalidArgument, match="no calibration rows"):
        gptq.Moments(4).matrix()


FORMATS = [
    "w8row-sym",
    "w4g32",
    "w3g16-sym",
    "w2g64",
    "w5g32-offset",
    "w6g128-f32scale",
    "w3g32-i8scale",
    "w4g16-offset-i8scale",
]


@pytest.mark.parametrize("name", FORMATS)
def test_the_torch_quantizer_is_the_numpy_quantizer(name: str) -> None:
    rng = np.random.default_rng(4)
    w = (rng.standard_normal((40, 296)) * np.exp(rng.standard_normal((40, 1)))).astype(np.float32)
    w[0], w[1], w[2] = 0, np.abs(w[1]) + 1, -np.abs(w[2])
    form = parse_format(name)
    expected = quantize_as(w, form)
    grid = Grid.of(torch.from_numpy(w), form)
    coded = grid.quantized(grid.codes(torch.from_numpy(w)))
    assert np.array_equal(coded.codes, expected.codes)
    assert np.array_equal(coded.scales, expected.scales)
    assert np.array_equal(coded.zeros, expected.zeros)
    assert (coded.offsets is None) == (expected.offsets is None)
    assert np.array_equal(dequantize(coded), dequantize(expected))
    assert np.array_equal(fake_quantize(torch.from_numpy(w), form).numpy(), dequantize(expected))


MEMORY = """
import resource, torch
from framequilt.quantize import parse_format
from framequilt.quantize.methods import gptq
inputs = {inputs}
w, form = torch.randn(8, inputs), parse_format("w4g128")
gptq.solve(w[:, :64].clone(), torch.eye(64), form)  # what torch itself needs
moments = gptq.Moments(inputs)
moments.add(torch.randn(256, inputs))
h = moments.matrix()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
gptq.solve(w, h, form)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / h.nbytes)
"""


@pytest.mark.slow
def test_solving_takes_a_few_matrices() -> None:
    """What bounds a large model: at 18944 inputs a matrix takes 1.4 GB.

    Besides h: the permuted copy, the inverse, its factor, and one temporary of either.
    """
    code = MEMORY.format(inputs=2560)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 4.5
