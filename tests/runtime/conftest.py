from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.services import ROOT


@pytest.fixture
def run_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short folder for run directories; nothing may be left in it.  tmp_path is made first, elsewhere."""
    root = Path(tempfile.mkdtemp(prefix="vt", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(root))
    monkeypatch.setenv("TMPDIR", str(root))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{ROOT}")  # children run this tree, whatever is installed
    yield root
    left = list(root.iterdir())
    shutil.rmtree(root)
    assert left == []


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A private folder for sockets, whose paths must be short."""
    with tempfile.TemporaryDirectory(prefix="vt", dir="/tmp") as name:
        yield Path(name)
