"""Framequilt: questions about video, answered by quantized vision-language models.

    import framequilt as fq

    with fq.Engine("model-directory") as engine:
        print(engine.generate("What happens?", video="clip.mp4", reduction=fq.FrameFusion()).text)

Everything here is loaded when it is first used, so that `import framequilt` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from framequilt.chat import ChatTemplate
    from framequilt.engine import Engine, ResultStream
    from framequilt.errors import FramequiltError
    from framequilt.reduction import FrameFusion
    from framequilt.request import Request
    from framequilt.results import GenerationResult, StreamPiece, Usage
    from framequilt.sampling import Sampling
    from framequilt.tokenizer import Tokenizer
    from framequilt.vision import Frames, load_frames, load_image, probe

__version__: str

_HOME = {
    "ChatTemplate": "chat",
    "Engine": "engine",
    "FrameFusion": "reduction",
    "FramequiltError": "errors",
    "Frames": "vision",
    "GenerationResult": "results",
    "Request": "request",
    "ResultStream": "engine",
    "Sampling": "sampling",
    "StreamPiece": "results",
    "Tokenizer": "tokenizer",
    "Usage": "results",
    "load_frames": "vision",
    "load_image": "vision",
    "probe": "vision",
}

__all__ = [
    "ChatTemplate",
    "Engine",
    "FrameFusion",
    "FramequiltError",
    "Frames",
    "GenerationResult",
    "Request",
    "ResultStream",
    "Sampling",
    "StreamPiece",
    "Tokenizer",
    "Usage",
    "load_frames",
    "load_image",
    "probe",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("framequilt")
        except PackageNotFoundError:  # run from a source tree
            return "0+source"
    if name in _HOME:
        return getattr(importlib.import_module(f"framequilt.{_HOME[name]}"), name)
    raise AttributeError(f"module 'framequilt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
