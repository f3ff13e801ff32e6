"""Memory of a GPU is taken in order: ViTs first, then the ranks; fakes of both, no GPU."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tests.runtime.services import DEADLINE_S, fake_config, service
from vlmrt.runtime.config import ParallelOptions
from vlmrt.runtime.topology import ActorKind

pytestmark = pytest.mark.usefixtures("run_root")

FAKES: dict[ActorKind, str] = {"vit": "GatedVit", "llm": "PatientRank"}
ON_GPU = ParallelOptions(device="cuda", dtype="bfloat16", num_vits=2, gpu_sharing="time-slice")


def turns(lines: list[str]) -> list[str]:
    return [line for line in lines if " turn " in line]


async def test_a_rank_waits_until_the_vit_on_its_gpu_is_ready(tmp_path: Path) -> None:
    async with service(fake_config(tmp_path, parallel=ON_GPU), FAKES, tmp_path) as running:
        await running.until_line("llm:0", "1 loaded")
        rank = running.process("llm:0")
        beat_s = rank.last_heartbeat_s
        await running.until(lambda: rank.last_heartbeat_s > beat_s + 0.2, "some heartbeats")
        assert turns(running.lines("llm:0")) == []
        (tmp_path / "vit-gate").touch()
        await running.until_ready()
        assert turns(running.lines("llm:0")) == ["1 turn None"]


async def test_a_rank_on_a_cpu_or_a_gpu_of_its_own_does_not_wait(tmp_path: Path) -> None:
    of_its_own = ParallelOptions(device="cuda", dtype="bfloat16", num_vits=1)  # the ViT is on the last GPU
    for number, parallel in enumerate((ParallelOptions(), of_its_own)):
        events = tmp_path / str(number)
        events.mkdir()
        async with service(fake_config(events, parallel=parallel), FAKES, events) as running:
            await running.until_line("llm:0", "1 turn None")
            assert not running.process("vit:0").is_up


async def test_a_restarted_rank_takes_at_once_what_it_had_even_while_the_vit_is_down(tmp_path: Path) -> None:
    (tmp_path / "vit-gate").touch()
    async with service(fake_config(tmp_path, parallel=ON_GPU), FAKES, tmp_path) as running:
        await running.until_ready()
        (tmp_path / "vit-gate").unlink()
        for name in ("vit:0", "vit:1", "llm:0"):
            os.kill(running.pid(name), signal.SIGKILL)
        await running.until_line("llm:0", "2 turn 8")
        rank = running.process("llm:0")
        await running.until(lambda: rank.epoch == 2 and rank.is_up, "the rank")
        (tmp_path / "vit-gate").touch()
        await running.until_ready(2)
        assert turns(running.lines("llm:0")) == ["1 turn None", "2 turn 8"]


async def test_a_vit_that_dies_during_the_first_start_ends_it_though_a_rank_waits(tmp_path: Path) -> None:
    async with service(fake_config(tmp_path, parallel=ON_GPU), FAKES, tmp_path) as running:
        await running.until_line("llm:0", "1 loaded")
        (tmp_path / "vit-dies").touch()
        assert await asyncio.wait_for(running.ended, DEADLINE_S) == 1
    ((_, message),) = running.observer.of("failed")
    assert "ended during its start" in message
    assert turns(running.lines("llm:0")) == []


async def test_a_rank_whose_turn_never_comes_names_the_deadline(tmp_path: Path) -> None:
    config = fake_config(tmp_path, parallel=ON_GPU, start_timeout_s=1.0)
    async with service(config, FAKES, tmp_path) as running:
        assert await asyncio.wait_for(running.ended, DEADLINE_S) == 1
    ((_, message),) = running.observer.of("failed")
    assert "--start-timeout-s" in message
