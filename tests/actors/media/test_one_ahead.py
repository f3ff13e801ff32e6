"""Two stages of work, one item apart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Any

import pytest

from vlmrt.actors.media.one_ahead import one_ahead


class Jobs:
    """Jobs that note their start; each ends when it is let go."""

    def __init__(self, count: int, broken: int = -1) -> None:
        self.started: list[int] = []
        self.dropped: list[int] = []
        self.cancelled: list[int] = []
        self.gates = [asyncio.Event() for _ in range(count)]
        self._broken = broken

    async def _run(self, index: int) -> int:
        self.started.append(index)
        try:
            await self.gates[index].wait()
        except asyncio.CancelledError:
            self.cancelled.append(index)
            raise
        if index == self._broken:
            raise ValueError(f"job {index}")
        return index

    @property
    def all(self) -> list[Callable[[], Coroutine[Any, Any, int]]]:
        return [partial(self._run, index) for index in range(len(self.gates))]

    async def consume(self, seen: list[int]) -> None:
        async with aclosing(one_ahead(self.all, self.dropped.append)) as results:
            async for result in results:
                seen.append(result)

    def let_go(self) -> None:
        for gate in self.gates:
            gate.set()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_results_come_in_order_each_beside_the_next_job_alone() -> None:
    jobs = Jobs(4)
    jobs.let_go()
    seen = []
    async with aclosing(one_ahead(jobs.all, jobs.dropped.append)) as results:
        async for result in results:
            await settled()
            seen.append((result, list(jobs.started)))
    assert seen == [(0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2, 3]), (3, [0, 1, 2, 3])]
    assert jobs.dropped == []


async def test_no_jobs_give_no_results() -> None:
    seen: list[int] = []
    await Jobs(0).consume(seen)
    assert seen == []


async def test_a_failed_job_raises_in_its_place_and_no_other_starts() -> None:
    jobs = Jobs(4, broken=1)
    jobs.let_go()
    seen: list[int] = []
    with pytest.raises(ValueError, match="job 1"):
        await jobs.consume(seen)
    assert (seen, jobs.started, jobs.dropped) == ([0], [0, 1], [])


async def test_a_result_that_nobody_takes_is_dropped() -> None:
    jobs = Jobs(3)
    jobs.let_go()
    async with aclosing(one_ahead(jobs.all, jobs.dropped.append)) as results:
        async for _ in results:
            await settled()
            break
    assert (jobs.started, jobs.dropped) == ([0, 1], [1])


async def test_a_job_that_runs_when_its_consumer_is_cancelled_is_cancelled_too() -> None:
    jobs = Jobs(3)
    jobs.gates[0].set()

    consumer = asyncio.create_task(jobs.consume([]))
    await settled()
    assert jobs.started == [0, 1]
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    assert (jobs.cancelled, jobs.dropped) == ([1], [])
