"""What a conversion did, or would do: sizes and errors by tensor. Plain values."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Progress:
    """One step of a running conversion; bytes are those of the destination."""

    slot: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class LinearReport:
    """One linear: where it came from, how it is stored, what that cost."""

    slot: str
    source: str
    out: int
    inputs: int
    format: str
    source_dtype: str
    bytes: int  # stored, scales, zeros and padding included
    relative_error: float | None  # ||w - stored|| / ||w||, Frobenius; None in a dry run
    norm: float | None = None  # ||w||, Frobenius; None in a dry run
    activations: str = "a16"  # how the input rows are quantized
    codes_kept: bool = False  # the codes of the checkpoint, or of a method, as they were

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight, everything included."""
        return 8 * self.bytes / (self.out * self.inputs)


@dataclass(frozen=True)
class PartReport:
    """All linears of one part of the model."""

    part: str  # "decoder layers", "embedding", "head", "vision" or "projector"
    linears: int
    parameters: int
    bytes: int
    relative_error: float | None  # over all weights of the part; None in a dry run

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight, everything included."""
        return 8 * self.bytes / self.parameters


_PARTS = {
    "decoder.embedding": "embedding",
    "decoder.head": "head",
    "decoder.layers": "decoder layers",
    "projector.layers": "projector",
}


@dataclass
class ConversionReport:
    """A whole conversion. In a dry run `written` is false and nothing is on disk."""

    source: Path
    destination: Path
    family: str
    weights: str
    activations: str
    kv: str
    written: bool
    config: dict[str, Any]  # config.json but for `files`
    linears: list[LinearReport] = field(default_factory=list)
    vector_bytes: int = 0  # norms, biases, positions
    total_bytes: int = 0  # of the tensor files
    source_bytes: int = 0  # of the tensors that were used
    left_out: dict[str, str] = field(default_factory=dict)  # source tensor -> why
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def parameters(self) -> int:
        """Weights of all linears."""
        return sum(entry.out * entry.inputs for entry in self.linears)

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight over all linears."""
        return 8 * sum(entry.bytes for entry in self.linears) / max(self.parameters, 1)

    def parts(self) -> list[PartReport]:
        """The parts of the model, in its order."""
        members: dict[str, list[LinearReport]] = {}
        for entry in self.linears:
            start = ".".join(entry.slot.split(".")[:2])
            members.setdefault(_PARTS.get(start, "vision"), []).append(entry)
        result = []
        for part, entries in members.items():
            total = sum((entry.norm or 0.0) ** 2 for entry in entries)
            lost = sum(
                ((entry.relative_error or 0.0) * (entry.norm or 0.0)) ** 2 for entry in entries
            )
            known = all(entry.relative_error is not None for entry in entries)
            result.append(
                PartReport(
                    part,
                    len(entries),
                    sum(entry.out * entry.inputs for entry in entries),
                    sum(entry.bytes for entry in entries),
                    (math.sqrt(lost / total) if total else 0.0) if known else None,
                )
            )
        return result

    def worst(self, count: int = 5) -> list[LinearReport]:
        """The linears with the largest relative errors, largest first."""
        known = [entry for entry in self.linears if entry.relative_error is not None]
        return sorted(known, key=lambda entry: -(entry.relative_error or 0.0))[:count]

    def to_json(self) -> dict[str, Any]:
        """Plain values, with effective bits filled in."""
        result = asdict(self)
        result["source"], result["destination"] = str(self.source), str(self.destination)
        result["parameters"] = self.parameters
        result["effective_bits"] = self.effective_bits
        for entry, linear in zip(result["linears"], self.linears, strict=True):
            entry["effective_bits"] = linear.effective_bits
        result["parts"] = [
            {**asdict(part), "effective_bits": part.effective_bits} for part in self.parts()
        ]
        return result
