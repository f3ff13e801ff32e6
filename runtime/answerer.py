"""An actor's answers to whoever operates the service: beside its work, bounded, and never the end of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import assert_never

from vlmrt.runtime.control import SupervisorLost
from vlmrt.runtime.control_messages import AdminAnswer, AdminAsk
from vlmrt.runtime.profiling import ProfileSession
from vlmrt.runtime.questions import (
    CancelRequest,
    Done,
    EmptyCaches,
    Finding,
    FindTimeline,
    ListRequests,
    Question,
    SetLogLevel,
    ShowCaches,
    StartProfile,
    StopProfile,
    Unable,
)

MAX_ANSWERING = 16

logger = logging.getLogger(__name__)

Answer = Callable[[Question], Awaitable[Finding | None]]


class Answerer:
    """What every process can answer by itself, and the tasks in which its actor answers the rest."""

    def __init__(self, send: Callable[[AdminAnswer], None]) -> None:
        self._send = send
        self._profile = ProfileSession()
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, answer: Answer, ask: AdminAsk) -> None:
        """Args: `answer` is the actor's."""
        if len(self._tasks) >= MAX_ANSWERING:
            self._send(AdminAnswer(ask.ask_id, Unable(f"{MAX_ANSWERING} questions are being answered; try again")))
            return
        task = asyncio.get_running_loop().create_task(self._answer(answer, ask), name="answer")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, answer: Answer, ask: AdminAsk) -> None:
        try:
            finding = await answer(ask.question)
            if finding is None:
                finding = await self._by_itself(ask.question)
        except Exception as error:
            logger.exception("%s could not be answered", type(ask.question).__name__)
            finding = Unable(f"internal error: {error!r}")
        try:
            self._send(AdminAnswer(ask.ask_id, finding))
        except SupervisorLost as error:
            logger.error("no answer could be sent: %s", error)  # the next heartbeat ends the process

    async def _by_itself(self, question: Question) -> Finding:
        match question:
            case SetLogLevel():
                logging.getLogger().setLevel(question.level.upper())
                return Done()
            case StartProfile() | StopProfile():
                return await self._profile.answer(question)
            case ListRequests() | CancelRequest() | FindTimeline() | ShowCaches() | EmptyCaches():
                return Unable("this actor knows nothing of that")
            case _:
                assert_never(question)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
