"""Rows of all samples between two layers: in memory, or in a mapped file when they are many.

Memory: the rows, or one sample when they lie in a file, which its owner removes. One thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MEMORY_LIMIT = 2 * 2**30  # bytes of rows above which they go to a file


class RowStore:
    """Float32 rows [batch, rows, hidden] of each sample, to be read and overwritten in place.

    `weights` says how much an error of each row counts, [batch * rows] for each sample; without it
    all rows count alike.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        spill: Path,
        limit: int = MEMORY_LIMIT,
        weights: Sequence[Tensor] | None = None,
    ) -> None:
        self._weights = weights
        self._shapes = [tuple(shape) for shape in shapes]
        sizes = [math.prod(shape) for shape in self._shapes]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        total = int(self._starts[-1])
        self.path: Path | None = spill if 4 * total > limit else None
        self._values: NDArray[np.float32] = (
            np.empty(total, np.float32)
            if self.path is None
            else np.memmap(self.path, np.float32, mode="w+", shape=(total,))
        )

    def __len__(self) -> int:
        return len(self._shapes)

    @property
    def tokens(self) -> int:
        """Rows of all samples together."""
        return sum(math.prod(shape[:-1]) for shape in self._shapes)

    def shape(self, index: int) -> tuple[int, ...]:
        """Shape of a sample."""
        return self._shapes[index]

    def weights_of(self, index: int) -> Tensor | None:
        """How much an error of each row of a sample counts, [batch * rows]; None: all alike."""
        return None if self._weights is None else self._weights[index]

    def get(self, index: int) -> Tensor:
        """A copy of a sample's rows."""
        start, stop = self._starts[index], self._starts[index + 1]
        return torch.from_numpy(np.array(self._values[start:stop]).reshape(self._shapes[index]))

    def put(self, index: int, rows: Tensor) -> None:
        """Overwrites a sample's rows."""
        start, stop = self._starts[index], self._starts[index + 1]
        self._values[start:stop] = rows.detach().numpy().ravel()

    def close(self) -> None:
        """Gives the memory back and removes the file."""
        self._values = np.empty(0, np.float32)
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            self.path = None
