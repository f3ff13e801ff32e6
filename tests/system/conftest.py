"""Where the servers of these tests keep their run directories, and the browser that looks at them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome

from tests.system.browser import headless_browser, missing_programs


@pytest.fixture
def run_root() -> Iterator[Path]:
    """A short directory for run directories, empty at the end of a test if nothing leaks."""
    with tempfile.TemporaryDirectory(prefix="vt", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def browser() -> Iterator[Chrome]:
    """One browser for all tests; they open pages in it."""
    if missing := missing_programs():
        pytest.skip(f"{missing} not installed: apt-get install chromium chromium-driver")
    with headless_browser() as driver:
        yield driver
