"""The compiled module `framequilt._framequilt`: what it offers, and how it is loaded.

The protocols are the contract with the bindings. Native objects are thread-safe where the engine
is; a stream has one consumer at a time.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

from framequilt.errors import Unsupported


class NativeStream(Protocol):
    """One running request."""

    @property
    def id(self) -> int: ...
    @property
    def done(self) -> bool: ...
    def next(self, timeout_seconds: float) -> dict[str, Any] | None: ...
    def cancel(self) -> None: ...


class NativeEngine(Protocol):
    """Runs requests together."""

    def submit(self, request: Mapping[str, Any]) -> NativeStream: ...
    def plan(self) -> dict[str, int]: ...
    def stats(self) -> dict[str, int]: ...
    def check_integrity(self) -> None: ...
    def describe_kernels(self) -> str: ...
    def step(self) -> bool: ...
    def close(self) -> None: ...


class NativeModel(Protocol):
    """An opened model directory; every file of it has been checked against its description."""

    @property
    def weight_bytes(self) -> int: ...


class NativeModule(Protocol):
    """The functions and classes of the compiled module."""

    Model: Any  # Model.open(path, verify_checksums=False) -> NativeModel
    Engine: Any  # Engine(model, **options) -> NativeEngine

    def cpu_targets(self) -> list[str]: ...
    def kv_format_name(self, text: str) -> str: ...
    def kv_page_bytes(
        self, text: str, kv_heads: int, head_dim: int, layer: int, layers: int
    ) -> int: ...
    def version(self) -> str: ...


def load() -> NativeModule:
    """The compiled module. Errors: unsupported, when it is not built for this Python."""
    try:
        return cast(NativeModule, importlib.import_module("framequilt._framequilt"))
    except ImportError as cause:
        raise Unsupported(
            f"the compiled engine of framequilt cannot be loaded: {cause}",
            hint="pip install framequilt (or, in a source tree, pip install -e .)",
        ) from cause
