"""Shared servers: starting one costs seconds, so tests that do not harm it share it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.server import Server, launch


@pytest.fixture
def run_root() -> Iterator[Path]:
    """A short directory for run directories, empty at the end of a test if nothing leaks."""
    with tempfile.TemporaryDirectory(prefix="vt", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def demo_server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="vt", dir="/tmp") as name, launch(run_root=Path(name)) as server:
        yield server
