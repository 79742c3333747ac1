"""Where the larger reference data lies, and how tests find it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


def shared(*parts: str) -> Path:
    """A path under FRAMEQUILT_SHARED (default ../shared); skips the test where it is missing."""
    base = Path(os.environ.get("FRAMEQUILT_SHARED") or ROOT.parent / "shared")
    path = base.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"reference data not here: {'/'.join(parts)} (set FRAMEQUILT_SHARED)")
    return path


def manifest(*parts: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(shared(*parts, "manifest.json").read_text())
    return loaded
