"""The model families that can be converted. A family is one file and one row of the table below."""

from __future__ import annotations

from framequilt.convert.families import llama, llava_video, mistral, qwen2
from framequilt.convert.families.base import Description, Family
from framequilt.convert.sources import Source
from framequilt.errors import Unsupported

__all__ = ["FAMILIES", "Description", "Family", "find"]

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    llava_video.ORIGINAL,
    llava_video.ONEVISION,
)


def find(source: Source) -> Family:
    """The family of a checkpoint, by architecture first, then by model_type.

    Errors: Unsupported, which lists what there is.
    """
    listed = source.config.get("architectures")
    architectures = [str(name) for name in listed] if isinstance(listed, list) else []
    model_type = str(source.config.get("model_type"))
    for family in FAMILIES:
        if any(name in family.architectures for name in architectures):
            return family
    if not architectures:
        for family in FAMILIES:
            if model_type in family.model_types:
                return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    name = architectures[0] if architectures else model_type
    raise Unsupported(f"{source.path.name}: no family converts {name}", f"known: {known}")
