"""From a request's arrival to the last byte of its answer, for every route that generates."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Protocol

from aiohttp import web
from msgspec import Struct

from vlmrt.actors.edge.access_log import ANSWER, BROKEN
from vlmrt.actors.edge.body import read_json_body
from vlmrt.actors.edge.choice import Piece
from vlmrt.actors.edge.error_answers import LABEL
from vlmrt.actors.edge.generation import Answer, Generation, Generator
from vlmrt.actors.edge.open_answers import OpenAnswers
from vlmrt.actors.edge.open_requests import MediaBudget, MediaLease
from vlmrt.actors.edge.scheduler_link import LookUp, SchedulerLink
from vlmrt.actors.edge.stream import EventStream
from vlmrt.actors.edge.timelines import ABORTED, TIMELINE, OpenTimeline, Timelines, span_of
from vlmrt.runtime.config import ServerOptions
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.metrics import Metrics

MAX_NAMED_FIELDS = 16
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_FIELD_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)

logger = logging.getLogger(__name__)


class AnswerFormat(Protocol):
    """How one answer is written, whole or as server-sent events."""

    def whole(self, answer: Answer, choices: Sequence[Piece]) -> bytes:
        """The body; one piece for every choice, in order."""
        ...

    def begin(self, answer: Answer) -> bytes:
        """What goes out with the first token of any choice, and never earlier."""
        ...

    def news(self, answer: Answer, pieces: Sequence[Piece]) -> bytes: ...

    def end(self, answer: Answer) -> bytes:
        """What follows the last news of the last choice."""
        ...

    def failed(self, error: RequestError) -> bytes:
        """The end of a stream that broke after it began."""
        ...


class Prepared(Struct, frozen=True):
    """What the scheduler is to run and how it is answered; the body it came from is no longer held."""

    answer_id: str
    generations: tuple[Generation, ...]
    format: AnswerFormat
    stream: bool
    headers: dict[str, str] = {}


Prepare = Callable[[web.Request, MediaLease, LookUp], Awaitable[Prepared]]


class Responder:
    """Answers requests; one call of `post` each."""

    def __init__(
        self,
        options: ServerOptions,
        link: SchedulerLink,
        budget: MediaBudget,
        generator: Generator,
        open_answers: OpenAnswers,
        timelines: Timelines,
        metrics: Metrics,
        write_timeout_s: float,
    ) -> None:
        self._options = options
        self._link = link
        self._budget = budget
        self._generator = generator
        self._open = open_answers
        self._timelines = timelines
        self._metrics = metrics
        self._write_timeout_s = write_timeout_s

    async def post(self, request: web.Request, prepare: Prepare) -> web.StreamResponse:
        """Answer one request.  Cancelled when the client goes; then what runs for it is aborted."""
        with self._timelines.timeline(request[LABEL], request.path, _traceparent(request)) as timeline:
            request[TIMELINE] = timeline
            try:
                return await self._answer(request, prepare, timeline)
            except RequestError as error:
                timeline.outcome = error.code or str(error.status)
                raise
            except (asyncio.CancelledError, ConnectionResetError):
                timeline.outcome = ABORTED
                self._metrics.add("requests_aborted_total")
                raise
            except Exception:
                timeline.outcome = "internal_error"
                raise

    async def read_body(self, request: web.Request, lease: MediaLease) -> bytes:
        with span_of(request.get(TIMELINE), "receive"):
            return await read_json_body(request, self._options.max_body_mib << 20, lease)

    @asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """Raises: RequestError 504 where the block takes longer than a request may."""
        timeout_s = self._options.request_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise _too_late(timeout_s) from None

    def check_room(self, num_choices: int) -> None:
        """Raises: RequestError 400 or 429 where there is no room for so many, however long they take."""
        self._generator.check_room(num_choices)

    async def _answer(self, request: web.Request, prepare: Prepare, timeline: OpenTimeline) -> web.StreamResponse:
        self._link.check_takes_new()
        timeout_s = self._options.request_timeout_s
        with self._open.enter(request) as opened, self._budget.lease() as lease, self._link.look_up() as lookup:
            async with self.in_time():
                prepared = await prepare(request, lease, lookup)
            with (
                self._generator.run(prepared.answer_id, prepared.generations, timeline) as answer,
                _deadline(answer, timeline.arrived_s + timeout_s, timeout_s),
            ):
                opened.begin(prepared.answer_id, answer, streams=prepared.stream)
                request[ANSWER] = answer
                if prepared.stream:
                    return await self._stream(request, prepared, answer, timeline)
                return await self._whole(prepared, answer)

    async def _whole(self, prepared: Prepared, answer: Answer) -> web.Response:
        pieces: list[list[Piece]] = [[] for _ in range(answer.num_choices)]
        while not answer.ended:
            for piece in await answer.news():
                pieces[piece.index].append(piece)
        body = prepared.format.whole(answer, [_joined(of_one) for of_one in pieces])
        return web.Response(body=body, content_type="application/json", headers=_headers(prepared, answer))

    async def _stream(
        self, request: web.Request, prepared: Prepared, answer: Answer, timeline: OpenTimeline
    ) -> web.StreamResponse:
        pieces = await answer.news()  # an error until here is an ordinary answer with its own status
        stream = EventStream(request, _headers(prepared, answer), self._write_timeout_s)
        with timeline.span("stream"):
            try:
                await _write_all(stream, prepared.format, answer, pieces)
            except RequestError as error:
                if not stream.begun:
                    raise
                timeline.outcome = request[BROKEN] = error.code or str(error.status)
                self._metrics.add("request_errors_total", code=timeline.outcome)
                await stream.write(prepared.format.failed(error))
            except ConnectionError:
                raise
            except Exception:
                if not stream.begun:
                    raise
                logger.exception(
                    "%s failed while it was streamed", prepared.answer_id, extra={"request_id": request[LABEL]}
                )
                timeline.outcome = request[BROKEN] = "internal_error"
                self._metrics.add("request_errors_total", code="internal_error")
                internal = RequestError("internal error", status=500, code="internal_error")
                await stream.write(prepared.format.failed(internal))
            return await stream.close()


async def _write_all(stream: EventStream, form: AnswerFormat, answer: Answer, pieces: list[Piece]) -> None:
    """All events of an answer, of which these pieces are the first."""
    data = form.begin(answer)
    while True:
        data += form.news(answer, pieces)
        if answer.ended:
            data += form.end(answer)
        if data:
            await stream.write(data)
        if answer.ended:
            return
        pieces, data = await answer.news(), b""


def _traceparent(request: web.Request) -> str:
    """The W3C header of a client that traces its requests, as far as it is one."""
    header = request.headers.get("traceparent", "")
    return header if _TRACEPARENT.fullmatch(header) else ""


def _joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of one choice as one."""
    last = pieces[-1]
    return Piece(
        index=last.index,
        deltas=tuple(delta for piece in pieces for delta in piece.deltas),
        tokens=tuple(token for piece in pieces for token in piece.tokens),
        token_ids=tuple(token_id for piece in pieces for token_id in piece.token_ids),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )


def _headers(prepared: Prepared, answer: Answer) -> dict[str, str]:
    return {**prepared.headers, "openai-processing-ms": str(answer.elapsed_ms())}


@contextmanager
def _deadline(answer: Answer, at_s: float, timeout_s: float) -> Iterator[None]:
    """Fail the answer at a time of the monotonic clock."""
    loop = asyncio.get_running_loop()
    timer = loop.call_later(max(0.0, at_s - time.monotonic()), lambda: answer.fail(_too_late(timeout_s)))
    try:
        yield
    finally:
        timer.cancel()


def _too_late(timeout_s: float) -> RequestError:
    return RequestError(f"the request took longer than {timeout_s:g} s", status=504, code="request_timeout")


def ignored_fields(names: Sequence[str]) -> dict[str, str]:
    """The header that names the fields nobody reads, as far as a header may hold them."""
    shown = [name if _FIELD_NAME.fullmatch(name) else "?" for name in names[:MAX_NAMED_FIELDS]]
    return {"x-vlmrt-ignored": ",".join(shown + ["..."] * (len(names) > MAX_NAMED_FIELDS))} if names else {}
