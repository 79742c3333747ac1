"""What a conversion has decided before it writes, and how a calibration method takes part.

A method (AWQ, GPTQ, SmoothQuant, ...) is an object with a `name`, `notes` and `transform`. It is
given the plan, reads the weights that it needs from it, and returns the tensors that it wants to
see in their place:

    class Halved:
        name = "halved"          # recorded in the model; say the parameters too
        notes: list[str] = []    # read after transform, shown in the report

        def transform(self, plan: Plan, check: Callable[[], None]) -> Mapping[str, SourceTensor]:
            result = {}
            for slot in plan.linears():
                check()          # raises when the conversion is cancelled
                weight = plan.tensor(f"{slot}.weight").all()
                result[f"{slot}.weight"] = ArrayTensor(slot, weight / 2)
            return result

Keys are the names of engine/CONTRACT.md, 1.2: `decoder.layers.0.attention.q.weight`, but also
`decoder.layers.0.attention_norm.weight` and `....bias`, wherever a scale is folded in. A plain
tensor is then quantized in the plan's format (`plan.linear(slot).form`, with the group, symmetry
and scale type that it says). A `CodedTensor` (`ArrayCodes`) is stored code by code, and its own
format replaces the plan's. What is not in the mapping stays as it is.

Memory: plans hold views of the mapped checkpoint. One thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from framequilt.convert.coded import CodedTensor
from framequilt.convert.families import Description
from framequilt.convert.sources import Source, SourceTensor
from framequilt.convert.spec import Model, Slot
from framequilt.convert.tokens import Tokens
from framequilt.errors import InvalidArgument
from framequilt.quantize import ActivationFormat, ActivationScheme, Scheme, WeightFormat
from framequilt.quantize.formats import TensorInfo, input_tensors
from framequilt.quantize.schemes import EMBEDDING, check_patterns


class Method(Protocol):
    """See above. Errors of `transform` are the caller's to see; nothing has been written yet."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def notes(self) -> list[str]: ...  # noqa: D102

    def transform(self, plan: Plan, check: Callable[[], None]) -> Mapping[str, SourceTensor]: ...  # noqa: D102


@dataclass(frozen=True)
class Linear:
    """One linear as it will be stored."""

    slot: str
    out: int
    inputs: int
    form: WeightFormat
    activations: ActivationFormat | None  # None: float32
    source: SourceTensor | None  # None: zeros
    coded: CodedTensor | None  # the source again, when its codes are stored as they are


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first byte is written."""

    source: Source
    description: Description
    family: str
    tokens: Tokens
    scheme: Scheme
    activations: ActivationScheme | None  # None: what a quantized checkpoint says, else float32
    wanted: Mapping[str, Slot]
    found: Mapping[str, SourceTensor | None]
    left_out: Mapping[str, str]
    made: frozenset[str] = field(default_factory=frozenset)  # targets that a method replaced

    @property
    def model(self) -> Model:
        """The blocks of the model."""
        return self.description.model

    @property
    def tied(self) -> bool:
        """Whether the embedding is the head as well."""
        return self.model.decoder.tied_embedding

    def linears(self) -> list[str]:
        """Slots of all linears, in the order of the model."""
        return [
            target.removesuffix(".weight") for target, slot in self.wanted.items() if slot.linear
        ]

    def tensor(self, target: str) -> SourceTensor | None:
        """What fills a target such as "decoder.final_norm.weight"; None is zeros.

        Errors: InvalidArgument for a target that the model does not have.
        """
        if target not in self.wanted:
            raise InvalidArgument(f"the model has no {target}")
        return self.found[target]

    def linear(self, slot: str) -> Linear:
        """How a linear will be stored. Errors: InvalidArgument."""
        target = f"{slot}.weight"
        source = self.tensor(target)
        out, inputs = self.wanted[target].shape
        form = self.scheme.format_of(slot, tied=self.tied)
        coded = None
        if isinstance(source, CodedTensor):
            keep = target in self.made or self.scheme.keeps(slot, tied=self.tied)
            if keep or source.form == form:
                coded, form = source, source.form
        return Linear(slot, out, inputs, form, self._inputs(slot, form, coded), source, coded)

    def _inputs(
        self, slot: str, form: WeightFormat, coded: CodedTensor | None
    ) -> ActivationFormat | None:
        """Activations of a linear, where its weights take them."""
        if self.activations is None:
            return None if coded is None or slot == EMBEDDING else coded.activations
        chosen = self.activations.format_of(slot, tied=self.tied)
        if chosen is None or chosen.fits(form):
            return chosen
        if self.activations.asked_for(slot, tied=self.tied):
            raise InvalidArgument(
                f"{slot} has {form.name} weights, which take no {chosen.name} inputs",
                "choose a16, or "
                + ("bf16 weights" if chosen.bf16 else "a format with codes, as w8"),
            )
        return None

    @property
    def attention_activations(self) -> ActivationFormat | None:
        """Queries and keys of the vision tower; None is float32."""
        if self.activations is None or self.activations.attention is None:
            return None
        return self.activations.attention.format

    def tensors(self) -> Iterator[TensorInfo]:
        """What will be stored, in the order of the model."""
        for target, slot in self.wanted.items():
            if slot.linear:
                linear = self.linear(target.removesuffix(".weight"))
                yield from linear.form.tensors(linear.slot, linear.out, linear.inputs)
                yield from input_tensors(linear.slot, linear.out, linear.activations)
            else:
                yield TensorInfo(target, "F32", slot.shape)

    def check(self) -> None:
        """Errors: InvalidArgument for patterns that match nothing, and for impossible pairs."""
        slots = self.linears()
        check_patterns(self.scheme.overrides, slots, self.tied)
        if self.activations is not None:
            check_patterns(self.activations.overrides, slots, self.tied)
            attention = self.activations.attention
            if attention is not None and attention.required and self.model.vision is None:
                raise InvalidArgument(
                    "the model has no vision tower whose attention could be named",
                    "leave attention= out",
                )
        for slot in slots:
            self.linear(slot)

    def with_tensors(self, tensors: Mapping[str, SourceTensor]) -> Plan:
        """The plan with other tensors in their places.

        Errors: InvalidArgument for a target that there is not, or a shape that does not fit.
        """
        for target, tensor in tensors.items():
            if target not in self.wanted:
                raise InvalidArgument(f"the model has no {target}")
            if tuple(tensor.shape) != self.wanted[target].shape:
                raise InvalidArgument(
                    f"{target} needs {list(self.wanted[target].shape)}, not {list(tensor.shape)}"
                )
            if isinstance(tensor, CodedTensor) and not self.wanted[target].linear:
                raise InvalidArgument(f"{target} is no weight of a linear: it cannot have codes")
        return replace(self, found={**self.found, **tensors}, made=self.made | frozenset(tensors))
