# Made from the compiled module by `make stubs`; do not edit.
"""
Native engine of Framequilt.
"""

from __future__ import annotations

import collections.abc
import typing

__all__: list[str] = [
    "Engine",
    "Model",
    "Stream",
    "Tokenizer",
    "cpu_targets",
    "kv_format_name",
    "kv_page_bytes",
    "version",
]

class Model:
    """
    An opened model directory; immutable, shared by engines.
    """
    @staticmethod
    def open(path: str, verify_checksums: bool = False) -> Model: ...
    @property
    def weight_bytes(self) -> int: ...

class Stream:
    """
    Events of one request.
    """
    def cancel(self) -> None: ...
    def next(self, timeout_seconds: typing.SupportsFloat | typing.SupportsIndex) -> dict | None: ...
    @property
    def done(self) -> bool: ...
    @property
    def id(self) -> int: ...

class Engine:
    """
    Runs requests; thread-safe.
    """
    def __init__(
        self,
        model: Model,
        kv: str = "",
        activations: str = "",
        numerics: str = "int",
        memory_bytes: typing.SupportsInt | typing.SupportsIndex = 1073741824,
        threads: typing.SupportsInt | typing.SupportsIndex = 0,
        chunk_rows: typing.SupportsInt | typing.SupportsIndex = 512,
        max_sequences: typing.SupportsInt | typing.SupportsIndex = 64,
        max_context: typing.SupportsInt | typing.SupportsIndex = 0,
        simd: str = "",
        page_shuffle_seed: typing.SupportsInt | typing.SupportsIndex = 0,
        manual_step: bool = False,
        text: bool = True,
    ) -> None: ...
    def check_integrity(self) -> None: ...
    def close(self) -> None: ...
    def describe_kernels(self) -> str: ...
    def plan(self) -> dict: ...
    def stats(self) -> dict: ...
    def step(self) -> bool: ...
    def submit(self, request: dict) -> Stream: ...

class Tokenizer:
    """
    The engine's own tokenizer, as embedded applications use it.
    """
    @staticmethod
    def open(model_directory: str) -> Tokenizer: ...
    def decode(
        self, ids: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]
    ) -> str: ...
    def encode(self, text: str, parse_special: bool = True) -> list[int]: ...
    def token_bytes(self, id: typing.SupportsInt | typing.SupportsIndex) -> bytes: ...
    @property
    def vocab_size(self) -> int: ...

def cpu_targets() -> list[str]:
    """
    SIMD targets of this build and machine, best first.
    """

def kv_format_name(text: str) -> str:
    """
    The one name of a KV cache format. Errors: invalid_argument.
    """

def kv_page_bytes(
    text: str,
    kv_heads: typing.SupportsInt | typing.SupportsIndex,
    head_dim: typing.SupportsInt | typing.SupportsIndex,
    layer: typing.SupportsInt | typing.SupportsIndex,
    layers: typing.SupportsInt | typing.SupportsIndex,
) -> int:
    """
    Bytes of a page, 64 tokens of one layer. Errors: invalid_argument, unsupported.
    """

def version() -> str: ...
