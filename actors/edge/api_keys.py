"""Who may ask, and whose cached work a request may meet."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from aiohttp import web

from vlmrt.runtime.config import ApiKey, api_key_digest
from vlmrt.runtime.errors import RequestError

TENANT = web.RequestKey("tenant", str)
OPEN_ROUTES = frozenset(
    (
        "/",
        "/page/config",
        "/page/{file}",
        "/health",
        "/health/live",
        "/health/ready",
        "/ping",
        "/version",
        "/metrics",
        "/openapi.json",
    )
)
SEPARATOR = " "  # of a tenant and a salt; neither has one, so no two pairs of them look alike


class ApiKeys:
    """The server's keys; without any, everybody may ask."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = tuple(keys)

    def check(self, request: web.Request) -> str:
        """The tenant whose key the request brings; empty if the key has none, or none is asked for.

        Raises: RequestError 401.
        """
        if not self._keys or _is_open(request):
            return ""
        sent = _sent_key(request)
        if sent is None:
            raise _refused("an API key is required, as Authorization: Bearer KEY or x-api-key: KEY")
        digest, found = api_key_digest(sent), None
        for key in self._keys:  # all of them, so that the time says nothing
            if hmac.compare_digest(key.digest, digest):
                found = key
        if found is None:
            raise _refused("the API key is not one of this server's")
        return found.tenant


def tenant_salt(request: web.Request, cache_salt: str | None) -> str:
    """The salt that keeps a request's cached work to its tenant.

    A salt without a space is of no tenant, one with a space is of the tenant before it: whatever a client chooses, it
    stays among its own.

    Raises: RequestError 400 where the client's salt has a space.
    """
    salt = cache_salt or ""
    if SEPARATOR in salt:
        raise RequestError("cache_salt may not hold a space", param="cache_salt", code="invalid_value")
    tenant = request.get(TENANT, "")
    return f"{tenant}{SEPARATOR}{salt}" if tenant else salt


def _is_open(request: web.Request) -> bool:
    """By the route that was found, not by how the path was written."""
    resource = request.match_info.route.resource
    return request.method == "OPTIONS" or (resource is not None and resource.canonical in OPEN_ROUTES)


def _sent_key(request: web.Request) -> str | None:
    scheme, _, key = request.headers.get("Authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return request.headers.get("x-api-key")


def _refused(message: str) -> RequestError:
    return RequestError(message, status=401, code="invalid_api_key")
