"""The HTTP requests that an edge is answering: what whoever operates the service sees of them, and can end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

from vlmrt.actors.edge.error_answers import LABEL
from vlmrt.actors.edge.generation import Answer
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.questions import MAX_ROWS, AnswerRow, AnswersOpen, Cancelled


class OpenAnswer:
    """One of them, from its arrival to the last byte of its answer."""

    def __init__(self, label: str, path: str, task: asyncio.Task[Any] | None) -> None:
        self.label = label
        self.path = path
        self.arrived_s = time.monotonic()
        self.answer_id = ""  # until it is understood
        self.streams = False
        self.is_cancelled = False
        self._task = task
        self._num_cancels = 0 if task is None else task.cancelling()
        self._answer: Answer | None = None

    def begin(self, answer_id: str, answer: Answer, *, streams: bool) -> None:
        """Its requests are at the scheduler."""
        self.answer_id, self._answer, self.streams = answer_id, answer, streams

    def has_id(self, id: str) -> bool:
        request_ids = () if self._answer is None else self._answer.request_ids
        return bool(id) and id in (self.label, self.answer_id, *request_ids)

    def cancel(self) -> None:
        """End it with an error: as the answer's own, or out of whatever it waits for before there is one."""
        if self.is_cancelled:
            return
        self.is_cancelled = True
        if self._answer is not None:
            self._answer.fail(cancelled())
        elif self._task is not None:
            self._task.cancel()

    def takes_back_its_cancel(self) -> bool:
        """Whether the task was cancelled by `cancel` alone, and may go on; not if its client has gone as well."""
        if not self.is_cancelled or self._answer is not None or self._task is None:
            return False
        return self._task.uncancel() <= self._num_cancels

    def row(self, now_s: float) -> AnswerRow:
        request_ids = () if self._answer is None else tuple(self._answer.request_ids)
        return AnswerRow(self.label, self.answer_id, self.path, now_s - self.arrived_s, request_ids, self.streams)


class OpenAnswers:
    """All of them, the oldest first."""

    def __init__(self) -> None:
        self._open: dict[int, OpenAnswer] = {}
        self._num_entered = 0

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def enter(self, request: web.Request) -> Iterator[OpenAnswer]:
        """It is open inside the block.  Raises: RequestError 499 where it is cancelled there."""
        self._num_entered += 1
        number = self._num_entered
        opened = self._open[number] = OpenAnswer(request.get(LABEL, ""), request.path, asyncio.current_task())
        try:
            yield opened
        except asyncio.CancelledError:
            if opened.takes_back_its_cancel():
                raise cancelled() from None
            raise
        finally:
            del self._open[number]

    def shown(self) -> AnswersOpen:
        now_s = time.monotonic()
        rows = [opened.row(now_s) for _, opened in zip(range(MAX_ROWS), self._open.values(), strict=False)]
        return AnswersOpen(tuple(rows), len(self._open))

    def cancel(self, id: str) -> Cancelled:
        """End those with this label, answer id or request id."""
        found = [opened for opened in self._open.values() if opened.has_id(id)]
        for opened in found:
            opened.cancel()
        return Cancelled(len(found))


def cancelled() -> RequestError:
    return RequestError("the request was cancelled by the server's operator", status=499, code="cancelled")
