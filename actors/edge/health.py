"""Is the service ready, and if not, what is down; and the other short reports of the small routes."""

from __future__ import annotations

import time
from typing import Literal

from msgspec import Struct

from vlmrt.runtime.control_messages import ServiceStatus
from vlmrt.runtime.questions import CacheKind


class HealthReport(Struct, frozen=True):
    ready: bool
    down: tuple[str, ...]  # actors by name, with their state; "supervisor" where it has gone silent


class LiveReport(Struct, frozen=True):
    status: Literal["live"] = "live"


class Version(Struct, frozen=True):
    version: str
    protocol: int  # of the messages between the server's processes
    fault_hooks: bool


class Load(Struct, frozen=True):
    server_load: int  # requests that have been submitted and not answered to their end


class ResetReport(Struct, frozen=True):
    reset: CacheKind


class Health:
    """What the supervisor last said, and whether it still speaks."""

    def __init__(self, silence_s: float) -> None:
        """Args: the supervisor counts as gone after silence_s without word."""
        self.status: ServiceStatus | None = None
        self.draining = False
        self._silence_s = silence_s
        self._heard_s = 0.0

    def update(self, status: ServiceStatus) -> None:
        self.status = status
        self._heard_s = time.monotonic()

    def report(self) -> HealthReport:
        if self.draining:
            return HealthReport(False, ("edge (shutting down)",))
        status = self.status
        if status is None:
            return HealthReport(False, ("supervisor (no word yet)",))
        if time.monotonic() - self._heard_s > self._silence_s:
            return HealthReport(False, ("supervisor (silent)",))
        if status.draining:
            return HealthReport(False, ("edge (draining)",))
        down = tuple(f"{actor.actor} ({actor.state})" for actor in status.actors if actor.state != "ready")
        return HealthReport(status.ready, () if status.ready else down)
