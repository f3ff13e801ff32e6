"""What the supervisor does for `vlmrt admin`: each request answered by what is known, or by asking actors."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import assert_never

from msgspec import structs

import vlmrt
from vlmrt.runtime.admin_messages import (
    AdminReply,
    AdminRequest,
    BeginDrain,
    BeginProfile,
    CachesReply,
    CancelOne,
    CancelReply,
    ConfigReply,
    DrainReply,
    EndDrain,
    EndProfile,
    GetCaches,
    GetConfig,
    GetDrain,
    GetRequests,
    GetStats,
    GetTrace,
    LevelReply,
    ProfileReply,
    Refused,
    RequestsReply,
    ResetCaches,
    SetLevel,
    StatsReply,
    TraceReply,
)
from vlmrt.runtime.asks import Asks
from vlmrt.runtime.config import Config
from vlmrt.runtime.config_shown import config_values
from vlmrt.runtime.control import SUPERVISOR
from vlmrt.runtime.control_messages import ServiceStatus
from vlmrt.runtime.messages import ActorName
from vlmrt.runtime.process_table import ProcessTable
from vlmrt.runtime.questions import (
    AnswersOpen,
    CachesShown,
    Cancelled,
    CancelRequest,
    Done,
    EmptyCaches,
    Finding,
    FindTimeline,
    ListRequests,
    LogLevel,
    Profiling,
    Question,
    RequestsOpen,
    SetLogLevel,
    ShowCaches,
    StartProfile,
    StopProfile,
    TimelineFound,
    Unable,
)
from vlmrt.runtime.request_rows import merge_requests
from vlmrt.runtime.service_stats import StatsHistory
from vlmrt.runtime.topology import ActorKind

SCHEDULER = ActorName("scheduler:0")
PROFILE_TIMEOUT_S = 120.0  # what was recorded on a GPU takes long to write
DRAIN_MARGIN_S = 30.0  # beyond what any open request may take

logger = logging.getLogger(__name__)


class AdminDesk:
    """Answers requests.

    Args: `url` says where the service listens; `announce` tells edges of the service's state at once; `request_stop`
    begins the end of the service.
    """

    def __init__(
        self,
        config: Config,
        table: ProcessTable,
        asks: Asks,
        *,
        url: str,
        announce: Callable[[], None],
        request_stop: Callable[[str], None],
    ) -> None:
        self._config = config
        self._table = table
        self._asks = asks
        self._url = url
        self._announce = announce
        self._request_stop = request_stop
        self._history = StatsHistory()
        self._stats: StatsReply | None = None
        self._requests = AtMostOnce(config.supervision.heartbeat_s, self._list_requests)
        self._log_levels: dict[ActorName, LogLevel] = {}  # of actors for which another than the config's was asked
        self.draining = False
        self._stopper: asyncio.Task[None] | None = None

    def update(self, status: ServiceStatus) -> None:
        """The service's state now, once a heartbeat."""
        self._history.add(status)
        self._stats = None

    def config_of(self, actor: ActorName) -> Config:
        """What its next incarnation is given."""
        level = self._log_levels.get(actor)
        return self._config if level is None else structs.replace(self._config, log_level=level)

    def close(self) -> None:
        if self._stopper is not None:
            self._stopper.cancel()

    # ------------------------------------------------------------ requests

    def stats(self) -> StatsReply | Refused:
        """Counted at most once a heartbeat, however many ask."""
        if self._stats is None:
            stats = self._history.stats()
            if stats is None:
                return Refused("the service has just begun; try again")
            name = self._config.model.served_names[0]
            self._stats = StatsReply(stats, name, self._url, os.getpid(), vlmrt.__version__)
        return self._stats

    async def reply(self, request: AdminRequest) -> AdminReply:
        """To any request; what an actor cannot do is Refused."""
        match request:
            case GetStats():
                return self.stats()
            case GetRequests():
                return await self._requests.get()
            case CancelOne():
                return await self._cancel(request.id)
            case GetCaches():
                return _caches_reply(await self._asks.ask(SCHEDULER, ShowCaches()))
            case ResetCaches():
                return _caches_reply(await self._asks.ask(SCHEDULER, EmptyCaches(request.kinds)))
            case BeginDrain():
                return await self._drain(stop=request.stop)
            case EndDrain():
                return await self._undrain()
            case GetDrain():
                return await self._drain_state()
            case GetTrace():
                return await self._trace(request.id)
            case GetConfig():
                return ConfigReply(config_values(self._config), self._config.origins)
            case SetLevel():
                return await self._set_level(request)
            case BeginProfile():
                return await self._profile(request.actor, self._start_profile(request))
            case EndProfile():
                return await self._profile(request.actor, StopProfile())
            case _:
                assert_never(request)

    async def _list_requests(self) -> RequestsReply:
        edges, scheduler = await asyncio.gather(
            self._ask_all("edge", ListRequests()), self._asks.ask(SCHEDULER, ListRequests())
        )
        answers = {edge: found for edge, found in edges.items() if isinstance(found, AnswersOpen)}
        return merge_requests(answers, scheduler if isinstance(scheduler, RequestsOpen) else None)

    async def _cancel(self, id: str) -> AdminReply:
        findings = await self._ask_all("edge", CancelRequest(id))
        num_answers = sum(found.num_answers for found in findings.values() if isinstance(found, Cancelled))
        if not num_answers:
            silent = [found.message for found in findings.values() if isinstance(found, Unable)]
            return Refused("; ".join((f"no open request has the id {id}", *silent)))
        return CancelReply(num_answers)

    async def _trace(self, id: str) -> AdminReply:
        findings = await self._ask_all("edge", FindTimeline(id))
        for edge, found in findings.items():
            if isinstance(found, TimelineFound) and found.timeline is not None:
                return TraceReply(found.timeline, edge, time.monotonic())
        silent = [found.message for found in findings.values() if isinstance(found, Unable)]
        return Refused("; ".join((f"no request of the id {id} is open, or among the last that ended", *silent)))

    async def _set_level(self, request: SetLevel) -> AdminReply:
        if request.actor and request.actor != SUPERVISOR and request.actor not in self._table.processes:
            return Refused(f"there is no actor {request.actor}; there are {', '.join(self._table.processes)}")
        is_meant = {SUPERVISOR: True, **dict.fromkeys(self._table.processes, True)}
        names = [name for name in is_meant if request.actor in ("", name)]
        if SUPERVISOR in names:
            logging.getLogger().setLevel(request.level.upper())
        actors = [name for name in names if name != SUPERVISOR]
        self._log_levels.update(dict.fromkeys(actors, request.level))
        findings = await asyncio.gather(*(self._asks.ask(name, SetLogLevel(request.level)) for name in actors))
        told = [name for name, found in zip(actors, findings, strict=True) if isinstance(found, Done)]
        return LevelReply((*([SUPERVISOR] if SUPERVISOR in names else []), *told))

    async def _profile(self, actor: str, question: Question) -> AdminReply:
        found = await self._asks.ask(actor, question, PROFILE_TIMEOUT_S)
        return ProfileReply(actor, found) if isinstance(found, Profiling) else _refused(found)

    def _start_profile(self, request: BeginProfile) -> StartProfile:
        name = f"{request.actor.replace(':', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
        return StartProfile(str(Path(self._config.admin.profile_directory) / name), request.seconds)

    async def _ask_all(self, kind: ActorKind, question: Question) -> dict[str, Finding]:
        names = [process.spec.name for process in self._table if process.spec.kind == kind]
        findings = await asyncio.gather(*(self._asks.ask(name, question) for name in names))
        return dict(zip(names, findings, strict=True))

    # ------------------------------------------------------------ draining

    async def _drain(self, *, stop: bool) -> DrainReply:
        if not self.draining:
            logger.warning("draining: new requests are refused")
            self.draining = True
            self._announce()
        if stop and self._stopper is None:
            self._stopper = asyncio.get_running_loop().create_task(self._stop_when_empty(), name="drain")
        return await self._drain_state()

    async def _undrain(self) -> DrainReply:
        if self._stopper is not None:
            self._stopper.cancel()
            self._stopper = None
        if self.draining:
            logger.warning("no longer draining: new requests are taken")
            self.draining = False
            self._announce()
        return await self._drain_state()

    async def _drain_state(self) -> DrainReply:
        num_open = await self._num_open()
        return DrainReply(self.draining, self._stopper is not None, num_open)

    async def _num_open(self) -> int | None:
        """HTTP requests that edges are answering.  Asked after the news of a drain, on the same channel: final if 0."""
        findings = await self._ask_all("edge", ListRequests())
        counts = [found.num_open for found in findings.values() if isinstance(found, AnswersOpen)]
        return sum(counts) if len(counts) == len(findings) else None

    async def _stop_when_empty(self) -> None:
        deadline_s = time.monotonic() + self._config.server.request_timeout_s + DRAIN_MARGIN_S
        while await self._num_open() != 0 and time.monotonic() < deadline_s:  # noqa: ASYNC110 - edges are asked
            await asyncio.sleep(self._config.supervision.heartbeat_s)
        self._request_stop("drained")


class AtMostOnce:
    """An answer that is made once a period at most; whoever asks meanwhile shares it, also while it is being made."""

    def __init__(self, period_s: float, make: Callable[[], Awaitable[RequestsReply]]) -> None:
        self._period_s = period_s
        self._make = make
        self._made: RequestsReply | None = None
        self._made_s = 0.0
        self._turn = asyncio.Lock()

    async def get(self) -> RequestsReply:
        async with self._turn:
            if self._made is None or time.monotonic() - self._made_s >= self._period_s:
                self._made = await self._make()
                self._made_s = time.monotonic()
            return self._made


def _caches_reply(found: Finding) -> AdminReply:
    return CachesReply(found) if isinstance(found, CachesShown) else _refused(found)


def _refused(found: Finding) -> Refused:
    return Refused(found.message if isinstance(found, Unable) else f"unexpected finding {type(found).__name__}")
