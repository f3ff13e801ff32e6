"""What all tests share.

Triton kernels run under the interpreter where there is no GPU; it is chosen when triton is first imported. Starting a
server costs seconds, so tests that do not harm it share one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.system.server import Server

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_runtest_setup() -> None:
    """Matrices as small as those of tests are slower on many threads, ten times so on busy cores.

    Servers and ranks of their own processes have the threads that their options give them.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_server() -> Iterator[Server]:
    from tests.system.server import launch  # needs clients that a machine for tests of kernels may lack

    with tempfile.TemporaryDirectory(prefix="vt", dir="/tmp") as name, launch(run_root=Path(name)) as server:
        yield server
