"""Where the servers of these tests keep their run directories."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def run_root() -> Iterator[Path]:
    """A short directory for run directories, empty at the end of a test if nothing leaks."""
    with tempfile.TemporaryDirectory(prefix="vt", dir="/tmp") as name:
        yield Path(name)
