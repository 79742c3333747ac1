"""AWQ (Lin et al., arXiv 2306.00978): channels with large inputs are scaled up before rounding, and
ranges are clipped where that lowers the error of the output.

    s = max(mean|X_j|^ratio, 1e-4) for ratio in {0, 1/20, ..., 19/20};  s /= sqrt(max(s) * min(s))
    kept: the s with the least error of the whole half (attention, or MLP) with all its linears
    rounded; then, beside it, the s of the linear whose factor folds into the linear before it
    m = (1 - shrink) * max|w| of a group, shrink in {0, 0.05, ..., 0.45}, but for q and k
    kept: the m with the least ||X (round(clamp(w, -m, m)) - w)||^2 of that row and group

With quantized activations both searches see quantized inputs. What each search finds is kept only
if it lowers the error of the half with all its linears rounded, so that no half ends above plain
rounding on the rows that were searched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framequilt.errors import InvalidArgument
from framequilt.quantize.calibration.blocks import Half, fake_quantize_rows
from framequilt.quantize.formats import ActivationFormat, WeightFormat
from framequilt.quantize.methods.grids import Grid, group_size, in_groups
from framequilt.quantize.methods.rescale import clip_groups, scale_half
from framequilt.quantize.methods.search import HalfResult, Setting, Statistics, Weights
from framequilt.quantize.rtn import Range

REVISION = 2  # of the search: layers that another one has decided stay out of a work folder
RATIO_STEPS = 20
SHRINKS = tuple(n / 20 for n in range(10))
_NOT_CLIPPED = ("attention.q", "attention.k")  # their product is what matters, not each output


def candidate(mean: Tensor, ratio: float) -> Tensor:
    """The factors of a ratio, for mean magnitudes [inputs]."""
    s = mean.pow(ratio).clamp_min(1e-4)
    return s / (s.max() * s.min()).sqrt()


def search_half(
    half: Half, weights: Weights, found: Statistics, setting: Setting, steps: int = RATIO_STEPS
) -> HalfResult:
    """Factors and clips of one half of a layer, with ratios n / steps. Errors: InvalidArgument."""
    if steps < 1:
        raise InvalidArgument(f"a grid of {steps} ratios")
    ratios = [n / steps for n in range(steps)]
    result = HalfResult()

    def best(mean: Tensor, norm: Tensor | None = None) -> Tensor:
        """The best factor of the norm, or, beside the norm's, of the fold."""
        base = weights if norm is None else scale_half(weights, half, norm, None)

        def error(s: Tensor) -> float:
            # A candidate's tensors go before the next one's are made.
            if norm is None:
                return found.branch_error(scale_half(base, half, s, None), setting, half.linears, s)
            scaled = scale_half(base, half, None, s)
            return found.branch_error(scaled, setting, half.linears, norm)

        errors = [error(candidate(mean, ratio)) for ratio in ratios]
        ratio = ratios[errors.index(min(errors))]
        place = "norm" if norm is None else "fold"
        result.report[place] = {"ratio": ratio, "errors": errors}
        return candidate(mean, ratio)

    norm_factor = best(found.mean[0])
    fold_factor = None
    if half.fold is not None:
        fold_factor = best(found.mean[1], norm_factor)
    # One without the other, or none, may be better.
    choices = [(None, None), (norm_factor, None)]
    if fold_factor is not None:
        choices += [(None, fold_factor), (norm_factor, fold_factor)]
    errors = [
        found.branch_error(scale_half(weights, half, *pair), setting, half.linears, pair[0])
        for pair in choices
    ]
    least = min(errors)
    norm, fold = choices[errors.index(least)]
    if norm is not None:
        result.scales[half.norm_name] = norm
    if fold is not None and half.fold is not None:
        result.scales[half.fold] = fold
    scaled = scale_half(weights, half, norm, fold)
    for name in half.linears:
        form = setting.formats[name]
        if name in _NOT_CLIPPED or form.kind != "affine":
            continue
        factor = fold if name == half.last else norm
        x = found.tokens[1 if name == half.last else 0]
        x = x if factor is None else x / factor
        key = f"{name}.weight"
        most = best_clip(
            scaled[key], x, form, setting.activations.get(name), setting.range_,
            found.token_weights,
        )  # fmt: skip
        clipped = {**scaled, key: clip_groups(scaled[key], most, form.group)}
        error = found.branch_error(clipped, setting, half.linears, norm)
        # Errors of groups add up where their inputs go together: the sum decides.
        if error < least:
            least, scaled = error, clipped
            result.clips[name] = most
    result.report["error"] = least
    return result


def best_clip(
    weight: Tensor,
    x: Tensor,
    form: WeightFormat,
    activations: ActivationFormat | None = None,
    range_: Range = "include_zero",
    row_weights: Tensor | None = None,
) -> Tensor:
    """The best bound [out, groups] of every group of a weight [out, inputs], for input rows x,
    which count as much as `row_weights` says.

    With quantized inputs y, the error y q - x w is y d + (y - x) w for d = q - w: its square is
    d y^T y d + 2 d y^T (y - x) w and a part that does not depend on d.
    """
    size = group_size(form, weight.shape[1])
    w = in_groups(weight, size)
    y = x if activations is None else fake_quantize_rows(x, activations)
    if row_weights is not None:  # products of two of them have the weight
        root = row_weights.sqrt()[:, None]
        x, y = x * root, y * root
    grouped = _columns(y, size)  # [groups, rows, size]
    moments = grouped.transpose(1, 2) @ grouped
    linear = None
    if activations is not None:
        cross = grouped.transpose(1, 2) @ _columns(y - x, size)  # y^T (y - x)
        linear = 2 * (w.transpose(0, 1) @ cross.transpose(1, 2))  # [groups, out, size]
    low, high = w.amin(-1), w.amax(-1)
    peak = torch.maximum(-low, high)
    best_most, best_error = peak, torch.full_like(peak, torch.inf)
    for shrink in SHRINKS:
        most = peak * (1 - shrink)
        clipped = clip_groups(weight, most, form.group)
        grid = Grid.between(
            torch.maximum(low, -most), torch.minimum(high, most), form, weight.shape[1], range_
        )
        delta = in_groups(grid.rounded(clipped) - weight, size).transpose(0, 1)
        error = ((delta @ moments) * delta).sum(-1)
        if linear is not None:
            error += (delta * linear).sum(-1)
        better = error.T < best_error
        best_error = torch.where(better, error.T, best_error)
        best_most = torch.where(better, most, best_most)
    return best_most


def _columns(x: Tensor, size: int) -> Tensor:
    """Rows [rows, inputs] -> [groups, rows, size]; a short last group ends in zeros."""
    missing = -x.shape[1] % size
    x = torch.nn.functional.pad(x, (0, missing))
    return x.view(len(x), -1, size).transpose(0, 1)
