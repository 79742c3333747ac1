"""Checkpoints in, model directories out.

    from framequilt.convert import convert
    report = convert("checkpoints/smol", "models/smol", weights="w4g128")

Reads Hugging Face directories (safetensors) and GGUF files of the families in `families`. Needs
numpy; GGUF also needs the package `gguf`.
"""

from framequilt.convert.converter import convert
from framequilt.convert.report import ConversionReport, LinearReport, Progress

__all__ = ["ConversionReport", "LinearReport", "Progress", "convert"]
