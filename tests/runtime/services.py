"""Services of fake actors: in the test's own event loop, or under a supervisor process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from vlmrt.runtime import gpu_sharing, sweeper
from vlmrt.runtime.config import Config, ModelOptions, ParallelOptions, ServerOptions, SupervisionOptions
from vlmrt.runtime.control_messages import Capabilities
from vlmrt.runtime.messages import ActorName, Epoch
from vlmrt.runtime.process_table import Process
from vlmrt.runtime.spawner import Spawner
from vlmrt.runtime.supervisor import Supervisor
from vlmrt.runtime.topology import ActorKind, ActorSpec, actor_specs

FAKES = "tests.runtime.fake_actors:"
ROOT = Path(__file__).parents[2]
DEADLINE_S = 45.0  # a shared machine may be slow; nothing waits that long unless it fails
FAKE_CLIENT = "import sys; print('ready', flush=True); sys.stdin.read()"  # of the MPS daemon
NUM_FAKE_GPUS = 2  # where a config says cuda; no fake opens one
SHARED_MEMORY = Path("/dev/shm")


def fake_config(
    events: Path, *, port: int = 0, tp: int = 1, parallel: ParallelOptions | None = None, **supervision: Any
) -> Config:
    """Quick heartbeats; the fakes write their events into this folder."""
    options = {"heartbeat_s": 0.05, "heartbeat_timeout_s": 60.0, "start_timeout_s": 60.0, "shutdown_grace_s": 1.0}
    return Config(
        model=ModelOptions(directory="", served_names=("fake",), chat_template=str(events)),
        server=ServerOptions(port=port),
        parallel=parallel or ParallelOptions(tp=tp),
        supervision=SupervisionOptions(**{**options, **supervision}),
    )


def fake_specs(config: Config, fakes: dict[ActorKind, str]) -> tuple[ActorSpec, ...]:
    """Only the kinds named, run by these classes of fake_actors.py."""
    factories: dict[ActorKind, str] = dict.fromkeys(("edge", "media", "scheduler", "vit", "llm"), FAKES + "Recorder")
    factories.update({kind: FAKES + fake for kind, fake in fakes.items()})
    specs = actor_specs(config, num_gpus=NUM_FAKE_GPUS, factories=factories)
    return tuple(spec for spec in specs if spec.kind in fakes)


class RecordingObserver:
    """Keeps what the supervisor tells as tuples."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def progress(self, actor: ActorName, stage: str, done: int, total: int) -> None:
        self.told.append(("progress", actor, stage, done, total))

    def actor_up(self, actor: ActorName, epoch: Epoch, capabilities: Capabilities) -> None:
        self.told.append(("up", actor, epoch))

    def actor_down(self, actor: ActorName, epoch: Epoch, reason: str) -> None:
        self.told.append(("down", actor, epoch, reason))

    def restarting(self, actor: ActorName, epoch: Epoch, delay_s: float) -> None:
        self.told.append(("restarting", actor, epoch, delay_s))

    def gpu_sharing(self, how: str) -> None:
        self.told.append(("sharing", how))

    def ready(self, url: str, start_s: float) -> None:
        self.told.append(("ready", url))

    def stopping(self, reason: str) -> None:
        self.told.append(("stopping", reason))

    def failed(self, message: str) -> None:
        self.told.append(("failed", message))

    def of(self, what: str) -> list[tuple[Any, ...]]:
        return [entry for entry in self.told if entry[0] == what]


class Service:
    """A supervisor in this event loop."""

    def __init__(
        self, config: Config, fakes: dict[ActorKind, str], events: Path, spawner: Spawner | None = None
    ) -> None:
        self.observer = RecordingObserver()
        specs = fake_specs(config, fakes)
        self.supervisor = Supervisor(config, self.observer, specs=specs, spawner=spawner, handle_signals=False)
        self.events = events
        self.ended = asyncio.create_task(self.supervisor.run())

    def lines(self, actor: str) -> list[str]:
        """What that actor has noted, each line beginning with its epoch."""
        return read_events(self.events, actor)

    def process(self, actor: str) -> Process:
        return self.supervisor._table.processes[ActorName(actor)]

    def pid(self, actor: str) -> int:
        handle = self.process(actor).handle
        assert handle is not None
        return handle.pid

    async def until(self, condition: Callable[[], bool], what: str = "the condition") -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert not self.ended.done(), f"the service ended before {what}: {self.observer.told}"
            assert time.monotonic() < deadline, f"{what} did not come: {self.observer.told}"
            await asyncio.sleep(0.005)

    async def until_line(self, actor: str, line: str, count: int = 1) -> None:
        await self.until(lambda: self.lines(actor).count(line) >= count, f"{actor}: {line}")

    async def until_ready(self, count: int = 1) -> None:
        await self.until(lambda: len(self.observer.of("ready")) >= count, "ready")


