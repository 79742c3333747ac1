"""Checkpoints that are quantized already, read code by code: one file for each way of storing.

Hugging Face directories say in `quantization_config` how they are quantized; `read_quantized` puts
a `CodedTensor` named `<module>.weight` in the place of each group of stored tensors. Weights whose
codes none of our formats holds become plain tensors, with a note. GGUF files have one type for each
tensor instead (gguf_blocks.py).

Memory: mapped files stay mapped. One thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from framequilt.convert.importers import awq, compressed_tensors, gptq
from framequilt.convert.importers.common import Imported, Settings
from framequilt.convert.sources import Source
from framequilt.errors import CorruptModel, Unsupported

_READERS: dict[str, Callable[[Source, Settings], Imported]] = {
    "awq": awq.read,
    "compressed-tensors": compressed_tensors.read,
    "gptq": gptq.read,
}


def read_quantized(source: Source) -> Source:
    """A quantized Hugging Face checkpoint as one whose weights are `CodedTensor`s.

    Errors: CorruptModel, Unsupported for methods and layouts that are not known.
    """
    config = dict(source.config)
    found: Any = config.pop("quantization_config")
    where = f"{source.path.name}: quantization_config"
    if not isinstance(found, dict):
        raise CorruptModel(f"{where} is no object")
    kind = found.get("quant_method")
    reader = _READERS.get(kind) if isinstance(kind, str) else None
    if reader is None:
        raise Unsupported(
            f"{where}: quant_method {kind!r}"[:200],
            f"known: {', '.join(_READERS)}; or convert the original checkpoint",
        )
    imported = reader(source, Settings(found, where))
    return replace(
        source,
        config=config,
        tensors=imported.tensors,
        quantization=imported.summary,
        notes=source.notes + imported.notes,
    )
