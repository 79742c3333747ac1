"""Weight rules: which tensor of a checkpoint fills which slot.

A pattern is a tensor name with `{n}` for a layer number and `{p}` for `weight` or `bias`. A family
is a list of rules and a list of tensors to leave out, each with its reason; whatever else a
checkpoint holds is an error, and so is a slot that stays empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from framequilt.convert.sources import SourceTensor
from framequilt.convert.spec import Slot
from framequilt.errors import CorruptModel, Unsupported


@dataclass(frozen=True)
class Rule:
    """The source tensors that match `source` fill the slots `target`."""

    source: str
    target: str


@dataclass(frozen=True)
class LeaveOut:
    """Source tensors that the model does not use, and why."""

    source: str
    reason: str


def _compile(pattern: str) -> re.Pattern[str]:
    text = re.escape(pattern)
    text = text.replace(re.escape("{n}"), r"(?P<n>0|[1-9][0-9]*)")
    text = text.replace(re.escape("{p}"), r"(?P<p>weight|bias)")
    return re.compile(text.replace(re.escape("{*}"), r".*"))


def assign(
    tensors: Mapping[str, SourceTensor],
    rules: Iterable[Rule],
    left_out: Iterable[LeaveOut],
    wanted: Mapping[str, Slot],
    zero_filled: Iterable[str] = (),
) -> tuple[dict[str, SourceTensor | None], dict[str, str]]:
    """The source tensor of every slot (None: zeros), and the unused tensors with their reasons.

    `left_out` is asked before `rules`. Errors: CorruptModel for an empty slot or a wrong shape,
    Unsupported for a tensor that nothing uses.
    """
    skip = [(_compile(entry.source), entry.reason) for entry in left_out]
    fill = [(_compile(rule.source), rule.target) for rule in rules]
    found: dict[str, SourceTensor | None] = {}
    unused: dict[str, str] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        reason = next((why for pattern, why in skip if pattern.fullmatch(name)), None)
        if reason is not None:
            unused[name] = reason
            continue
        target = next(
            (
                to.format(**{key: value for key, value in match.groupdict().items() if value})
                for pattern, to in fill
                if (match := pattern.fullmatch(name))
            ),
            None,
        )
        if target is None or target not in wanted:
            unknown.append(name)
            continue
        if (taken := found.get(target)) is not None:
            raise CorruptModel(f"{taken.name} and {name} both fill {target}")
        found[target] = tensor
    if unknown:
        raise Unsupported(
            f"{len(unknown)} tensors have no place in the model: {_some(unknown)}",
            "the checkpoint has parts that its config does not describe",
        )
    for name in zero_filled:
        if name in wanted:
            found.setdefault(name, None)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise CorruptModel(
            f"{len(missing)} tensors are missing, for: {_some(missing)}",
            "the checkpoint is not complete, or its config describes another model",
        )
    for target, source in found.items():
        if source is not None:
            _check_shape(source, target, wanted[target])
    return {name: found[name] for name in wanted}, unused


def _check_shape(tensor: SourceTensor, target: str, slot: Slot) -> None:
    """[out, c, y, x] of a convolution is as good as [out, c * y * x]."""
    shape = tensor.shape
    if slot.linear and len(shape) == 4:
        shape = (shape[0], shape[1] * shape[2] * shape[3])
    if shape != slot.shape:
        raise CorruptModel(
            f"{tensor.name} has shape {list(tensor.shape)}, but {target} needs {list(slot.shape)}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
