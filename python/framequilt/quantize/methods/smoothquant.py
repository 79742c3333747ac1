"""SmoothQuant (Xiao et al., arXiv 2211.10438): outliers of the inputs are moved into the weights.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), at least 1e-5

over all calibration rows and all linears that read them; only norms take a factor. `alpha` is the
paper's 0.5 (0.8 for models with strong outliers), or "auto": for each half of a layer the one of
{0, 0.1, ..., 1}, or no factor at all, with the least error of its output.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from framequilt.errors import InvalidArgument
from framequilt.quantize.calibration.blocks import Half
from framequilt.quantize.methods.rescale import scale_half
from framequilt.quantize.methods.search import HalfResult, Setting, Statistics, Weights

ALPHAS = tuple(n / 10 for n in range(11))
Alpha = float | Literal["auto"]


def candidate(inputs: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """The factors for largest magnitudes of inputs and of weight columns, [inputs] each.

    A channel that was never seen, or that no weight reads, keeps the factor 1.
    """
    s = inputs.pow(alpha) / columns.pow(1 - alpha)
    usable = (inputs > 0) & (columns > 0)
    return torch.where(usable, s.clamp_min(1e-5), torch.ones_like(s))


def largest_columns(half: Half, weights: Weights) -> Tensor:
    """Largest magnitude [inputs] of the columns of all first linears."""
    return torch.stack([weights[f"{name}.weight"].abs().amax(0) for name in half.firsts]).amax(0)


def search_half(
    half: Half, weights: Weights, found: Statistics, setting: Setting, alpha: Alpha = "auto"
) -> HalfResult:
    """Factors of one half of a layer. Errors: InvalidArgument for an alpha outside of 0..1."""
    if alpha != "auto" and not 0 <= alpha <= 1:
        raise InvalidArgument(f"alpha is {alpha}", "a number from 0 to 1, or auto")
    columns = largest_columns(half, weights)
    ones = torch.ones_like(columns)
    choices: list[tuple[float | None, Tensor]] = [
        (a, candidate(found.most[0], columns, a)) for a in (ALPHAS if alpha == "auto" else (alpha,))
    ]
    if alpha == "auto":
        choices.insert(0, (None, ones))
    errors = [
        found.branch_error(scale_half(weights, half, s, None), setting, half.firsts, s)
        for _, s in choices
    ]
    chosen, s = choices[errors.index(min(errors))]
    result = HalfResult(scales={half.norm_name: s})
    result.report["norm"] = {"alpha": chosen, "errors": errors}
    scaled = scale_half(weights, half, s, None)
    result.report["error"] = found.branch_error(scaled, setting, half.linears, s)
    return result
