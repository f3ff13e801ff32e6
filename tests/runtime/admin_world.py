"""An admin server in the test's event loop: a real socket and desk, and actors played by the test."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.support import make_config
from vlmrt.runtime.admin import AdminServer
from vlmrt.runtime.admin_desk import AdminDesk
from vlmrt.runtime.admin_keys import ServerKeys
from vlmrt.runtime.asks import Asks
from vlmrt.runtime.config import Config, SupervisionOptions
from vlmrt.runtime.control_messages import AdminAnswer, AdminAsk, LlmReady, MetricsSnapshot
from vlmrt.runtime.messages import ActorName, Epoch
from vlmrt.runtime.metrics import Metrics
from vlmrt.runtime.process_table import ProcessTable
from vlmrt.runtime.questions import (
    AnswerRow,
    AnswersOpen,
    CachesShown,
    Cancelled,
    CancelRequest,
    Done,
    EmptyCaches,
    Finding,
    FindTimeline,
    ListRequests,
    Profiling,
    Question,
    RequestRow,
    RequestsOpen,
    SetLogLevel,
    ShowCaches,
    StartProfile,
    StopProfile,
    TimelineFound,
)
from vlmrt.runtime.timeline import Timeline
from vlmrt.runtime.topology import actor_specs
from vlmrt.runtime.transport import admin_address, new_context

URL = "http://127.0.0.1:8000"


class FakeHandle:
    """A process that only has a pid."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def kill(self) -> None: ...

    async def wait(self) -> int:
        return 0


class AdminWorld:
    """What runs, and what its actors find.  `asked` holds all that they were asked."""

    def __init__(self, run_dir: Path, config: Config | None = None) -> None:
        self.config = config or make_config(supervision=SupervisionOptions(heartbeat_s=0.05))
        self.run_dir = run_dir
        self.metrics = Metrics()
        self.table = ProcessTable.of(actor_specs(self.config))
        for number, process in enumerate(self.table):
            process.begin(Epoch(1), "", FakeHandle(4000 + number), 0.0)
            process.capabilities = LlmReady(8)  # of no interest here; without, it would not be up
            process.is_up, process.state = True, "ready"
        self.asked: list[tuple[str, Question]] = []
        self.open_answers: list[AnswerRow] = []
        self.requests: list[RequestRow] = []
        self.timelines: dict[str, Timeline] = {}
        self.silent: set[str] = set()  # actors that answer nothing
        self.deaf: set[str] = set()  # actors whose channel is full
        self.stops: list[str] = []
        self.num_announced = 0
        self.now_s = 1000.0
        self.asks = Asks(self.table, self._send)
        self.desk = AdminDesk(
            self.config, self.table, self.asks, url=URL, announce=self._announce, request_stop=self.stops.append
        )
        self.server: AdminServer | None = None
        self._context = new_context()

    @property
    def address(self) -> str:
        return admin_address(self.run_dir)

    def start(self, tcp_address: str | None = None, keys: ServerKeys | None = None) -> None:
        self.server = AdminServer(self._context, self.desk, self.metrics, self.address, tcp_address, keys)

    def stop(self) -> None:
        """As a supervisor that ends; `start` begins another at the same address."""
        if self.server is not None:
            self.server.close()
            self.server = None

    def close(self) -> None:
        self.desk.close()
        self.stop()
        self._context.destroy(0)

    def beat(self, seconds: float = 0.5) -> None:
        """A heartbeat's status."""
        self.now_s += seconds
        for process in self.table:
            process.last_heartbeat_s = self.now_s - 0.1
        status = self.table.status(self.now_s, True, uptime_s=self.now_s - 1000.0, draining=self.desk.draining)
        self.desk.update(status)

    def count(self, actor: str, fill: Callable[[Metrics], None]) -> None:
        """Metrics of an actor, from its next heartbeat on."""
        metrics = Metrics()
        fill(metrics)
        self.set_metrics(actor, metrics.snapshot())

    def set_metrics(self, actor: str, snapshot: MetricsSnapshot) -> None:
        self.table.processes[ActorName(actor)].live_metrics = snapshot

    def bad_frames(self) -> float:
        return self.metrics.snapshot().counters.get("bad_frames_total", 0.0)

    def finding(self, actor: str, question: Question) -> Finding:
        """What a well-behaved actor of this kind finds."""
        match question:
            case ListRequests() if actor.startswith("edge"):
                return AnswersOpen(tuple(self.open_answers), len(self.open_answers))
            case ListRequests():
                return RequestsOpen(tuple(self.requests), len(self.requests))
            case CancelRequest():
                before = len(self.open_answers)
                self.open_answers = [row for row in self.open_answers if question.id not in (row.label, row.answer_id)]
                return Cancelled(before - len(self.open_answers))
            case FindTimeline():
                return TimelineFound(self.timelines.get(question.id))
            case ShowCaches() | EmptyCaches():
                return CachesShown((), (), 0)
            case SetLogLevel():
                return Done()
            case StartProfile():
                return Profiling(question.path + ".folded", question.seconds)
            case StopProfile():
                return Profiling("/somewhere.folded", 0.0)

    def _announce(self) -> None:
        self.num_announced += 1

    def _send(self, actor: ActorName, epoch: Epoch, ask: AdminAsk) -> bool:
        if actor in self.deaf:
            return False
        self.asked.append((actor, ask.question))
        if actor not in self.silent:
            answer = AdminAnswer(ask.ask_id, self.finding(actor, ask.question))
            asyncio.get_running_loop().call_soon(self.asks.take, actor, epoch, answer)
        return True


@asynccontextmanager
async def admin_world(run_dir: Path, config: Config | None = None, **start: Any) -> AsyncIterator[AdminWorld]:
    """Started, with a first status."""
    level = logging.getLogger().level
    world = AdminWorld(run_dir, config)
    try:
        world.start(**start)
        world.beat()
        yield world
    finally:
        logging.getLogger().setLevel(level)
        world.close()


def open_answer(label: str, answer_id: str = "", *request_ids: str, age_s: float = 1.0) -> AnswerRow:
    return AnswerRow(label, answer_id, "/v1/chat/completions", age_s, request_ids, True)


def running_request(request_id: str, **fields: Any) -> RequestRow:
    values: dict[str, Any] = {
        "status": "running",
        "num_prompt_tokens": 100,
        "num_computed_tokens": 100,
        "num_cached_tokens": 0,
        "num_output_tokens": 5,
        "max_tokens": 64,
        "num_images": 1,
        "num_rows": 64,
        "num_wanted": 0,
        "priority": 0,
    }
    return RequestRow(request_id, **{**values, **fields})
