"""A checkpoint without weights, and an edge that serves it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.actors.edge.running import RunningEdge, edge_config, running_edge
from vlmrt.tools.checkpoint import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("edge-checkpoint"), "test-qwen2-vl", weights=False)


@pytest.fixture
async def edge(checkpoint: Path, tmp_path: Path) -> AsyncIterator[RunningEdge]:
    async with running_edge(edge_config(checkpoint), tmp_path) as running:
        yield running
