"""Typed errors: the same codes as the engine's `status.h`, one exception class each.

Every error that Framequilt raises on purpose is a `FramequiltError` with a stable `code`, a
`message` that names the offending value, and a `hint` (may be empty) that says what to do next.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "Cancelled",
    "Closed",
    "ContextOverflow",
    "CorruptModel",
    "FramequiltError",
    "InternalError",
    "InvalidArgument",
    "IoError",
    "NotFound",
    "OutOfMemory",
    "OutOfPages",
    "Unsupported",
    "VersionMismatch",
    "from_code",
]


class FramequiltError(Exception):
    """Base of all errors raised on purpose.

    `code` is the stable lower-case name ("corrupt_model"), `message` says what happened, `hint`
    what to do next.
    """

    code: ClassVar[str] = "internal"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.code}: {self.message}"
        return f"{text} (hint: {self.hint})" if self.hint else text


class InvalidArgument(FramequiltError):
    """The caller asked for something that cannot be."""

    code = "invalid_argument"


class NotFound(FramequiltError):
    """A file, tensor or model that is not there."""

    code = "not_found"


class CorruptModel(FramequiltError):
    """A model file that breaks its own format."""

    code = "corrupt_model"


class Unsupported(FramequiltError):
    """Well formed, but nothing here can run it."""

    code = "unsupported"


class VersionMismatch(FramequiltError):
    """Written by a newer (or older) Framequilt."""

    code = "version_mismatch"


class ContextOverflow(FramequiltError):
    """The prompt and the answer do not fit the model's context."""

    code = "context_overflow"


class OutOfPages(FramequiltError):
    """The KV pool can never hold this request."""

    code = "out_of_pages"


class OutOfMemory(FramequiltError):
    """The operating system refused memory."""

    code = "out_of_memory"


class Cancelled(FramequiltError):
    """The caller cancelled."""

    code = "cancelled"


class Closed(FramequiltError):
    """The engine was closed."""

    code = "closed"


class IoError(FramequiltError):
    """The operating system refused a file operation."""

    code = "io"


class InternalError(FramequiltError):
    """A broken invariant of Framequilt itself: please report it."""

    code = "internal"


_BY_CODE: dict[str, type[FramequiltError]] = {
    kind.code: kind
    for kind in (
        InvalidArgument,
        NotFound,
        CorruptModel,
        Unsupported,
        VersionMismatch,
        ContextOverflow,
        OutOfPages,
        OutOfMemory,
        Cancelled,
        Closed,
        IoError,
        InternalError,
    )
}


def from_code(code: str, message: str, hint: str = "") -> FramequiltError:
    """The error of a code name of the engine; an unknown code becomes `InternalError`.

    Returns it, does not raise it.
    """
    kind = _BY_CODE.get(code)
    if kind is None:
        return InternalError(f"unknown error code {code!r}: {message}", hint)
    return kind(message, hint)
