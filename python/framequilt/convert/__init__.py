"""Checkpoints in, model directories out.

    from framequilt.convert import convert
    report = convert("checkpoints/smol", "models/smol", weights="w4g128")

Reads Hugging Face directories (safetensors) and GGUF files of the families in `families`, plain or
quantized already (`importers`). Calibration methods take part as `plan` describes. Needs numpy.
"""

from framequilt.convert.converter import convert
from framequilt.convert.report import ConversionReport, LinearReport, Progress

__all__ = ["ConversionReport", "LinearReport", "Progress", "convert"]
