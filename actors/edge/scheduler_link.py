"""The edge's side of the scheduler: submits requests, passes outputs on, hands out media, aborts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import assert_never

from msgspec import Struct

from vlmrt.actors.edge.identify import IdentifiedClip, IdentifiedImage, SentMedium
from vlmrt.actors.edge.open_requests import RETRY_AFTER_S, ClipKey, OpenRequest, Record
from vlmrt.runtime.actor import Outbox
from vlmrt.runtime.control_messages import MediaReady, PeerDown, PeerUp, SchedulerReady
from vlmrt.runtime.errors import ChannelFull, RequestError
from vlmrt.runtime.messages import (
    Abort,
    ActorName,
    CacheReset,
    Decode,
    DecodeFrames,
    Epoch,
    ForgetLookUp,
    FrameGroup,
    KnownMedia,
    LookUpMedia,
    MediaFound,
    MediaUnsent,
    Message,
    MmHash,
    NeedMedia,
    RequestId,
    ResetCache,
    Submit,
    TokenBatch,
)
from vlmrt.runtime.questions import CacheKind

MEDIA_RETRY_S = 0.05  # a full media worker is reported to the scheduler after this long
GATHER_S = 0.002  # for more groups of a clip: the scheduler asks for all it wants in one turn
REPEAT_BYTES_PER_S = 100e6  # of a clip that a worker has had already: later groups are asked for one by one
MAX_UNSENT = 65536
RESET_TIMEOUT_S = 10.0
DRAIN_RETRY_AFTER_S = 5

SchedulerMessage = NeedMedia | MediaFound | CacheReset | TokenBatch

logger = logging.getLogger(__name__)


class _Wanted(Struct, frozen=True):
    """Groups of one clip for one media worker."""

    request: OpenRequest
    need: NeedMedia  # the first of them
    clip: IdentifiedClip
    groups: list[FrameGroup]


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
        self._wanted: dict[ClipKey, _Wanted] = {}
        self._unsent: list[Abort | MediaUnsent | ForgetLookUp] = []
        self._closed = False
        self.draining = False  # new requests are refused, by order of the service's operator
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

    def check_takes_new(self) -> None:
        """Raises: RequestError 503 while no request can be taken, or none is to be begun."""
        if self.draining:
            raise RequestError(
                "the server is draining and takes no new requests; try again",
                status=503,
                code="draining",
                retry_after_s=DRAIN_RETRY_AFTER_S,
            )
        self.check_open()

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
        self,
        submit: Submit,
        media: Iterable[SentMedium],
        news: asyncio.Event,
        record: Record,
        *,
        begun: bool = False,
    ) -> Iterator[OpenRequest]:
        """The request is open inside the block; left before its end, it is aborted, without waiting.

        Args: news is set whenever the request has something to take; record is told where its time goes; begun: it
        belongs to an answer that is under way, which the edge lets finish even while it takes no new ones.
        Raises: RequestError 503 where the scheduler is not up or does not take more.
        """
        if self._scheduler is None or not begun:
            self.check_open()
        assert self._scheduler is not None
        if submit.lookup_id and submit.lookup_id not in self._asked:
            raise unavailable("the scheduler was restarted while the request was looked at")
        request = OpenRequest(submit.request_id, self._scheduler[1], media, news, record)
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

    def handle(self, message: SchedulerMessage) -> None:
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
            case _:
                assert_never(message)

    def _answer(self, number: int, message: MediaFound | CacheReset) -> None:
        answer = self._asked.get(number)
        if answer is not None and not answer.done():
            answer.set_result(message)

    def _hand_out(self, need: NeedMedia) -> None:
        """A picture at once; a group of a clip with those that are asked for right behind it."""
        request = self._open.get(need.request_id)
        medium = request.media.get(need.mm_hash) if request is not None else None
        if request is None or medium is None:
            logger.debug("%s: asked for a medium it does not hold", need.request_id)
        elif isinstance(medium, IdentifiedImage):
            decode = Decode(need.mm_hash, medium.encoded, medium.size, medium.target_size, request.epoch)
            self._send_media(need, decode, (need.mm_hash,))
        else:
            key = need.request_id, medium.clip.groups[0].mm_hash, need.media, need.epoch
            wanted = self._wanted.get(key)
            if wanted is None:
                wanted = self._wanted[key] = _Wanted(request, need, medium.clip, [])
                repeat_s = len(medium.clip.encoded) / REPEAT_BYTES_PER_S if key in request.handed_out else 0.0
                asyncio.get_running_loop().call_later(GATHER_S + repeat_s, self._hand_out_groups, key)
            wanted.groups.append(medium.group)

    def _hand_out_groups(self, key: ClipKey) -> None:
        wanted = self._wanted.pop(key)
        clip, request = wanted.clip, wanted.request
        if self._open.get(request.request_id) is not request:
            return  # the scheduler hears of its end
        request.handed_out.add(key)
        groups = tuple(wanted.groups)
        decode = DecodeFrames(clip.encoded, clip.size, clip.target_size, groups, request.epoch)
        self._send_media(wanted.need, decode, tuple(group.mm_hash for group in groups))

    def _send_media(self, need: NeedMedia, decode: Decode | DecodeFrames, mm_hashes: tuple[MmHash, ...]) -> None:
        try:
            if self._media_epochs.get(need.media, need.epoch) == need.epoch and self._outbox.send(need.media, decode):
                return  # what went to a dead incarnation would not be missed by anybody
            self._tell_unsent(need.request_id, mm_hashes)
        except ChannelFull:
            loop = asyncio.get_running_loop()
            loop.call_later(MEDIA_RETRY_S, self._tell_unsent, need.request_id, mm_hashes)

    def _tell_unsent(self, request_id: RequestId, mm_hashes: tuple[MmHash, ...]) -> None:
        for mm_hash in mm_hashes:
            self._tell(MediaUnsent(request_id, mm_hash))


def unavailable(message: str) -> RequestError:
    return RequestError(f"{message}; try again", status=503, code="service_unavailable", retry_after_s=RETRY_AFTER_S)
