"""Questions of the supervisor to its actors over the control channel: each ends with a finding, by a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vlmrt.runtime.control_messages import AdminAnswer, AdminAsk
from vlmrt.runtime.messages import ActorName, Epoch
from vlmrt.runtime.process_table import Process, ProcessTable
from vlmrt.runtime.questions import Finding, Question, Unable

ASK_TIMEOUT_S = 5.0
MAX_PENDING = 256  # questions of all clients

Send = Callable[[ActorName, Epoch, AdminAsk], bool]


class Asks:
    """Questions under way, by ask_id.

    Args: `send` queues without waiting, and says whether the actor's channel took it.
    """

    def __init__(self, table: ProcessTable, send: Send) -> None:
        self._table = table
        self._send = send
        self._pending: dict[int, tuple[ActorName, Epoch, asyncio.Future[Finding]]] = {}
        self._last_id = 0

    def __len__(self) -> int:
        return len(self._pending)

    async def ask(self, actor: str, question: Question, timeout_s: float = ASK_TIMEOUT_S) -> Finding:
        """What the actor finds; Unable where there is no such actor, it is not up, goes meanwhile or stays silent."""
        process = self._table.processes.get(ActorName(actor))
        if process is None:
            return Unable(f"there is no actor {actor}; there are {', '.join(self._table.processes)}")
        if not process.is_up:
            return Unable(f"{actor} is not up ({process.state}); try again")
        if len(self._pending) >= MAX_PENDING:
            return Unable(f"{MAX_PENDING} questions are under way already; try again")
        return await self._ask(process, question, timeout_s)

    async def _ask(self, process: Process, question: Question, timeout_s: float) -> Finding:
        name, epoch = process.spec.name, process.epoch
        self._last_id += 1
        ask_id = self._last_id
        finding: asyncio.Future[Finding] = asyncio.get_running_loop().create_future()
        self._pending[ask_id] = name, epoch, finding
        try:
            if not self._send(name, epoch, AdminAsk(ask_id, question)):
                return Unable(f"{name} does not read its control channel")
            async with asyncio.timeout(timeout_s):
                return await finding
        except TimeoutError:
            return Unable(f"{name} did not answer within {timeout_s:g} s")
        finally:
            del self._pending[ask_id]

    def take(self, actor: ActorName, epoch: Epoch, answer: AdminAnswer) -> bool:
        """An answer has come.  False: to nothing that this incarnation was asked, or too late."""
        name, asked_epoch, finding = self._pending.get(answer.ask_id, (None, None, None))
        if finding is None or (name, asked_epoch) != (actor, epoch) or finding.done():
            return False
        finding.set_result(answer.finding)
        return True

    def lose(self, actor: ActorName, epoch: Epoch) -> None:
        """That incarnation is gone and answers nothing."""
        for name, asked_epoch, finding in self._pending.values():
            if (name, asked_epoch) == (actor, epoch) and not finding.done():
                finding.set_result(Unable(f"{actor} ended before it answered"))
