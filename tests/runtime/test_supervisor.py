"""Real processes of fake actors: start, links, losses, restarts, ends."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.runtime import services
from tests.runtime.services import (
    DEADLINE_S,
    SHARED_MEMORY,
    LeftBehind,
    RecordingObserver,
    Service,
    children_of,
    fake_config,
    read_events,
    read_until,
    service,
    start_service_process,
)
from vlmrt.runtime.spawner import LocalSpawner, ProcessHandle, ProcessSpec
from vlmrt.runtime.topology import ActorKind

pytestmark = pytest.mark.usefixtures("run_root")


def run_files(running: Service) -> list[Path]:
    assert running.supervisor.run_dir is not None
    return list(running.supervisor.run_dir.iterdir())


async def test_two_actors_are_linked_and_messages_flow_both_ways(tmp_path: Path) -> None:
    async with service(fake_config(tmp_path), {"edge": "Pinger", "scheduler": "Ponger"}, tmp_path) as running:
        await running.until_line("edge:0", "1 pong ping-1 from scheduler:0")
        assert "1 up edge:0 1" in running.lines("scheduler:0")
        assert ("progress", "edge:0", "loading", 1, 1) in running.observer.told
        await running.until_line("edge:0", "1 status ready=True stale=0")
    assert await running.ended == 0
    assert running.lines("edge:0")[-1] == running.lines("scheduler:0")[-1] == "1 stop"
    assert running.observer.of("down") == []


async def test_a_killed_actor_is_announced_down_and_comes_back_with_the_next_epoch(tmp_path: Path) -> None:
    async with service(fake_config(tmp_path), {"edge": "Pinger", "scheduler": "Ponger"}, tmp_path) as running:
        await running.until_line("edge:0", "1 pong ping-1 from scheduler:0")
        os.kill(running.pid("scheduler:0"), signal.SIGKILL)
        await running.until_line("edge:0", "1 pong ping-2 from scheduler:0")
        lines = running.lines("edge:0")
        assert lines.index("1 down scheduler:0 1") < lines.index("1 up scheduler:0 2")
        assert "1 status ready=False stale=0" in lines
        await running.until_line("scheduler:0", "2 up edge:0 1")
        await running.until_ready(2)
        status = running.supervisor._table.status(time.monotonic(), ready=True)
        scheduler = next(actor for actor in status.actors if actor.actor == "scheduler:0")
        assert (scheduler.epoch, scheduler.num_restarts, scheduler.state) == (2, 1, "ready")
        sockets = sorted(path.name for path in run_files(running) if path.suffix == ".sock")
        assert sockets == ["admin.sock", "control.sock", "edge-0.1.sock", "memory.sock", "scheduler-0.2.sock"]
        assert any("killed by SIGKILL" in entry[3] for entry in running.observer.of("down"))


async def test_counters_of_dead_incarnations_stay_in_the_totals(tmp_path: Path) -> None:
    async with service(fake_config(tmp_path), {"edge": "Pinger", "scheduler": "Ponger"}, tmp_path) as running:

        def preemptions() -> float:
            status = running.supervisor._table.status(time.monotonic(), ready=True)
            return status.metrics["scheduler:0"].counters.get("preemptions_total", 0.0)

        await running.until(lambda: preemptions() == 1.0)
        os.kill(running.pid("scheduler:0"), signal.SIGKILL)
        await running.until(lambda: preemptions() == 2.0)


async def test_all_ranks_restart_when_one_dies_and_are_announced_together(tmp_path: Path) -> None:
    async with service(fake_config(tmp_path, tp=2), {"scheduler": "Recorder", "llm": "Recorder"}, tmp_path) as running:
        await running.until_line("scheduler:0", "1 up llm:1 1")
        before = [running.pid(name) for name in ("llm:0", "llm:1")]
        os.kill(before[1], signal.SIGKILL)
        await running.until_line("scheduler:0", "1 up llm:1 2")
        lines = [line for line in running.lines("scheduler:0") if "llm" in line]
        assert sorted(lines[2:4]) == ["1 down llm:0 1", "1 down llm:1 1"]
        assert sorted(lines[4:6]) == ["1 up llm:0 2", "1 up llm:1 2"]
        after = [running.pid(name) for name in ("llm:0", "llm:1")]
        assert not set(before) & set(after)
        assert not any(psutil.pid_exists(pid) for pid in before)


async def test_messages_of_a_dead_incarnation_are_dropped_and_counted(tmp_path: Path) -> None:
    async with service(fake_config(tmp_path), {"edge": "Stream", "scheduler": "Deaf"}, tmp_path) as running:
        await running.until_line("scheduler:0", "1 got from-1", 5)
        scheduler = running.pid("scheduler:0")
        os.kill(scheduler, signal.SIGSTOP)
        channel = running.process("edge:0")
        sent_before = channel.last_heartbeat_s
        await running.until(lambda: channel.last_heartbeat_s > sent_before + 0.2, "a stretch of stream")
        os.kill(running.pid("edge:0"), signal.SIGKILL)
        await running.until(lambda: channel.epoch == 2 and channel.is_up, "edge:0 epoch 2")
        num_seen = len(running.lines("scheduler:0"))
        os.kill(scheduler, signal.SIGCONT)
        await running.until_line("scheduler:0", "1 got from-2", 5)
        news = running.lines("scheduler:0")[num_seen:]
        assert "1 down edge:0 1" in news
        assert "1 got from-1" not in news[news.index("1 down edge:0 1") :]
        counters = running.process("scheduler:0")
        await running.until(lambda: counters.live_metrics.counters.get("stale_messages_total", 0) > 0, "the count")


async def test_an_actor_that_raises_dies_whole_and_is_restarted(tmp_path: Path) -> None:
    async with service(fake_config(tmp_path), {"edge": "Pinger", "scheduler": "Crasher"}, tmp_path) as running:
        await running.until_line("edge:0", "1 up scheduler:0 2")
        assert any(entry[1] == "scheduler:0" and "exit code 70" in entry[3] for entry in running.observer.of("down"))


async def test_too_many_restarts_end_the_service_with_one_line(tmp_path: Path) -> None:
    config = fake_config(tmp_path, max_restarts=2)
    async with service(config, {"edge": "Recorder", "scheduler": "DiesOnceUp"}, tmp_path) as running:
        assert await asyncio.wait_for(running.ended, DEADLINE_S) == 1
    ((_, message),) = running.observer.of("failed")
    assert "scheduler:0 ended more than 2 times within 60 s (supervision.max_restarts)" in message
    assert "exit code 9" in message
    assert "\n" not in message
    delays = [entry[3] for entry in running.observer.of("restarting")]
    assert delays == sorted(delays)
    assert len([line for line in running.lines("scheduler:0") if "born" in line]) == 3


async def test_a_start_that_fails_ends_the_service_at_once_with_its_line(tmp_path: Path) -> None:
    async with service(fake_config(tmp_path), {"scheduler": "NeverReady", "vit": "Unstartable"}, tmp_path) as running:
        assert await asyncio.wait_for(running.ended, DEADLINE_S) == 1
    assert running.observer.of("failed") == [("failed", "the checkpoint at --model has no weights")]
    assert running.observer.of("restarting") == []


async def test_a_death_during_the_first_start_ends_the_service(tmp_path: Path) -> None:
    async with service(fake_config(tmp_path), {"scheduler": "Missing"}, tmp_path) as running:
        assert await asyncio.wait_for(running.ended, DEADLINE_S) == 1
    ((_, message),) = running.observer.of("failed")
    assert "scheduler:0 ended during its start (exit code 70)" in message


class Refuser(LocalSpawner):
    """Cannot spawn these incarnations."""

    def __init__(self, *refused: str) -> None:
        self._refused = refused

    def spawn(self, spec: ProcessSpec) -> ProcessHandle:
        if f"{spec.actor.name} {spec.epoch}" in self._refused:
            raise OSError(errno.EAGAIN, "planted")
        return super().spawn(spec)


@pytest.mark.parametrize("refused", ["llm:0 1", "llm:1 1"])
async def test_a_first_incarnation_that_cannot_be_spawned_ends_the_service_with_one_line(
    refused: str, tmp_path: Path
) -> None:
    config = fake_config(tmp_path, tp=2)
    async with service(config, {"scheduler": "Recorder", "llm": "Recorder"}, tmp_path, Refuser(refused)) as running:
        assert await asyncio.wait_for(running.ended, DEADLINE_S) == 1
    reason = f"llm cannot be spawned: [Errno {errno.EAGAIN}] planted"
    assert running.observer.of("failed") == [("failed", reason)]
    assert [entry[1] for entry in running.observer.of("down")] == (["llm:0"] if refused == "llm:1 1" else [])


async def test_a_later_incarnation_that_cannot_be_spawned_is_tried_again(tmp_path: Path) -> None:
    fakes: dict[ActorKind, str] = {"edge": "Recorder", "scheduler": "Recorder"}
    async with service(fake_config(tmp_path), fakes, tmp_path, Refuser("scheduler:0 2")) as running:
        await running.until_ready()
        os.kill(running.pid("scheduler:0"), signal.SIGKILL)
        await running.until_ready(2)
        assert running.process("scheduler:0").epoch == 3
        assert [entry[2] for entry in running.observer.of("down")] == [1]
    assert [line for line in running.lines("edge:0") if "down" in line] == ["1 down scheduler:0 1"]


async def test_a_process_that_cannot_be_watched_is_not_left_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(pid: int) -> int:
        raise OSError(errno.EMFILE, "planted")

    monkeypatch.setattr(os, "pidfd_open", full)
    async with service(fake_config(tmp_path), {"scheduler": "Recorder"}, tmp_path) as running:
        assert await asyncio.wait_for(running.ended, DEADLINE_S) == 1
    ((_, message),) = running.observer.of("failed")
    assert "scheduler:0 cannot be spawned" in message


async def test_an_actor_that_is_never_ready_hits_the_start_deadline(tmp_path: Path) -> None:
    config = fake_config(tmp_path, start_timeout_s=1.5)
    began = time.monotonic()
    async with service(config, {"vit": "NeverReady"}, tmp_path) as running:
        assert await asyncio.wait_for(running.ended, DEADLINE_S) == 1
    assert time.monotonic() - began >= 0.9 * 1.5
    ((_, message),) = running.observer.of("failed")
    assert message == "vit:0 not ready after 1.5 s (--start-timeout-s)"


async def test_an_actor_without_heartbeats_is_killed_and_replaced(tmp_path: Path) -> None:
    config = fake_config(tmp_path, heartbeat_timeout_s=2.0)
    async with service(config, {"scheduler": "Recorder"}, tmp_path) as running:
        await running.until_ready()
        os.kill(running.pid("scheduler:0"), signal.SIGSTOP)
        await running.until_ready(2)
        _, _, epoch, reason = running.observer.of("down")[0]
        assert epoch == 1
        assert "no heartbeat for 2 s (supervision.heartbeat_timeout_s)" in reason


async def test_heartbeats_go_on_while_a_thread_loads(tmp_path: Path) -> None:
    config = fake_config(tmp_path)
    async with service(config, {"scheduler": "SlowLoader"}, tmp_path) as running:
        scheduler = running.process("scheduler:0")
        await running.until(lambda: scheduler.said_hello, "Hello")
        beats: list[float] = []

        def loaded() -> bool:
            beats.append(scheduler.last_heartbeat_s)
            return scheduler.is_up

        await running.until(loaded, "ready")
        assert len(set(beats)) >= 3


async def test_an_observer_that_raises_ends_the_service_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError("planted")

    monkeypatch.setattr(RecordingObserver, "actor_up", broken)
    async with service(fake_config(tmp_path), {"edge": "Recorder", "scheduler": "Recorder"}, tmp_path) as running:
        assert await asyncio.wait_for(running.ended, DEADLINE_S) == 1
    assert running.observer.of("failed") == [("failed", "internal error: BrokenPipeError('planted')")]


async def test_an_edge_still_gets_its_answers_while_it_stops(tmp_path: Path) -> None:
    async with service(fake_config(tmp_path), {"edge": "Drainer", "scheduler": "Ponger"}, tmp_path) as running:
        await running.until_line("edge:0", "1 up scheduler:0 1")
        running.supervisor.request_stop()
        assert await asyncio.wait_for(running.ended, DEADLINE_S) == 0
    lines = [line for line in running.lines("edge:0") if " status " not in line]  # those come whenever one is due
    assert lines[-3:] == ["1 stop", "1 message TokenBatch from scheduler:0", "1 drained"]


async def test_sigusr1_writes_every_stack_and_harms_nobody(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async with service(fake_config(tmp_path), {"scheduler": "Recorder"}, tmp_path) as running:
        await running.until_ready()
        os.kill(running.pid("scheduler:0"), signal.SIGUSR1)
        text = ""

        def has_stack() -> bool:
            nonlocal text
            text += capfd.readouterr().err
            # without "Current": the kernel may give the signal to a thread that is not Python's
            return "(most recent call first)" in text and "process.py" in text

        await running.until(has_stack, "a stack")
        assert running.process("scheduler:0").num_restarts == 0


async def test_a_port_in_use_is_an_error_before_any_process_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with service(fake_config(tmp_path, port=port), {"edge": "Recorder"}, tmp_path) as running:
            assert await running.ended == 1
    ((_, message),) = running.observer.of("failed")
    assert f"--port {port}" in message
    assert running.lines("edge:0") == []


async def test_the_descriptor_server_refuses_foreign_names_and_sizes(tmp_path: Path) -> None:
    async with service(fake_config(tmp_path), {"media": "MemoryUser"}, tmp_path) as running:
        await running.until_ready()
        lines = running.lines("media:0")
        assert "1 created 8192" in lines
        refused = [line for line in lines if line.startswith("1 refused")]
        assert [line.rpartition(": ")[2].split(" ")[0] for line in refused] == ["it", "the", "the", str(1 << 50)]
        assert any(line.startswith("1 missing") and "no such memory" in line for line in lines)
        stranger = running.supervisor._memory.answer(os.getpid(), b"\x93\xa4open\xb1arena/media:0/1..\x00")
        reply, descriptor = await stranger
        assert descriptor is None
        assert "no actor" in reply.error
        os.kill(running.pid("media:0"), signal.SIGKILL)
        await running.until_ready(2)
        assert list(running.supervisor._memory._held) == ["arena/media:0/2"]


async def test_only_edges_inherit_the_listening_socket_and_nothing_else_listens_on_tcp(tmp_path: Path) -> None:
    async with service(fake_config(tmp_path), {"edge": "Recorder", "scheduler": "Recorder"}, tmp_path) as running:
        await running.until_ready()

        def listening(actor: str) -> list[int]:
            connections = psutil.Process(running.pid(actor)).net_connections(kind="inet")
            return [connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN]

        assert [f":{port}" for port in listening("edge:0")] == [
            running.supervisor.url[running.supervisor.url.rindex(":") :]
        ]
        assert listening("scheduler:0") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_service_process_cleanly(number: signal.Signals, tmp_path: Path) -> None:
    with start_service_process(tmp_path, {"edge": "Recorder", "scheduler": "Recorder"}) as process:
        read_until(process, "ready")
        children = children_of(process.pid)
        process.send_signal(number)
        output = read_until(process, "stopping")
        assert f"got {number.name}" in output
        assert process.wait(DEADLINE_S) == 0
    assert not any(child.is_running() for child in children)
    assert read_events(tmp_path, "edge:0")[-1] == "1 stop"


def test_signals_to_children_are_ignored(tmp_path: Path) -> None:
    with start_service_process(tmp_path, {"edge": "Recorder"}) as process:
        read_until(process, "ready")
        for child in children_of(process.pid):
            child.send_signal(signal.SIGINT)
            child.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    assert read_events(tmp_path, "edge:0")[-1] == "1 stop"


def test_killing_the_supervisor_leaves_no_process_no_run_dir_and_no_shared_memory(
    tmp_path: Path, run_root: Path
) -> None:
    shared_before = set(SHARED_MEMORY.iterdir())
    fakes: dict[ActorKind, str] = {"edge": "Recorder", "media": "MemoryUser", "scheduler": "Forker"}
    with start_service_process(tmp_path, fakes) as process:
        read_until(process, "ready")
        children = children_of(process.pid)
        assert len(children) == 5  # three actors, a grandchild in a session of its own, and the sweeper
        process.kill()
        process.wait()
        assert LeftBehind(run_root, children, shared_before).after(DEADLINE_S) == []


def test_killing_the_supervisor_while_actors_start_leaves_nothing(tmp_path: Path, run_root: Path) -> None:
    with start_service_process(tmp_path, {"edge": "NeverReady", "vit": "NeverReady"}) as process:
        deadline = time.monotonic() + 20
        while len(children := children_of(process.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert LeftBehind(run_root, children, set(SHARED_MEMORY.iterdir())).after(DEADLINE_S) == []


def test_the_leak_check_finds_planted_leaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, shared_memory = tmp_path / "root", tmp_path / "shm"  # not /dev/shm: a test beside this one would find it
    root.mkdir()
    shared_memory.mkdir()
    monkeypatch.setattr(services, "SHARED_MEMORY", shared_memory)
    with subprocess.Popen(["sleep", "60"]) as bystander:
        try:
            assert LeftBehind(root, [psutil.Process(bystander.pid)], set()).after(0.05) != []
        finally:
            bystander.kill()
    (root / "vlmrt-left").mkdir()
    assert LeftBehind(root, [], set()).after(0.05) == [str(root / "vlmrt-left")]
    (root / "vlmrt-left").rmdir()
    assert LeftBehind(root, [], set()).after(0.05) == []
    planted = shared_memory / "vlmrt-test"
    planted.touch()
    assert LeftBehind(root, [], set()).after(0.05) == [str(planted)]


async def test_a_killed_sweeper_is_replaced(tmp_path: Path) -> None:
    async with service(fake_config(tmp_path), {"scheduler": "Recorder"}, tmp_path) as running:
        await running.until_ready()
        first = running.supervisor._sweeper
        first.kill()
        await running.until(lambda: running.supervisor._sweeper is not first, "another sweeper")


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with start_service_process(tmp_path, {"scheduler": "NeverStops"}) as process:
        read_until(process, "ready")
        process.send_signal(signal.SIGTERM)
        read_until(process, "stopping")
        process.send_signal(signal.SIGTERM)  # the first one gives 100 s of grace
        assert process.wait(DEADLINE_S) == 0
