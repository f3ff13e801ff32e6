"""The requests this edge has open at the scheduler, and the memory their media may take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from msgspec import Struct

from vlmrt.actors.edge.identify import IdentifiedClip, IdentifiedImage, SentMedium
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.messages import ActorName, Epoch, FrameGroup, MmHash, RequestId, TokenOutput
from vlmrt.runtime.timeline import Span

MAX_QUEUED_TOKENS = 65536  # of one request whose client does not read
RETRY_AFTER_S = 1


class MediaBudget:
    """Bytes of bodies and encoded media that open requests may hold together."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0

    @contextmanager
    def lease(self) -> Iterator[MediaLease]:
        """Whatever is still held at the end is given back."""
        lease = MediaLease(self)
        try:
            yield lease
        finally:
            lease.give_back(lease.held_bytes)


class MediaLease:
    """One request's share of the budget."""

    def __init__(self, budget: MediaBudget) -> None:
        self._budget = budget
        self.held_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Raises: RequestError 413 where no waiting would help, 429 where it may."""
        budget = self._budget
        if self.held_bytes + num_bytes > budget.max_bytes:
            raise RequestError(
                f"the request's media take {self.held_bytes + num_bytes} bytes, more than {budget.max_bytes}",
                status=413,
                code="media_too_large",
            )
        if budget.used_bytes + num_bytes > budget.max_bytes:
            raise RequestError(
                "the media of the open requests fill the memory set aside for them; try again",
                status=429,
                code="media_budget_exhausted",
                retry_after_s=RETRY_AFTER_S,
            )
        budget.used_bytes += num_bytes
        self.held_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        self._budget.used_bytes -= num_bytes
        self.held_bytes -= num_bytes


Record = Callable[[Sequence[Span]], object]  # what the scheduler tells of a request's time

ClipKey = tuple[RequestId, MmHash, ActorName, Epoch]  # the first group of a request's clip, for this media worker


class ClipGroup(Struct, frozen=True):
    """One temporal group of a clip, which may be asked for by itself."""

    clip: IdentifiedClip
    group: FrameGroup


class OpenRequest:
    """One request between its Submit and its end: outputs that wait for the client, media that may be asked for.

    Args: news is set whenever there is something to take; several requests may share it.
    """

    def __init__(
        self, request_id: RequestId, epoch: Epoch, media: Iterable[SentMedium], news: asyncio.Event, record: Record
    ) -> None:
        self.request_id = request_id
        self.epoch = epoch  # of the scheduler that has it
        self.media = _by_hash(media)
        self.handed_out: set[ClipKey] = set()
        self.ended = False  # by the scheduler, by an Abort, or because the scheduler died: no Abort is due
        self.error: RequestError | None = None
        self._news = news
        self._record = record
        self._outputs: list[TokenOutput] = []
        self._num_queued_tokens = 0

    def push(self, output: TokenOutput) -> None:
        """News from the scheduler.  A client that lets too much pile up loses its request."""
        if self.error is not None:
            return
        if output.spans:
            self._record(output.spans)
        if output.error is not None:
            self.ended = True
            self.fail(RequestError.from_wire(output.error))
            return
        self._num_queued_tokens += len(output.token_ids)
        if self._num_queued_tokens > MAX_QUEUED_TOKENS:
            self.fail(RequestError("the client reads too slowly", status=408, code="slow_client"))
            return
        self._outputs.append(output)
        if output.finish_reason is not None:
            self.ended = True
        self._news.set()

    def fail(self, error: RequestError) -> None:
        """End the request with an error, after the outputs that came before it."""
        if self.error is None:
            self.error = error
            self._news.set()

    def take(self) -> list[TokenOutput]:
        """All outputs since the last call.

        Raises: the RequestError that ended the request, once no outputs are left.
        """
        if self.error is not None and not self._outputs:
            raise self.error
        taken, self._outputs = self._outputs, []
        self._num_queued_tokens = 0
        return taken


def _by_hash(media: Iterable[SentMedium]) -> dict[MmHash, IdentifiedImage | ClipGroup]:
    found: dict[MmHash, IdentifiedImage | ClipGroup] = {}
    for medium in media:
        if isinstance(medium, IdentifiedImage):
            found[medium.mm_hash] = medium
        else:
            found.update((group.mm_hash, ClipGroup(medium, group)) for group in medium.groups)
    return found
