"""The admin socket of real processes: orders that reach actors, and actors that do not answer."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.runtime.services import DEADLINE_S, Service, fake_config, service
from vlmrt.runtime.admin_messages import (
    BeginDrain,
    BeginProfile,
    CachesReply,
    DrainReply,
    EndDrain,
    EndProfile,
    GetCaches,
    GetStats,
    LevelReply,
    ProfileReply,
    SetLevel,
    StatsReply,
)
from vlmrt.runtime.config import AdminOptions, Config
from vlmrt.runtime.topology import ActorKind
from vlmrt.runtime.transport import admin_address
from vlmrt.tools.admin.client import AdminClient, AdminError
from vlmrt.tools.admin.discovery import running_services

pytestmark = pytest.mark.usefixtures("run_root", "level")


@pytest.fixture
def level() -> Iterator[None]:
    """Orders to a supervisor of the test's process change its log."""
    before = logging.getLogger().level
    yield
    logging.getLogger().setLevel(before)


@asynccontextmanager
async def administered(
    config: Config, fakes: dict[ActorKind, str], events: Path
) -> AsyncIterator[tuple[Service, AdminClient]]:
    async with service(config, fakes, events) as running:
        await running.until_ready()
        assert running.supervisor.run_dir is not None
        async with AdminClient(admin_address(running.supervisor.run_dir)) as client:
            yield running, client


async def test_the_socket_is_in_a_directory_for_this_user_alone_and_is_found_there(
    tmp_path: Path, run_root: Path
) -> None:
    async with administered(fake_config(tmp_path), {"edge": "Recorder"}, tmp_path) as (running, client):
        run_dir = running.supervisor.run_dir
        assert run_dir is not None
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
        (found,) = running_services([run_root])
        assert (found.run_dir, found.file.pid, found.file.url) == (run_dir, os.getpid(), running.supervisor.url)
        assert found.address == client.address
        reply = await client.ask(GetStats(), StatsReply)
        assert [(actor.actor, actor.pid) for actor in reply.stats.actors] == [("edge:0", running.pid("edge:0"))]
        async with asyncio.timeout(DEADLINE_S):
            while reply.stats.actors[0].resident_bytes < 1 << 20:  # until its first heartbeat has been counted
                reply = await client.ask(GetStats(), StatsReply)
    assert running_services([run_root]) == []


async def test_a_level_lasts_longer_than_the_incarnation_that_it_was_told(tmp_path: Path) -> None:
    fakes: dict[ActorKind, str] = {"edge": "Recorder", "scheduler": "Recorder"}
    async with administered(fake_config(tmp_path), fakes, tmp_path) as (running, client):
        reply = await client.ask(SetLevel("error", "scheduler:0"), LevelReply)
        assert reply.actors == ("scheduler:0",)
        assert "1 asked SetLogLevel" in running.lines("scheduler:0")
        assert "1 asked SetLogLevel" not in running.lines("edge:0")
        running.process("scheduler:0").handle.kill()  # type: ignore[union-attr]
        await running.until_line("scheduler:0", "2 log level error")


async def test_a_drain_reaches_edges_at_once_and_the_service_ends_when_they_are_empty(tmp_path: Path) -> None:
    config = fake_config(tmp_path, heartbeat_s=30.0)  # so that no status goes out by itself
    async with administered(config, {"edge": "EmptyEdge"}, tmp_path) as (running, client):
        assert await client.ask(BeginDrain(), DrainReply) == DrainReply(True, False, 0)
        await running.until_line("edge:0", "1 draining")
        assert await client.ask(EndDrain(), DrainReply) == DrainReply(False, False, 0)
        await client.ask(BeginDrain(stop=True), DrainReply)
        assert await asyncio.wait_for(running.ended, DEADLINE_S) == 0
    assert running.observer.of("stopping") == [("stopping", "drained")]
    assert running.observer.of("failed") == []


async def test_an_actor_that_raises_at_a_question_goes_on_and_its_operator_is_told(tmp_path: Path) -> None:
    async with administered(fake_config(tmp_path), {"scheduler": "Forgetful"}, tmp_path) as (running, client):
        for _ in range(2):
            with pytest.raises(AdminError, match=r"internal error: RuntimeError\('planted'\)"):
                await client.ask(GetCaches(), CachesReply)
        assert running.process("scheduler:0").num_restarts == 0
        assert running.observer.of("down") == []


async def test_an_actor_that_ends_while_it_is_asked_is_an_answer_and_comes_back(tmp_path: Path) -> None:
    async with administered(fake_config(tmp_path), {"scheduler": "DiesWhenAsked"}, tmp_path) as (running, client):
        with pytest.raises(AdminError, match="scheduler:0 ended before it answered"):
            await client.ask(GetCaches(), CachesReply)
        await running.until_ready(2)
        with pytest.raises(AdminError, match="this actor knows nothing of that"):
            await client.ask(GetCaches(), CachesReply)


async def test_any_actor_is_profiled_by_its_stacks(tmp_path: Path) -> None:
    config = fake_config(tmp_path)
    admin = AdminOptions(profile_directory=str(tmp_path / "profiles"))
    config = Config(model=config.model, server=config.server, supervision=config.supervision, admin=admin)
    async with administered(config, {"media": "Recorder"}, tmp_path) as (_, client):
        begun = await client.ask(BeginProfile("media:0", 60.0), ProfileReply)
        with pytest.raises(AdminError, match="a profile is being made already"):
            await client.ask(BeginProfile("media:0", 60.0), ProfileReply)
        ended = await client.ask(EndProfile("media:0"), ProfileReply)
    path = Path(begun.profile.path)
    lines = (await asyncio.to_thread(path.read_text)).splitlines()
    assert ended.profile.path == begun.profile.path
    assert path.parent == tmp_path / "profiles"
    assert path.name.startswith("media-0-")
    assert all(line.rpartition(" ")[2].isdigit() for line in lines)


async def test_a_service_file_says_what_a_service_is(tmp_path: Path) -> None:
    async with administered(fake_config(tmp_path), {"edge": "Recorder"}, tmp_path) as (running, _):
        assert running.supervisor.run_dir is not None
        text = await asyncio.to_thread((running.supervisor.run_dir / "service.json").read_text)
    written = json.loads(text)
    assert written["model"] == "fake"
    assert written["admin"] == [f"ipc://{running.supervisor.run_dir}/admin.sock"]
