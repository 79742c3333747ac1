"""What a conversion did, or would do: sizes and errors by tensor. Plain values."""

from __future__ import annotations

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

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight, everything included."""
        return 8 * self.bytes / (self.out * self.inputs)


@dataclass
class ConversionReport:
    """A whole conversion. In a dry run `written` is false and nothing is on disk."""

    source: Path
    destination: Path
    family: str
    weights: str
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
        return result
