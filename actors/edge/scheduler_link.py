"""The edge's side of the scheduler: submits requests, passes outputs on, hands out pictures, aborts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from vlmrt.actors.edge.identify import IdentifiedImage
from vlmrt.actors.edge.open_requests import RETRY_AFTER_S, OpenRequest
from vlmrt.runtime.actor import Outbox
from vlmrt.runtime.errors import ChannelFull, RequestError
from vlmrt.runtime.messages import (
    Abort,
    ActorName,
    Decode,
    Epoch,
    MediaReady,
    MediaUnsent,
    Message,
    NeedMedia,
    PeerDown,
    PeerUp,
    RequestId,
    SchedulerReady,
    Submit,
    TokenBatch,
)

MEDIA_RETRY_S = 0.05  # a full media worker is reported to the scheduler after this long
MAX_UNSENT = 65536

logger = logging.getLogger(__name__)


class SchedulerLink:
    """Open requests, and the incarnation of the scheduler that has them."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._scheduler: tuple[ActorName, Epoch] | None = None
        self._media_epochs: dict[ActorName, Epoch] = {}  # the newest incarnation heard of
        self._open: dict[RequestId, OpenRequest] = {}
        self._unsent: list[Abort | MediaUnsent] = []
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

    def fail_all(self, error: RequestError) -> None:
        for request in self._open.values():
            if not request.ended:
                request.fail(error)

    def check_open(self) -> None:
        """Raises: RequestError 503 while no request can be taken."""
        if self._closed:
            raise unavailable("the server is shutting down")
        if self._scheduler is None:
            raise unavailable("the service is starting or restarting")

    @contextmanager
    def submit(self, submit: Submit, images: Iterable[IdentifiedImage]) -> Iterator[OpenRequest]:
        """The request is open inside the block; left before its end, it is aborted, without waiting.

        Raises: RequestError 503 where the scheduler is not up or does not take more.
        """
        self.check_open()
        assert self._scheduler is not None
        scheduler, epoch = self._scheduler
        request = OpenRequest(submit.request_id, epoch, images)
        self._open[submit.request_id] = request
        self._none_open.clear()
        sent = False
        try:
            try:
                sent = self._outbox.send(scheduler, submit)
            except ChannelFull:
                raise unavailable("the scheduler is busy") from None
            if not sent:
                raise unavailable("the service is starting or restarting")
            yield request
        finally:
            del self._open[submit.request_id]
            if not self._open:
                self._none_open.set()
            if sent and not request.ended:
                request.ended = True
                self._tell(Abort(submit.request_id))

    def _tell(self, message: Abort | MediaUnsent) -> None:
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

    def handle(self, message: NeedMedia | TokenBatch) -> None:
        """What the scheduler says; of requests that have ended meanwhile it is stale and dropped."""
        if isinstance(message, TokenBatch):
            for output in message.outputs:
                request = self._open.get(output.request_id)
                if request is not None:
                    request.push(output)
        else:
            self._hand_out(message)

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
