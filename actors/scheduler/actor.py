"""The scheduler's process: mailbox -> State -> outbox.  Everything it decides is in State."""

from __future__ import annotations

import asyncio
import logging
import time

from vlmrt.actors.scheduler.books_shown import caches_shown, requests_open
from vlmrt.actors.scheduler.state import Send, State
from vlmrt.runtime.actor import ActorContext
from vlmrt.runtime.control_messages import Capabilities, PeerDown, PeerUp, SchedulerReady, ServiceStatus
from vlmrt.runtime.errors import ChannelFull
from vlmrt.runtime.messages import (
    ActorName,
    CacheReset,
    MediaFound,
    Message,
    NeedMedia,
    SchedulerInbox,
    StepResult,
    TokenBatch,
)
from vlmrt.runtime.questions import EmptyCaches, Finding, ListRequests, Question, ShowCaches

_TICK_S = 0.25

logger = logging.getLogger(__name__)


class SchedulerActor:
    """Applies each message to State and sends what State says.

    A StepResult is followed by the next plan at once; other events wait for those that came with them, so that a burst
    of requests shares a step.
    """

    def __init__(self, context: ActorContext) -> None:
        self._context = context
        self._state = State(context.config)
        self._copied: dict[str, int] = {}
        self._owed: dict[ActorName, list[Message]] = {}  # what is left to say to edges whose channel was full
        self._news = asyncio.Event()
        self._wake: asyncio.TimerHandle | None = None

    async def start(self) -> Capabilities:
        self._context.create_task(self._tick_forever(), "tick")
        self._context.create_task(self._plan_forever(), "plan")
        return SchedulerReady()

    async def peer_up(self, peer: PeerUp) -> None:
        self._owed.pop(peer.actor, None)
        self._post(self._state.on_peer_up(peer, time.monotonic()))
        self._news.set()

    async def peer_down(self, peer: PeerDown) -> None:
        self._owed.pop(peer.actor, None)
        self._post(self._state.on_peer_down(peer, time.monotonic()))
        self._news.set()

    async def status(self, status: ServiceStatus) -> None:
        """Only edges are told."""

    async def handle(self, message: SchedulerInbox, sender: ActorName) -> None:
        self._post(self._state.on_event(sender, message, time.monotonic()))
        if isinstance(message, StepResult):
            self._advance()
        else:
            self._news.set()

    async def answer(self, question: Question) -> Finding | None:
        match question:
            case ListRequests():
                return requests_open(self._state)
            case ShowCaches():
                return caches_shown(self._state)
            case EmptyCaches():
                for kind in question.kinds:
                    reset = self._state.reset_prefix_cache if kind == "prefix" else self._state.reset_embedding_cache
                    self._post(reset(time.monotonic()))
                self._news.set()
                return caches_shown(self._state)
            case _:
                return None

    async def stop(self, grace_s: float) -> None:
        """Nothing to end: edges have finished or ended their requests, ranks and ViTs are stopped by the supervisor."""

    # ------------------------------------------------------------ steps

    async def _plan_forever(self) -> None:
        """Plan after each turn of the loop that brought news; in a task, so that an exception ends the actor."""
        while True:
            await self._news.wait()
            self._advance()

    def _advance(self) -> None:
        self._news.clear()
        now_s = time.monotonic()
        self._post(self._state.advance(now_s))
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        if (at_s := self._state.wake_at_s) is not None:
            self._wake = asyncio.get_running_loop().call_later(max(0.0, at_s - now_s), self._news.set)

    def _post(self, sends: list[Send]) -> None:
        """A peer that is not up gets nothing; its PeerDown is on the way and tells State."""
        stuck_edges = set()
        for peer, message in sends:
            try:
                self._context.outbox.send(peer, message)
            except ChannelFull:
                logger.error("%s takes no messages any more; a %s is late or lost", peer, type(message).__name__)
                if isinstance(message, TokenBatch | MediaFound | CacheReset):
                    self._owed.setdefault(peer, []).append(message)
                if isinstance(message, TokenBatch | NeedMedia):
                    stuck_edges.add(peer)
        for edge in stuck_edges:  # its requests must not go on with a hole in their text, nor wait for good
            sends = self._state.give_up_edge(edge, time.monotonic())
            self._owed.setdefault(edge, []).extend(message for peer, message in sends if peer == edge)
            self._post([send for send in sends if send.peer != edge])

    def pay_edges(self) -> None:
        """Send what edges are owed, each in order, as far as there is room again."""
        for edge, messages in list(self._owed.items()):
            try:
                while messages:
                    self._context.outbox.send(edge, messages[0])
                    del messages[0]
            except ChannelFull:
                continue
            del self._owed[edge]

    # ------------------------------------------------------------ from time to time

    async def _tick_forever(self) -> None:
        while True:
            self.copy_metrics()
            self.pay_edges()
            await asyncio.sleep(_TICK_S)

    def copy_metrics(self) -> None:
        """State's counters and gauges -> metrics."""
        metrics = self._context.metrics
        for name, value in self._state.totals().items():
            if value > self._copied.get(name, 0):
                metrics.add(name, value - self._copied.get(name, 0))
                self._copied[name] = value
        for name, gauge in self._state.gauges().items():
            metrics.set(name, gauge)
