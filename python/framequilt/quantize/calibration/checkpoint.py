"""A checkpoint as calibration sees it: the converter's description, and one layer at a time.

Memory: nothing is kept; each call reads what it returns. Any thread.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from framequilt.convert import families
from framequilt.convert.families import Description
from framequilt.convert.rules import assign
from framequilt.convert.sources import Source, SourceTensor, open_source
from framequilt.convert.spec import Model, Slot, check_limits, slots
from framequilt.convert.tokens import Tokens, read_tokens
from framequilt.errors import CorruptModel

_PIECE_ROWS = 4096  # of an embedding, dequantized at a time


@dataclass(frozen=True)
class Checkpoint:
    """Description and source tensors of a checkpoint; `found` None means zeros."""

    source: Source
    description: Description
    wanted: Mapping[str, Slot]
    found: Mapping[str, SourceTensor | None]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Errors: those of the converter (NotFound, CorruptModel, Unsupported)."""
        source = open_source(Path(path))
        description = families.find(source).describe(source)
        check_limits(description.model)
        wanted = slots(description.model)
        found, _ = assign(
            source.tensors,
            description.rules,
            description.left_out,
            wanted,
            description.zero_filled,
        )
        return cls(source, description, wanted, found)

    @property
    def model(self) -> Model:
        """The blocks."""
        return self.description.model

    def tokens(self) -> Tokens:
        """Tokenizer file and special tokens. Errors: those of `read_tokens`."""
        vocab = self.model.decoder.vocab
        return read_tokens(self.source, self.description.text_config, vocab)

    def array(self, target: str) -> NDArray[np.float32]:
        """A whole slot in float32, linears as [out, in]. Errors: CorruptModel."""
        shape, tensor = self.wanted[target].shape, self.found[target]
        if tensor is None:
            return np.zeros(shape, np.float32)
        values = np.ascontiguousarray(tensor.all().reshape(shape), np.float32)
        if not np.isfinite(values).all():
            raise CorruptModel(f"{target}: a value is not a finite number")
        return values

    def tensor(self, target: str) -> Tensor:
        """As `array`, for torch; the memory is its own."""
        values = self.array(target)
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    def layer(self, part: str, number: int) -> dict[str, Tensor]:
        """Every tensor of one layer by its name inside of the layer: "attention.q.weight"."""
        at = f"{part}.layers.{number}."
        names = [name for name in self.wanted if name.startswith(at)]
        return {name.removeprefix(at): self.tensor(name) for name in names}

    def lookup(self, ids: NDArray[np.int64]) -> Tensor:
        """Rows [len(ids), hidden] of the embedding. Errors: CorruptModel."""
        target = "decoder.embedding.weight"
        tensor, (vocab, hidden) = self.found[target], self.wanted[target].shape
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
            raise CorruptModel(f"token {int(ids.max())} of a vocabulary of {vocab}")
        result = np.zeros((len(ids), hidden), np.float32)
        if tensor is not None:
            pieces = ids // _PIECE_ROWS
            for piece in np.unique(pieces):
                first = int(piece) * _PIECE_ROWS
                rows = tensor.rows(first, min(first + _PIECE_ROWS, vocab)).reshape(-1, hidden)
                here = pieces == piece
                result[here] = rows[ids[here] - first]
        return torch.from_numpy(result)
