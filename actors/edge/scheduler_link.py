"""The edge's side of the scheduler: submits requests, passes outputs on, hands out pictures, aborts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import assert_never

from vlmrt.actors.edge.identify import IdentifiedImage
from vlmrt.actors.edge.open_requests import RETRY_AFTER_S, OpenRequest
from vlmrt.runtime.actor import Outbox
from vlmrt.runtime.errors import ChannelFull, RequestError
from vlmrt.runtime.messages import (
    Abort,
    ActorName,
    CacheKind,
    CacheReset,
    Decode,
    EdgeInbox,
    Epoch,
    ForgetLookUp,
    KnownMedia,
    LookUpMedia,
    MediaFound,
    MediaReady,
    MediaUnsent,
    Message,
    NeedMedia,
    PeerDown,
    PeerUp,
    Probed,
    RequestId,
    ResetCache,
    SchedulerReady,
    Submit,
    TokenBatch,
)

MEDIA_RETRY_S = 0.05  # a full media worker is reported to the scheduler after this long
MAX_UNSENT = 65536
RESET_TIMEOUT_S = 10.0

logger = logging.getLogger(__name__)


class LookUp:
    """What one request wants to know of pictures that it names; its findings stay cached until the request's Submit."""

    def __init__(self, link: SchedulerLink) -> None:
        self._link = link
        self.lookup_id = 0  # 0: nothing has been asked

    async def find(self, cache_salt: str, uuids: tuple[str, ...]) -> tuple[KnownMedia | None, ...]:
        """By uuid, in their order; None where the bytes are needed.  To be called once.

        Raises: RequestError 503 where the scheduler is not up, goes meanwhile or does not take more.
        """
        self.lookup_id, answer = self._link.ask(lambda number: LookUpMedia(number, cache_salt, uuids))
        found = await answer
        assert isinstance(found, MediaFound)
        return found.items


