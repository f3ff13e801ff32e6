"""The supervisor's sockets for `vlmrt admin`: requests in, replies out, bounded, and never an end of the service.

The socket in the run directory is for this user alone, since nobody else may enter that directory.  One on TCP lets in
whoever has a key (admin_keys.py).  What is no request is counted and dropped; a client that does not read loses
replies, one that is gone is forgotten.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import zmq

from vlmrt.runtime.admin_desk import AdminDesk
from vlmrt.runtime.admin_keys import ZAP_DOMAIN, DoorKeeper, ServerKeys, bindable
from vlmrt.runtime.admin_messages import (
    MAX_REQUEST_BYTES,
    AdminDecoder,
    AdminReply,
    AdminRequest,
    GetStats,
    Refused,
    StatsReply,
    encode_admin_body,
    encode_admin_header,
)
from vlmrt.runtime.codec import BadFrame
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.metrics import Metrics
from vlmrt.runtime.transport import FramePump, Socket, new_context

MAX_ANSWERING = 64  # requests of all clients that wait for actors
_CHANNEL_BOUND = 16  # messages to or from one client; libzmq has no bound for the frames of one (docs/admin.md)
_BACKLOG = 64
_HANDSHAKE_MS = 5_000
_HEARTBEAT_MS = 10_000  # a client whose machine is gone is noticed by its silence
_HEARTBEAT_TIMEOUT_MS = 30_000

logger = logging.getLogger(__name__)


class AdminSocket:
    """One address.  `address` is, once bound, the one that clients connect to."""

    def __init__(
        self,
        context: zmq.Context[Socket],
        address: str,
        desk: AdminDesk,
        metrics: Metrics,
        keys: ServerKeys | None = None,
    ) -> None:
        """Raises StartupError where the address cannot be bound."""
        self._desk = desk
        self._metrics = metrics
        self._decoder = AdminDecoder[AdminRequest](AdminRequest)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stats: tuple[StatsReply, bytes] | None = None  # the last one, and as bytes
        self._socket = context.socket(zmq.ROUTER)
        self._set_options(address, keys)
        try:
            self._socket.bind(bindable(address) if address.startswith("tcp:") else address)
        except zmq.ZMQError as error:
            self._socket.close()
            raise StartupError(f"--admin-address {address}: cannot listen there: {error.strerror}") from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self._pump = FramePump(self._socket, self._deliver)

    def _set_options(self, address: str, keys: ServerKeys | None) -> None:
        options = {
            zmq.LINGER: 0,
            zmq.SNDHWM: _CHANNEL_BOUND,
            zmq.RCVHWM: _CHANNEL_BOUND,
            zmq.MAXMSGSIZE: MAX_REQUEST_BYTES,
            zmq.BACKLOG: _BACKLOG,
            zmq.HANDSHAKE_IVL: _HANDSHAKE_MS,
            zmq.HEARTBEAT_IVL: _HEARTBEAT_MS,
            zmq.HEARTBEAT_TIMEOUT: _HEARTBEAT_TIMEOUT_MS,
            zmq.IPV6: int("[" in address),
        }
        if keys is not None:
            options |= {zmq.CURVE_SERVER: 1}
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
            self._socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        for option, value in options.items():
            self._socket.setsockopt(option, value)

    def _deliver(self, frames: Sequence[bytes]) -> None:
        """Called from the event loop; what comes from outside raises nothing here."""
        try:
            ask_id, request = self._decoder.decode(frames[1:])
        except BadFrame:
            self._metrics.add("bad_frames_total")
            return
        if isinstance(request, GetStats):
            self._send(frames[0], ask_id, self._stats_now())
        elif len(self._tasks) >= MAX_ANSWERING:
            self._send(frames[0], ask_id, Refused(f"{MAX_ANSWERING} requests are being answered; try again"))
        else:
            task = asyncio.get_running_loop().create_task(self._answer(frames[0], ask_id, request), name="admin")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _stats_now(self) -> AdminReply:
        try:
            return self._desk.stats()
        except Exception as error:
            return _internal_error(GetStats(), error)

    async def _answer(self, client: bytes, ask_id: int, request: AdminRequest) -> None:
        try:
            reply = await self._desk.reply(request)
        except Exception as error:
            reply = _internal_error(request, error)
        self._send(client, ask_id, reply)

    def _send(self, client: bytes, ask_id: int, reply: AdminReply) -> None:
        try:
            self._socket.send_multipart((client, encode_admin_header(ask_id), self._encoded(reply)), zmq.NOBLOCK)
        except zmq.ZMQError as error:  # this reply is lost, and its client's deadline tells it so
            logger.debug("a reply could not be sent: %s", error)
        finally:
            self._pump.poke()

    def _encoded(self, reply: AdminReply) -> bytes:
        """Figures are encoded once, however many clients they go to."""
        if not isinstance(reply, StatsReply):
            return encode_admin_body(reply)
        if self._stats is None or self._stats[0] is not reply:
            self._stats = reply, encode_admin_body(reply)
        return self._stats[1]

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._pump.close()
        self._socket.close()


def _internal_error(request: AdminRequest, error: Exception) -> Refused:
    logger.error("%s could not be answered", type(request).__name__, exc_info=error)
    return Refused(f"internal error: {error!r}")


class AdminServer:
    """All addresses of a service: the one in its run directory, and one on TCP if there are keys for it."""

    def __init__(
        self,
        context: zmq.Context[Socket],
        desk: AdminDesk,
        metrics: Metrics,
        local_address: str,
        tcp_address: str | None = None,
        keys: ServerKeys | None = None,
    ) -> None:
        """Raises StartupError where an address cannot be bound."""
        self._sockets = [AdminSocket(context, local_address, desk, metrics)]
        self._tcp_context: zmq.Context[Socket] | None = None  # strangers' bytes have a thread of their own
        self._keeper: DoorKeeper | None = None
        if tcp_address is not None:
            assert keys is not None, "an open TCP address without keys"
            try:
                self._tcp_context = new_context()
                self._keeper = DoorKeeper(self._tcp_context, keys.clients, metrics)
                self._sockets.append(AdminSocket(self._tcp_context, tcp_address, desk, metrics, keys))
            except BaseException:
                self.close()
                raise

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(socket.address for socket in self._sockets)

    def close(self) -> None:
        for socket in self._sockets:
            socket.close()
        if self._keeper is not None:
            self._keeper.close()
        if self._tcp_context is not None:
            self._tcp_context.destroy(0)
