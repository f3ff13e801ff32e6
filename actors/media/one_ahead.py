"""Work in two stages: the first of one item runs beside the second of the item before it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")


async def one_ahead(
    jobs: Sequence[Callable[[], Coroutine[Any, Any, Result]]], drop: Callable[[Result], None]
) -> AsyncGenerator[Result, None]:
    """The results of the jobs, in order.  A job starts when the result before it is handed out, not before.

    Close it (contextlib.aclosing) where it may be left early: then the job that runs is cancelled, and a result that
    nobody was handed goes to `drop`.  Raises: what a job raises, after which no other starts.
    """
    ahead: asyncio.Task[Result] | None = None
    try:
        for job in jobs:
            ready = [] if ahead is None else [ahead.result()]
            ahead = asyncio.create_task(job())
            for result in ready:
                yield result
            await asyncio.wait([ahead])
        if ahead is not None:
            result, ahead = ahead.result(), None
            yield result
    finally:
        if ahead is not None:
            ahead.cancel()
            await asyncio.wait([ahead])
            if not ahead.cancelled() and ahead.exception() is None:
                drop(ahead.result())
