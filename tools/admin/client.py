"""One connection to a service's admin socket: a request out, its reply in, by a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TypeVar

import zmq

from vlmrt.runtime.admin_keys import ClientKeys
from vlmrt.runtime.admin_messages import (
    AdminDecoder,
    AdminReply,
    Refused,
    Reply,
    Request,
    encode_admin_body,
    encode_admin_header,
)
from vlmrt.runtime.codec import BadFrame
from vlmrt.runtime.errors import VlmrtError
from vlmrt.runtime.transport import FramePump, Socket, new_context

TIMEOUT_S = 10.0  # more than the server gives its actors
_RETRY_SEND_S = 0.02  # while there is no connection yet
_BOUND = 64
_MAX_REPLY_BYTES = 16 << 20

Expected = TypeVar("Expected", bound=Reply)


class AdminError(VlmrtError):
    """One line for a person: what was asked cannot be had."""


class ServiceSilent(AdminError):
    """Nothing answers at the address."""


def check_keys(address: str, keys: ClientKeys | None) -> None:
    """Raises AdminError where a key is missing, or has no use: either would only be met with silence."""
    is_tcp = address.startswith("tcp:")
    if is_tcp and keys is None:
        raise AdminError(f"--address {address}: needs --keys or --token-file, as the service was given them")
    if not is_tcp and keys is not None:
        raise AdminError(f"--keys and --token-file are for an --address tcp://HOST:PORT; {address} takes neither")


class AdminClient:
    """Made inside a running event loop; `async with AdminClient(address) as client: ...` or close()."""

    def __init__(self, address: str, keys: ClientKeys | None = None, timeout_s: float = TIMEOUT_S) -> None:
        """Connects in the background.  Raises AdminError if the address is none."""
        self.address = address
        self._timeout_s = timeout_s
        self._decoder = AdminDecoder[AdminReply](AdminReply)
        self._asked: dict[int, asyncio.Future[AdminReply]] = {}
        self._last_id = 0
        self._context = new_context()
        self._socket: Socket = self._context.socket(zmq.DEALER)
        options = {
            zmq.LINGER: 0,
            zmq.IMMEDIATE: 1,  # what nobody takes now is not kept until somebody does
            zmq.SNDHWM: _BOUND,
            zmq.RCVHWM: _BOUND,
            zmq.MAXMSGSIZE: _MAX_REPLY_BYTES,
            zmq.IPV6: 1,
        }
        for option, value in options.items():
            self._socket.setsockopt(option, value)
        if keys is not None:
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server)
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._socket.close()
            self._context.destroy(0)
            raise AdminError(f"--address {address}: {error.strerror}") from None
        self._pump = FramePump(self._socket, self._deliver)

    async def ask(self, request: Request, kind: type[Expected], timeout_s: float | None = None) -> Expected:
        """The reply.  Raises AdminError where it is Refused or of another kind, ServiceSilent where none comes."""
        timeout_s = timeout_s or self._timeout_s
        deadline_s = time.monotonic() + timeout_s
        self._last_id += 1
        ask_id = self._last_id
        reply: asyncio.Future[AdminReply] = asyncio.get_running_loop().create_future()
        self._asked[ask_id] = reply
        try:
            await self._send(ask_id, request, deadline_s)
            async with asyncio.timeout(deadline_s - time.monotonic()):
                found = await reply
        except TimeoutError:
            hint = "; a wrong key or token is not answered" if self.address.startswith("tcp:") else ""
            raise ServiceSilent(f"no answer from {self.address} within {timeout_s:g} s{hint}") from None
        finally:
            del self._asked[ask_id]
        if isinstance(found, Refused):
            raise AdminError(found.message)
        if not isinstance(found, kind):
            raise AdminError(f"the service answered {type(found).__name__} in place of {kind.__name__}")
        return found

    async def _send(self, ask_id: int, request: Request, deadline_s: float) -> None:
        frames = encode_admin_header(ask_id), encode_admin_body(request)
        while True:
            if self._socket.closed:  # while this waited for a connection
                raise ServiceSilent(f"no answer from {self.address}: it was given up")
            try:
                self._socket.send_multipart(frames, zmq.NOBLOCK)
            except zmq.Again:
                if time.monotonic() >= deadline_s:
                    raise TimeoutError from None
                await asyncio.sleep(_RETRY_SEND_S)
                continue
            finally:
                self._pump.poke()
            return

    def _deliver(self, frames: Sequence[bytes]) -> None:
        try:
            ask_id, reply = self._decoder.decode(frames)
        except BadFrame as error:
            for asked in self._asked.values():
                if not asked.done():
                    asked.set_exception(AdminError(f"the service speaks another language: {error}"))
            return
        found = self._asked.get(ask_id)
        if found is not None and not found.done():
            found.set_result(reply)

    def close(self) -> None:
        self._pump.close()
        self._socket.close()
        self._context.destroy(0)

    async def __aenter__(self) -> AdminClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
