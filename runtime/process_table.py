"""What the supervisor knows of its processes: incarnations, who is up, restarts, metric totals.  No I/O, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from vlmrt.runtime.control_messages import ActorStatus, Capabilities, MetricsSnapshot, PeerUp, ServiceStatus
from vlmrt.runtime.messages import ActorName, Epoch
from vlmrt.runtime.metrics import EMPTY_SNAPSHOT, merge_snapshots
from vlmrt.runtime.spawner import ProcessHandle
from vlmrt.runtime.topology import TOLD_ABOUT, ActorSpec

State = Literal["starting", "ready", "restarting", "failed"]

MAX_BACKOFF_S = 5.0
FIRST_BACKOFF_S = 0.1
_NEVER = Epoch(0)


class RestartBudget:
    """At most max_restarts within period_s, each after a longer pause."""

    def __init__(self, max_restarts: int, period_s: float) -> None:
        self._max_restarts = max_restarts
        self._period_s = period_s
        self._restarts_s: deque[float] = deque()

    def next_delay_s(self, now_s: float) -> float | None:
        """How long to wait before restarting now, or None if the budget is spent."""
        while self._restarts_s and now_s - self._restarts_s[0] > self._period_s:
            self._restarts_s.popleft()
        if len(self._restarts_s) >= self._max_restarts:
            return None
        self._restarts_s.append(now_s)
        return float(min(FIRST_BACKOFF_S * 2 ** (len(self._restarts_s) - 1), MAX_BACKOFF_S))


@dataclass
class Process:
    """One actor: its present incarnation, and what is left of earlier ones."""

    spec: ActorSpec
    epoch: Epoch = _NEVER
    handle: ProcessHandle | None = None
    said_hello: bool = False
    address: str = ""
    had_memory_turn: bool = False
    capabilities: Capabilities | None = None  # set by Ready
    is_up: bool = False  # announced to peers
    state: State = "starting"
    num_restarts: int = 0
    last_heartbeat_s: float = 0.0
    loop_lag_ms: float = 0.0
    live_metrics: MetricsSnapshot = EMPTY_SNAPSHOT
    finished_metrics: MetricsSnapshot = EMPTY_SNAPSHOT

    def begin(self, epoch: Epoch, address: str, handle: ProcessHandle, now_s: float) -> None:
        """A new incarnation was spawned."""
        self.epoch, self.address, self.handle = epoch, address, handle
        self.said_hello, self.had_memory_turn, self.capabilities, self.is_up = False, False, None, False
        self.state = "starting"
        self.last_heartbeat_s, self.loop_lag_ms = now_s, 0.0

    def end(self, state: State) -> None:
        """Its incarnation is gone: keep what it counted."""
        self.handle, self.is_up, self.capabilities, self.said_hello = None, False, None, False
        self.state = state
        ended = merge_snapshots(self.finished_metrics, self.live_metrics)
        self.finished_metrics = MetricsSnapshot(ended.counters, {}, ended.histograms)
        self.live_metrics = EMPTY_SNAPSHOT

    def peer_up(self) -> PeerUp:
        assert self.capabilities is not None
        return PeerUp(self.spec.name, self.epoch, self.address, self.capabilities)


@dataclass
class ProcessTable:
    """All actors of the service."""

    processes: dict[ActorName, Process] = field(default_factory=dict)

    @classmethod
    def of(cls, specs: tuple[ActorSpec, ...]) -> ProcessTable:
        return cls({spec.name: Process(spec) for spec in specs})

    def __iter__(self) -> Iterator[Process]:
        return iter(self.processes.values())

    def find(self, name: ActorName, epoch: Epoch) -> Process | None:
        """The actor, if this is its present incarnation."""
        process = self.processes.get(name)
        return process if process is not None and process.epoch == epoch and process.handle is not None else None

    def owner_of_pid(self, pid: int) -> tuple[ActorName, Epoch] | None:
        for process in self:
            if process.handle is not None and process.handle.pid == pid:
                return process.spec.name, process.epoch
        return None

    def told_about(self, process: Process) -> list[Process]:
        """Who is up and hears of this actor's coming and going."""
        return [p for p in self if p.is_up and p is not process and process.spec.kind in TOLD_ABOUT[p.spec.kind]]

    def peers_of(self, process: Process) -> list[Process]:
        """Who is up and this actor hears of."""
        return [p for p in self if p.is_up and p is not process and p.spec.kind in TOLD_ABOUT[process.spec.kind]]

    def ranks_whose_turn_it_is(self, *, is_restart: bool) -> list[Process]:
        """Ranks to be given the memory left on their GPU: no ViT there is still to take its own.

        At a restart the number of their blocks is known, so they need not wait, and nobody can wait for good.
        """
        starting = {p.spec.device for p in self if p.spec.kind == "vit" and p.capabilities is None}
        ranks = [p for p in self if p.spec.kind == "llm" and p.said_hello and not p.had_memory_turn]
        return [p for p in ranks if is_restart or p.spec.device == "cpu" or p.spec.device not in starting]

    @property
    def all_up(self) -> bool:
        return all(process.is_up for process in self)

    def status(self, now_s: float, ready: bool, *, uptime_s: float = 0.0, draining: bool = False) -> ServiceStatus:
        return ServiceStatus(
            ready=ready,
            actors=tuple(
                ActorStatus(
                    actor=p.spec.name,
                    epoch=p.epoch,
                    pid=p.handle.pid if p.handle is not None else 0,
                    state=p.state,
                    num_restarts=p.num_restarts,
                    heartbeat_age_s=max(0.0, now_s - p.last_heartbeat_s),
                    loop_lag_ms=p.loop_lag_ms,
                    device=p.spec.device,
                )
                for p in self
            ),
            metrics={p.spec.name: merge_snapshots(p.finished_metrics, p.live_metrics) for p in self},
            at_s=now_s,
            uptime_s=uptime_s,
            draining=draining,
        )
