"""Token reduction inside the model: the parameters of FrameFusion (arXiv 2501.01986).

Merges visual tokens that are alike over time in the first layers, then prunes the ones that the
question pays least attention to, until the budget `cost` is met.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from framequilt.errors import InvalidArgument

DEFAULT_SIMILARITY_LOWER_BOUND = 0.6


@dataclass(frozen=True)
class FrameFusion:
    """Parameters of FrameFusion.

    Attributes:
        cost: budget, the average over layers of the share of visual tokens present, (0, 1];
            0.3 drops 70 % of the visual work, 1 changes nothing.
        similarity_lower_bound: cosine at or above which a pair merges, [-1, 1]. None takes the
            model's own default (`defaults.similarity_lower_bound` of its config), else 0.6.
        ratio_lower_bound: merging ends after the first call whose merged share is below, [0, 1].
        budget_layers: depth in the budget formula; 0 is the model's real depth. The published
            code always uses 28.
        importance_queries: last prompt tokens whose attention ranks the visual tokens, >= 1.
        prune_text: text between visual rows may be pruned too, as in the published code.
        merge_separators: newline rows between frames take part, as in the published code.
    """

    cost: float = 0.3
    similarity_lower_bound: float | None = None
    ratio_lower_bound: float = 0.1
    budget_layers: int = 0
    importance_queries: int = 1
    prune_text: bool = True
    merge_separators: bool = True

    def __post_init__(self) -> None:
        def number(name: str, low: float, high: float, open_low: bool = False) -> None:
            value = getattr(self, name)
            good = isinstance(value, (int, float)) and not isinstance(value, bool)
            good = good and math.isfinite(value) and low <= value <= high
            if not good or (open_low and value == low):
                span = f"{'(' if open_low else '['}{low:g}, {high:g}]"
                raise InvalidArgument(f"{name} must be in {span}, got {value!r}")

        def integer(name: str, low: int) -> None:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**31:
                raise InvalidArgument(f"{name} must be an integer >= {low}, got {value!r}")

        number("cost", 0.0, 1.0, open_low=True)
        if self.similarity_lower_bound is not None:
            number("similarity_lower_bound", -1.0, 1.0)
        number("ratio_lower_bound", 0.0, 1.0)
        integer("budget_layers", 0)
        integer("importance_queries", 1)
        for name in ("prune_text", "merge_separators"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgument(f"{name} must be True or False, got {getattr(self, name)!r}")

    @classmethod
    def of(cls, value: FrameFusion | Mapping[str, Any] | float | None) -> FrameFusion | None:
        """A `FrameFusion`, a mapping of its fields, a cost, or None for no reduction."""
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return cls(cost=float(value))
        if not isinstance(value, Mapping):
            raise InvalidArgument(
                f"reduction is None, a cost, a FrameFusion or a dict of its fields, got {value!r}"
            )
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(value) - known - {"stage"})
        if unknown:
            raise InvalidArgument(
                f"unknown FrameFusion fields: {', '.join(unknown)}",
                hint=f"known: {', '.join(sorted(known))}",
            )
        if value.get("stage", "framefusion") != "framefusion":
            raise InvalidArgument(
                f"unknown reduction stage {value['stage']!r}", hint="framefusion is the only one"
            )
        return cls(**{k: v for k, v in value.items() if k != "stage"})

    def to_native(self, model_default: float | None = None) -> dict[str, Any]:
        """The dictionary that the compiled engine takes; `model_default` fills the threshold."""
        record = {"stage": "framefusion", **{f.name: getattr(self, f.name) for f in fields(self)}}
        if self.similarity_lower_bound is None:
            record["similarity_lower_bound"] = (
                DEFAULT_SIMILARITY_LOWER_BOUND if model_default is None else model_default
            )
        return record
