"""What the live view shows, look after look: from a service that may restart, or be gone for a while."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from vlmrt.runtime.admin_keys import ClientKeys
from vlmrt.runtime.admin_messages import (
    BeginDrain,
    CancelOne,
    CancelReply,
    DrainReply,
    EndDrain,
    GetRequests,
    GetStats,
    RequestsReply,
    StatsReply,
)
from vlmrt.tools.admin.client import AdminClient, AdminError, ServiceSilent

LOOK_TIMEOUT_S = 3.0  # then the service counts as gone until it answers
ORDER_TIMEOUT_S = 10.0

GONE = "gone, looking for it"

FindAddress = Callable[[], str]


class Look(Struct, frozen=True):
    """The last figures there are; `problem` says why they are not of now, in one line."""

    stats: StatsReply | None = None
    requests: RequestsReply | None = None
    problem: str = ""


class Feed:
    """Looks at a service and gives it orders.

    Args: `find` says where the service is, anew whenever it has fallen silent; it raises AdminError where there is
    none, or more than one.
    """

    def __init__(
        self, find: FindAddress, keys: ClientKeys | None = None, *, look_timeout_s: float = LOOK_TIMEOUT_S
    ) -> None:
        self._find = find
        self._keys = keys
        self._look_timeout_s = look_timeout_s
        self._client: AdminClient | None = None
        self._last = Look()

    async def look(self) -> Look:
        """Never raises for what the service does or is."""
        try:
            client = self._connected()
        except AdminError as error:
            self._last = self._without_news(str(error).splitlines()[0] if self._last.stats is None else GONE)
            return self._last
        try:
            stats = await client.ask(GetStats(), StatsReply, self._look_timeout_s)
            requests = await client.ask(GetRequests(), RequestsReply, self._look_timeout_s + ORDER_TIMEOUT_S)
            self._last = Look(stats, requests)
        except ServiceSilent:
            self.close()
            self._last = self._without_news(GONE)
        except AdminError as error:
            self._last = self._without_news(str(error))
        return self._last

    def _without_news(self, problem: str) -> Look:
        return Look(self._last.stats, self._last.requests, problem)

    async def cancel(self, id: str) -> int:
        """How many requests that ended.  Raises AdminError."""
        return (await self._connected().ask(CancelOne(id), CancelReply, ORDER_TIMEOUT_S)).num_answers

    async def drain(self, draining: bool) -> DrainReply:
        """Raises AdminError."""
        order = BeginDrain() if draining else EndDrain()
        return await self._connected().ask(order, DrainReply, ORDER_TIMEOUT_S)

    def _connected(self) -> AdminClient:
        if self._client is None:
            self._client = AdminClient(self._find(), self._keys)
        return self._client

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
