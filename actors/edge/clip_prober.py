"""Asks media workers what is in a video; clips asked for before are known, and those asked for at once asked once."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from msgspec import Struct

from vlmrt.actors.edge.scheduler_link import unavailable
from vlmrt.runtime.actor import Outbox
from vlmrt.runtime.control_messages import MediaReady, PeerDown, PeerUp
from vlmrt.runtime.errors import ChannelFull, RequestError
from vlmrt.runtime.messages import ActorName, ClipInfo, Epoch, Probe, Probed
from vlmrt.runtime.metrics import Metrics

MAX_KNOWN_CLIPS = 4096
MAX_WORKERS_ASKED = 2  # about one clip: a worker that dies may have died of it
RETRY_S = 0.05  # where all channels are full


class _Question(Struct, eq=False):
    """Sent to that incarnation of a worker."""

    worker: ActorName
    epoch: Epoch
    answer: asyncio.Future[Probed | None]  # None: the worker died


class _Search(Struct, eq=False):
    """A clip that is being looked into, and how many requests wait for it."""

    task: asyncio.Task[ClipInfo]
    num_waiting: int = 0


class ClipProber:
    """Media workers as far as probing goes."""

    def __init__(self, outbox: Outbox, metrics: Metrics, timeout_s: float) -> None:
        self._outbox = outbox
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._workers: dict[ActorName, Epoch] = {}
        self._has_workers = asyncio.Event()
        self._questions: dict[int, _Question] = {}
        self._num_asked = 0
        self._known: OrderedDict[bytes, ClipInfo] = OrderedDict()
        self._searches: dict[bytes, _Search] = {}

    def peer_up(self, peer: PeerUp) -> None:
        if isinstance(peer.capabilities, MediaReady):
            known = self._workers.get(peer.actor)
            if known is not None and known != peer.epoch:
                self._lose(peer.actor, known)
            self._workers[peer.actor] = peer.epoch
            self._has_workers.set()

    def peer_down(self, peer: PeerDown) -> None:
        if self._workers.get(peer.actor) == peer.epoch:
            self._lose(peer.actor, peer.epoch)

    def _lose(self, worker: ActorName, epoch: Epoch) -> None:
        del self._workers[worker]
        if not self._workers:
            self._has_workers.clear()
        for question in self._questions.values():
            if (question.worker, question.epoch) == (worker, epoch) and not question.answer.done():
                question.answer.set_result(None)

    def take(self, message: Probed) -> None:
        """A media worker's answer; nobody may wait for it any more."""
        question = self._questions.get(message.probe_id)
        if question is not None and not question.answer.done():
            question.answer.set_result(message)

    async def probe(self, digest: bytes, encoded: bytes) -> ClipInfo:
        """What is in the clip with this digest of its bytes.

        Raises: RequestError 400 for what cannot be decoded or is beyond the limits, 503 where no worker answers.
        """
        known = self._known.get(digest)
        if known is not None:
            self._known.move_to_end(digest)
            return known
        search = self._searches.get(digest)
        if search is None:
            task = asyncio.create_task(self._search(digest, encoded), name="probe a video")
            search = self._searches[digest] = _Search(task)
        search.num_waiting += 1
        try:
            return await asyncio.shield(search.task)
        finally:
            search.num_waiting -= 1
            if not search.num_waiting:
                search.task.cancel()
                if self._searches.get(digest) is search:
                    del self._searches[digest]

    async def _search(self, digest: bytes, encoded: bytes) -> ClipInfo:
        try:
            async with asyncio.timeout(self._timeout_s):
                clip = await self._ask(encoded)
        except TimeoutError:
            raise unavailable(f"no media worker has looked into the video after {self._timeout_s:g} s") from None
        self._known[digest] = clip
        if len(self._known) > MAX_KNOWN_CLIPS:
            self._known.popitem(last=False)
        return clip

    async def _ask(self, encoded: bytes) -> ClipInfo:
        for _ in range(MAX_WORKERS_ASKED):
            number = await self._send(encoded)
            try:
                answer = await self._questions[number].answer
            finally:
                del self._questions[number]
            if answer is None:
                continue
            if answer.clip is not None:
                return answer.clip
            assert answer.error is not None
            raise RequestError.from_wire(answer.error)
        raise unavailable(f"{MAX_WORKERS_ASKED} media workers died while they looked into the video")

    async def _send(self, encoded: bytes) -> int:
        """To the worker with the fewest questions whose channel has room, as soon as there is one; its number."""
        self._num_asked += 1
        number = self._num_asked
        while True:
            await self._has_workers.wait()
            for worker in sorted(self._workers, key=self._num_questions):
                if self._sent(worker, Probe(number, encoded)):
                    answer = asyncio.get_running_loop().create_future()
                    self._questions[number] = _Question(worker, self._workers[worker], answer)
                    self._metrics.add("video_probes_total")
                    return number
            await asyncio.sleep(RETRY_S)

    def _sent(self, worker: ActorName, probe: Probe) -> bool:
        try:
            return self._outbox.send(worker, probe)
        except ChannelFull:
            return False

    def _num_questions(self, worker: ActorName) -> int:
        return sum(question.worker == worker for question in self._questions.values())