class SchedulerLink:
    """Open requests, and the incarnation of the scheduler that has them."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._scheduler: tuple[ActorName, Epoch] | None = None
        self._media_epochs: dict[ActorName, Epoch] = {}  # the newest incarnation heard of
        self._open: dict[RequestId, OpenRequest] = {}
        self._asked: dict[int, asyncio.Future[MediaFound | CacheReset]] = {}  # lookups that hold, resets under way
        self._num_asked = 0
        self._unsent: list[Abort | MediaUnsent | ForgetLookUp] = []
        self._closed = False
        self._none_open = asyncio.Event()
        self._none_open.set()

    @property
    def is_up(self) -> bool:
        return self._scheduler is not None

    @property
    def num_open(self) -> int:
        return len(self._open)

    def peer_up(self, peer: PeerUp) -> None:
        if isinstance(peer.capabilities, SchedulerReady):
            if self._scheduler != (peer.actor, peer.epoch):
                self._lose(lambda epoch: epoch != peer.epoch)
            self._scheduler = peer.actor, peer.epoch
        elif isinstance(peer.capabilities, MediaReady):
            self._media_epochs[peer.actor] = peer.epoch

    def peer_down(self, peer: PeerDown) -> None:
        if self._scheduler == (peer.actor, peer.epoch):
            self._scheduler = None
            self._unsent.clear()
            self._lose(lambda epoch: True)

    def _lose(self, is_lost: Callable[[Epoch], bool]) -> None:
        """The scheduler that had these requests is gone, and all it knew of them."""
        self._fail_asked(unavailable("the scheduler was restarted while the request was looked at"))
        for request in self._open.values():
            if is_lost(request.epoch) and not request.ended:
                request.ended = True
                request.fail(unavailable("the scheduler was restarted while the request ran"))

    def close(self) -> None:
        """Take no new requests; those that are open go on."""
        self._closed = True

    async def drain(self, grace_s: float) -> None:
        """Wait until no request is open, at most for grace_s."""
        try:
            async with asyncio.timeout(grace_s):
                await self._none_open.wait()
        except TimeoutError:
            pass

    def _fail_asked(self, error: RequestError) -> None:
        """No answer comes any more, and what lookups found is not held for them."""
        asked, self._asked = self._asked, {}
        for answer in asked.values():
            if not answer.done():
                answer.set_exception(error)

    def fail_all(self, error: RequestError) -> None:
        self._fail_asked(error)
        for request in self._open.values():
            if not request.ended:
                request.fail(error)

    def check_open(self) -> None:
        """Raises: RequestError 503 while no request can be taken."""
        if self._closed:
            raise unavailable("the server is shutting down")
        if self._scheduler is None:
            raise unavailable("the service is starting or restarting")

    def ask(
        self, question: Callable[[int], LookUpMedia | ResetCache]
    ) -> tuple[int, asyncio.Future[MediaFound | CacheReset]]:
        """Send a question made for this number; returns the number and what will be the answer.

        Raises: RequestError 503 where the scheduler is not up or does not take more.
        """
        self.check_open()
        assert self._scheduler is not None
        self._num_asked += 1
        self._send_now(question(self._num_asked))
        answer = self._asked[self._num_asked] = asyncio.get_running_loop().create_future()
        return self._num_asked, answer

    def _send_now(self, message: Message) -> None:
        """Raises: RequestError 503."""
        assert self._scheduler is not None
        try:
            sent = self._outbox.send(self._scheduler[0], message)
        except ChannelFull:
            raise unavailable("the scheduler is busy") from None
        if not sent:
            raise unavailable("the service is starting or restarting")

    @contextmanager
    def look_up(self) -> Iterator[LookUp]:
        """Whatever was asked inside the block and not handed to a Submit there is forgotten at its end."""
        lookup = LookUp(self)
        try:
            yield lookup
        finally:
            if self._asked.pop(lookup.lookup_id, None) is not None:
                self._tell(ForgetLookUp(lookup.lookup_id))

    async def reset(self, kind: CacheKind) -> None:
        """Returns once that cache is reset.  Raises: RequestError 503, or 504 where that takes too long."""
        number, answer = self.ask(lambda number: ResetCache(number, kind))
        try:
            async with asyncio.timeout(RESET_TIMEOUT_S):
                await answer
        except TimeoutError:
            message = f"the scheduler did not answer within {RESET_TIMEOUT_S:g} s"
            raise RequestError(message, status=504, code="request_timeout") from None
        finally:
            self._asked.pop(number, None)

    @contextmanager
    def submit(
        self, submit: Submit, images: Iterable[IdentifiedImage], news: asyncio.Event, *, begun: bool = False
    ) -> Iterator[OpenRequest]:
        """The request is open inside the block; left before its end, it is aborted, without waiting.

        Args: news is set whenever the request has something to take; begun: it belongs to an answer that is under
        way, which the edge lets finish even while it takes no new ones.
        Raises: RequestError 503 where the scheduler is not up or does not take more.
        """
        if self._scheduler is None or not begun:
            self.check_open()
        assert self._scheduler is not None
        if submit.lookup_id and submit.lookup_id not in self._asked:
            raise unavailable("the scheduler was restarted while the request was looked at")
        request = OpenRequest(submit.request_id, self._scheduler[1], images, news)
        self._open[submit.request_id] = request
        self._none_open.clear()
        sent = False
        try:
            self._send_now(submit)
            sent = True
            self._asked.pop(submit.lookup_id, None)
            yield request
        finally:
            del self._open[submit.request_id]
            if not self._open:
                self._none_open.set()
            if sent:
                self.abort(request)

    def abort(self, request: OpenRequest) -> None:
        """Nobody needs more of this request, if it has not ended yet."""
        if not request.ended:
            request.ended = True
            self._tell(Abort(request.request_id))

    def _tell(self, message: Abort | MediaUnsent | ForgetLookUp) -> None:
        """At once, or when the channel has room again."""
        if not self._send(message) and len(self._unsent) < MAX_UNSENT:
            self._unsent.append(message)

    def retry_unsent(self) -> None:
        """Send what a full channel had kept back."""
        while self._unsent and self._send(self._unsent[-1]):
            self._unsent.pop()

    def _send(self, message: Message) -> bool:
        """False only where it is worth trying again: the scheduler is up and its channel is full."""
        if self._scheduler is None:
            return True
        try:
            self._outbox.send(self._scheduler[0], message)
        except ChannelFull:
            return False
        return True

    def handle(self, message: EdgeInbox) -> None:
        """What the scheduler says; of requests that have ended meanwhile it is stale and dropped."""
        match message:
            case TokenBatch():
                for output in message.outputs:
                    request = self._open.get(output.request_id)
                    if request is not None:
                        request.push(output)
            case NeedMedia():
                self._hand_out(message)
            case MediaFound():
                self._answer(message.lookup_id, message)
            case CacheReset():
                self._answer(message.reset_id, message)
            case Probed():
                logger.debug("probe %d: nobody waits for its answer", message.probe_id)
            case _:
                assert_never(message)

    def _answer(self, number: int, message: MediaFound | CacheReset) -> None:
        answer = self._asked.get(number)
        if answer is not None and not answer.done():
            answer.set_result(message)

    def _hand_out(self, need: NeedMedia) -> None:
        request = self._open.get(need.request_id)
        image = request.images.get(need.mm_hash) if request is not None else None
        if request is None or image is None:
            logger.debug("%s: asked for a picture it does not hold", need.request_id)
            return
        unsent = MediaUnsent(need.request_id, need.mm_hash)
        decode = Decode(need.mm_hash, image.encoded, image.size, image.target_size, request.epoch)
        try:
            if self._media_epochs.get(need.media, need.epoch) != need.epoch:
                self._tell(unsent)  # what went to a dead incarnation would not be missed by anybody
            elif not self._outbox.send(need.media, decode):
                self._tell(unsent)
        except ChannelFull:
            asyncio.get_running_loop().call_later(MEDIA_RETRY_S, self._tell, unsent)


def unavailable(message: str) -> RequestError:
    return RequestError(f"{message}; try again", status=503, code="service_unavailable", retry_after_s=RETRY_AFTER_S)
