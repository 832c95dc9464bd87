"""Shared fixtures: where the optional real data lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def _shared_data() -> Path | None:
    named = os.environ.get("QWEN2VL_REAL_DATA")
    candidates = [Path(named)] if named else [Path(__file__).resolve().parents[2] / "shared" / "data"]
    return next((path for path in candidates if (path / "real" / "manifest.json").is_file()), None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real/, bad/ and tokenizer/; tests that need it are skipped where it is absent."""
    path = _shared_data()
    if path is None:
        pytest.skip("real data absent: set QWEN2VL_REAL_DATA to a folder with real/, bad/ and tokenizer/")
    return path
