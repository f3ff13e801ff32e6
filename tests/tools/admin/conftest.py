"""A service in the test's event loop, and where it is found."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.runtime.admin_world import AdminWorld, admin_world


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A private folder for sockets, whose paths must be short."""
    with tempfile.TemporaryDirectory(prefix="vt", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
async def world(short_dir: Path) -> AsyncIterator[AdminWorld]:
    async with admin_world(short_dir) as world:
        yield world
