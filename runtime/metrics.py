"""Counters, gauges and histograms of one actor, and the Prometheus text of all of them."""

from __future__ import annotations


class Metrics:
    """This actor's metrics.  Safe from any thread; a snapshot costs one copy."""

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None: ...

    def set(self, name: str, value: float, **labels: str) -> None: ...

    def observe(self, name: str, value: float, bounds: tuple[float, ...], **labels: str) -> None: ...