@asynccontextmanager
async def service(
    config: Config, fakes: dict[ActorKind, str], events: Path, spawner: Spawner | None = None
) -> AsyncIterator[Service]:
    """Started; stopped at the end if it still runs.  Nothing may be left of it."""
    others = set(children_of(os.getpid()))  # multiprocessing keeps a tracker for as long as this process lives
    running = Service(config, fakes, events, spawner)
    try:
        while not running.supervisor._table.processes and not running.ended.done():  # noqa: ASYNC110 - a few turns
            await asyncio.sleep(0)
        yield running
    finally:
        if not running.ended.done():
            running.supervisor.request_stop()
        await asyncio.wait_for(running.ended, DEADLINE_S)
    run_dir = running.supervisor.run_dir
    assert run_dir is None or not run_dir.exists()
    assert set(children_of(os.getpid())) <= others


def read_events(events: Path, actor: str) -> list[str]:
    path = events / f"{actor.replace(':', '-')}.events"
    return path.read_text().splitlines() if path.exists() else []


def children_of(pid: int) -> list[psutil.Process]:
    return list(psutil.Process(pid).children(recursive=True))


def daemons(run_root: Path) -> list[int]:
    """Pids of MPS daemons of services whose run directories lie there."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(sweeper.MPS_VARIABLE, "").startswith(str(run_root)):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


class LeftBehind:
    """Finds what a service leaves: processes, files in the folder of its run directory, names in /dev/shm."""

    def __init__(self, run_root: Path, children: list[psutil.Process], shared_before: set[Path]) -> None:
        self._run_root = run_root
        self._children = children
        self._shared_before = shared_before

    def after(self, limit_s: float) -> list[str]:
        """What is still there when the time is up; empty as soon as nothing is."""
        deadline = time.monotonic() + limit_s
        while (left := self._now()) and time.monotonic() < deadline:
            time.sleep(0.005)
        return left

    def _now(self) -> list[str]:
        alive = [child for child in self._children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        shared = set(SHARED_MEMORY.iterdir()) - self._shared_before
        return [*map(str, alive), *map(str, self._run_root.iterdir()), *map(str, shared)]


def start_service_process(events: Path, fakes: dict[ActorKind, str], **environment: str) -> subprocess.Popen[str]:
    """A supervisor of its own, with signal handlers; prints what its observer is told."""
    arguments = [f"{kind}={fake}" for kind, fake in fakes.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.runtime.services", str(events), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": tempfile.gettempdir(), "PYTHONUNBUFFERED": "1", **environment},
    )


def read_until(process: subprocess.Popen[str], word: str) -> str:
    """Its output up to the first line with this word; pytest's time limit is the deadline."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if word in line:
            return text
    raise AssertionError(f"ended without {word!r}: {text}")


class _PrintingObserver(RecordingObserver):
    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name in ("told", "of") or name.startswith("_"):
            return value

        def tell(*arguments: Any) -> None:
            print(name, *arguments)

        return tell


def main() -> int:
    events = Path(sys.argv[1])
    fakes: Any = dict(argument.split("=") for argument in sys.argv[2:])
    parallel = None
    if os.environ.get("FAKE_GPUS"):
        parallel = ParallelOptions(device="cuda", dtype="bfloat16", num_vits=NUM_FAKE_GPUS)
        gpu_sharing.CLIENT = FAKE_CLIENT
    config = fake_config(events, parallel=parallel, shutdown_grace_s=100.0)
    return asyncio.run(Supervisor(config, _PrintingObserver(), specs=fake_specs(config, fakes)).run())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
