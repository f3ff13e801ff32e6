"""Requests to the service of this process: bounded in number and in bytes, tried again where that can help."""

from __future__ import annotations

import asyncio
import io
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
from msgspec import Struct

from vlmrt.runtime.errors import RequestError
from vlmrt.tools.offline.messages import PicturePart, encode_body, picture_parts

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
IGNORED_FIELDS = "x-vlmrt-ignored"
MAX_BYTES_IN_FLIGHT = 256 << 20  # of bodies; one larger than that goes alone
_MAX_NAMES = 65536  # as many as a server remembers
_MAX_LOST_CONNECTIONS = 3  # of one request: it may be what ends the process that serves it
_LOST_PAUSE_S = 0.2
_MAX_PAUSE_S = 5.0
_HOST = "http://localhost"  # whatever the socket's path
_JSON = {"Content-Type": "application/json"}


class Request(Struct, frozen=True):
    """One call of an endpoint; `fields` may hold PictureParts in its messages."""

    path: str
    fields: Mapping[str, Any]
    num_choices: int = 1

    @property
    def pictures(self) -> list[PicturePart]:
        return list(picture_parts(self.fields.get("messages", ())))


class Answered(Struct, frozen=True):
    """What the service said, with status 200."""

    body: bytes
    ignored_fields: str = ""


Result = Answered | RequestError


class Gate:
    """Lets pass while the sum of what is inside is at most `size`, in order of arrival."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._free = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def passing(self, weight: int) -> AsyncIterator[None]:
        """What weighs more than the whole goes alone."""
        weight = min(weight, self._size)
        await self.enter(weight)
        try:
            yield
        finally:
            self.leave(weight)

    async def enter(self, weight: int) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((weight, turn))
        self._let_in()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was let in and never knew
                self._free += weight
            self._let_in()
            raise

    def leave(self, weight: int) -> None:
        self._free += weight
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and (self._waiting[0][1].done() or self._waiting[0][0] <= self._free):
            weight, turn = self._waiting.popleft()
            if not turn.done():
                self._free -= weight
                turn.set_result(None)


class Client:
    """Speaks to one service.  Used in one event loop."""

    def __init__(self, session: aiohttp.ClientSession, executor: Executor, max_choices: int) -> None:
        """`max_choices` answers are asked for at once, over all requests."""
        self._session = session
        self._executor = executor
        self._max_choices = max_choices
        self._choices = Gate(max_choices)
        self._bytes = Gate(MAX_BYTES_IN_FLIGHT)
        self._names: dict[str, None] = {}  # of pictures that the service has seen, the latest last

    async def answer_all(
        self, requests: AsyncIterator[Request | RequestError], deliver: Callable[[int, Result], None]
    ) -> None:
        """`requests` are taken as there is room for them; `deliver` gets each one's place and result as they come.

        What is an error already is its own result.  Raises: OSError of `requests` and `deliver`.
        """

        async def one(index: int, request: Request, weight: int) -> None:
            try:
                result = await self.answer(request)
            finally:
                self._choices.leave(weight)
            deliver(index, result)

        index = 0
        try:
            async with asyncio.TaskGroup() as tasks:
                async for request in requests:
                    if isinstance(request, RequestError):
                        deliver(index, request)
                    else:
                        weight = min(request.num_choices, self._max_choices)
                        await self._choices.enter(weight)
                        tasks.create_task(one(index, request, weight))
                    index += 1
        except* OSError as errors:
            raise errors.exceptions[0] from None

    async def answer(self, request: Request) -> Result:
        """One request to its end; what fails for good is returned."""
        pictures = request.pictures
        try:
            result = await self._answer(request, pictures, self._names)
            if isinstance(result, RequestError) and result.code == "media_not_cached":
                result = await self._answer(request, pictures, {})
            if isinstance(result, Answered):
                self._remember(pictures)
            return result
        except (ValueError, TypeError) as error:  # a picture or another value that cannot be sent
            return RequestError(str(error), code="invalid_value")
        finally:
            for part in pictures:
                part.picture.release()

    async def _answer(self, request: Request, pictures: Sequence[PicturePart], known: Mapping[str, None]) -> Result:
        sent = [part.picture for part in pictures if part.name not in known]
        async with self._bytes.passing(sum({id(picture): picture.num_bytes for picture in sent}.values())):
            body = await self._encode(request, pictures, known)
            return await self._post(request.path, body)

    async def _encode(self, request: Request, pictures: Sequence[PicturePart], known: Mapping[str, None]) -> bytes:
        if not pictures:
            return encode_body(request.fields, known)

        def encode() -> bytes:
            for part in pictures:
                if part.name not in known:
                    part.picture.encode()
            return encode_body(request.fields, known)

        return await asyncio.get_running_loop().run_in_executor(self._executor, encode)

    async def _post(self, path: str, body: bytes) -> Result:
        num_lost = 0
        while True:
            try:
                async with self._session.post(_HOST + path, data=io.BytesIO(body), headers=_JSON) as response:
                    answer = await response.read()
            except (aiohttp.ClientError, OSError) as error:
                num_lost += 1
                if num_lost == _MAX_LOST_CONNECTIONS:
                    return RequestError(
                        f"the connection was lost {num_lost} times: {error}", status=502, code="connection_lost"
                    )
                await asyncio.sleep(_LOST_PAUSE_S * num_lost)
                continue
            if response.status == 200:
                return Answered(answer, response.headers.get(IGNORED_FIELDS, ""))
            retry_after = response.headers.get("Retry-After", "")
            if response.status not in (429, 503) or not retry_after.isdigit():
                return _error(response.status, answer)
            await asyncio.sleep(min(float(retry_after), _MAX_PAUSE_S) * random.uniform(0.5, 1.0))

    def _remember(self, pictures: Sequence[PicturePart]) -> None:
        for part in pictures:
            if name := part.name:
                self._names.pop(name, None)
                self._names[name] = None
        while len(self._names) > _MAX_NAMES:
            del self._names[next(iter(self._names))]


class _ErrorDetail(Struct):
    message: str
    code: str | None = None
    param: str | None = None


class _ErrorBody(Struct):
    error: _ErrorDetail


def _error(status: int, body: bytes) -> RequestError:
    try:
        detail = msgspec.json.decode(body, type=_ErrorBody).error
    except msgspec.MsgspecError:
        detail = _ErrorDetail(f"status {status}: {body[:200].decode(errors='replace')}")
    return RequestError(detail.message, status=status, code=detail.code, param=detail.param)
