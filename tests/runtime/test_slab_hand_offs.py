"""A CudaSlab between two processes on a real GPU, without and with MPS: hand-offs and kills leave the memory free."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from tests.runtime.services import DEADLINE_S, ROOT, daemons
from tests.runtime.slab_process import NUM_PAGES
from tests.support import make_config
from vlmrt.runtime.config import ParallelOptions
from vlmrt.runtime.gpu_sharing import GpuSharing
from vlmrt.runtime.sweeper import stop_mps
from vlmrt.runtime.topology import actor_specs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NUM_HAND_OFFS = 10_000
NUM_KILLS = 50
ALLOWED_BYTES = 8 << 20
NUM_SPARE = 6  # processes that import ahead of their use
ON_GPU = ParallelOptions(device="cuda", dtype="bfloat16", vit_sm_percent=50)
SPECS = tuple(spec for spec in actor_specs(make_config(parallel=ON_GPU), num_gpus=1) if spec.device != "cpu")

Environments = tuple[Mapping[str, str], Mapping[str, str]]  # of a ViT, of a rank


@pytest_asyncio.fixture(params=["without MPS", "with MPS"])
async def environments(request: pytest.FixtureRequest, run_root: Path) -> AsyncIterator[Environments]:
    """What a ViT and a rank are started with; at the end nothing of a daemon is left."""
    if request.param == "without MPS":
        yield {}, {}
        return
    run_dir = run_root / "vlmrt-test"
    run_dir.mkdir()
    said: list[str] = []
    sharing = GpuSharing(ON_GPU, SPECS, run_dir, said.append)
    sharing.start()
    try:
        await sharing.enter("llm")
        if not said[0].startswith("MPS"):
            pytest.skip(said[0])
        vit, rank = (sharing.environment(spec) for spec in SPECS)
        yield vit, rank
    finally:
        await asyncio.to_thread(stop_mps, str(run_dir))
        await sharing.close()
        await asyncio.to_thread(shutil.rmtree, run_dir)
    assert daemons(run_root) == []


class Side:
    """A process that makes a slab or opens one."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.runtime.slab_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
        )

    def ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        assert answer, f"no answer to {line!r}"
        return answer

    def tell(self, line: str) -> None:
        """Without waiting for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        self._process.kill()
        with self._process:
            pass


class Spares:
    """Processes of one kind, a few of them started ahead."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._ready = deque(Side(environment) for _ in range(NUM_SPARE))

    def take(self) -> Side:
        self._ready.append(Side(self._environment))
        return self._ready.popleft()

    def end(self) -> None:
        for side in self._ready:
            side.kill()


@contextmanager
def spares(environments: Environments) -> Iterator[tuple[Spares, Spares]]:
    """Of writers and readers; whatever they use of the device, once for good, is in use when this yields."""
    writers, readers = (Spares(environment) for environment in environments)
    writer, reader = writers.take(), readers.take()
    reader.ask(f"open {writer.ask('create')}")
    for side in (reader, writer):
        side.ask("close")
        side.kill()
    try:
        yield writers, readers
    finally:
        writers.end()
        readers.end()


def free_bytes() -> int:
    return torch.cuda.mem_get_info(0)[0]


def check_free(before: int) -> None:
    """The driver takes a moment after a kill."""
    deadline_s = time.monotonic() + DEADLINE_S
    while free_bytes() < before - ALLOWED_BYTES and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert abs(free_bytes() - before) <= ALLOWED_BYTES


def hand_off(writer: Side, reader: Side, number: int) -> None:
    page = number * 37 % NUM_PAGES
    assert writer.ask(f"write {page} {number}") == reader.ask(f"read {page}"), f"hand-off {number}"


def test_ten_thousand_hand_offs_leave_the_memory_where_it_was(environments: Environments) -> None:
    with spares(environments) as (writers, readers):
        before = free_bytes()
        writer, reader = writers.take(), readers.take()
        reader.ask(f"open {writer.ask('create')}")
        held = before - free_bytes()
        for number in range(NUM_HAND_OFFS):
            hand_off(writer, reader, number)
        assert abs(before - free_bytes() - held) <= ALLOWED_BYTES
        for side in (reader, writer):
            side.ask("close")
            side.kill()
        check_free(before)


def test_fifty_kills_of_either_side_leave_the_memory_where_it_was(environments: Environments) -> None:
    with spares(environments) as (writers, readers):
        before = free_bytes()
        writer, reader = writers.take(), readers.take()
        export = writer.ask("create")
        reader.ask(f"open {export}")
        for number in range(NUM_KILLS):
            hand_off(writer, reader, number)
            last = writer.ask(f"write 0 {number}")
            if number % 2:
                reader.tell(f"read {number}")
                reader.kill()
                reader = readers.take()
                reader.ask(f"open {export}")
                assert reader.ask("read 0") == last
            else:
                writer.tell(f"write 1 {number}")
                writer.kill()
                assert reader.ask("read 0") == last, "the memory outlives its exporter while it is mapped"
                reader.ask("close")
                writer = writers.take()
                export = writer.ask("create")
                reader.ask(f"open {export}")
        for side in (reader, writer):
            side.kill()
        check_free(before)


def test_a_vit_beside_a_rank_sees_its_share_of_the_sms(environments: Environments) -> None:
    if not environments[0]:
        pytest.skip("only under MPS")
    vit, rank = (Side(environment) for environment in environments)
    all_sms, share = int(rank.ask("sms")), int(vit.ask("sms"))
    for side in (vit, rank):
        side.kill()
    assert 0.4 * all_sms <= share <= 0.6 * all_sms
