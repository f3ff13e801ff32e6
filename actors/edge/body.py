"""The body of a request, read within its limits."""

from __future__ import annotations

import asyncio

from aiohttp import web

from vlmrt.actors.edge.open_requests import MediaLease
from vlmrt.runtime.errors import RequestError

PAUSE_TIMEOUT_S = 30.0  # between two pieces of a body


async def read_json_body(request: web.Request, max_bytes: int, lease: MediaLease) -> bytes:
    """The whole body; refused from its headers alone where they say enough.

    Raises: RequestError 408, 413, 415, or 429 from the lease.
    """
    named = "Content-Type" in request.headers  # a body without a type is taken for what it has to be
    if named and request.content_type != "application/json" and not request.content_type.endswith("+json"):
        raise RequestError("the content type must be application/json", status=415, code="unsupported_media_type")
    if request.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        raise RequestError("compressed bodies are not accepted", status=415, code="unsupported_encoding")
    length = request.content_length
    if length is not None:
        if length > max_bytes:
            raise _too_large(max_bytes)
        lease.add(length)
    pieces: list[bytes] = []
    num_bytes = 0
    while piece := await _next_piece(request):
        num_bytes += len(piece)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        if length is None:
            lease.add(len(piece))
        pieces.append(piece)
    return b"".join(pieces)


async def _next_piece(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(PAUSE_TIMEOUT_S):
            return await request.content.readany()
    except TimeoutError:
        raise RequestError(
            f"no more of the body came for {PAUSE_TIMEOUT_S:g} s", status=408, code="body_timeout"
        ) from None
    except web.RequestPayloadError:
        raise RequestError("the body is cut short or wrongly framed", code="invalid_body") from None


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(f"the body has more than {max_bytes} bytes", status=413, code="body_too_large")
