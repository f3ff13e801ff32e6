"""An error as a response: its status, its headers and the four keys of its body."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from aiohttp import web

from vlmrt.actors.edge.anthropic_errors import anthropic_error_body
from vlmrt.actors.edge.responses import error_body
from vlmrt.runtime.errors import RequestError

LABEL = web.RequestKey("label", str)  # what the client calls the request; never a key of ours
ANTHROPIC = "/v1/messages"  # and below it: errors have a body of another form
NOT_HERE = {  # what other servers have, and why this one does not
    "/v1/embeddings": "the model generates text and has no text embeddings",
    "/v1/score": "the model generates text and has no scores",
    "/v1/rerank": "the model generates text and does not rerank",
    "/v1/moderations": "the model generates text and does not classify it",
    "/v1/audio": "the model reads text and pictures, not sound",
    "/v1/images": "the model reads pictures and does not draw them",
    "/v1/files": "the server keeps no files; send pictures with the request",
    "/v1/batches": "the server keeps no batches; send the requests themselves, it batches those that run at once",
    "/v1/fine_tuning": "the server does not train",
    "/v1/assistants": "the server keeps no assistants; send the whole conversation",
    "/v1/threads": "the server keeps no threads; send the whole conversation",
}


def error_response(
    error: RequestError, request: web.BaseRequest, http: web.HTTPException | None = None
) -> web.Response:
    """Args: `http` is what the error came from, if anything: its Allow goes along."""
    if request.path.startswith(ANTHROPIC):
        body = anthropic_error_body(error, request.get(LABEL, ""))
    else:
        body = error_body(error)
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (499, 504):  # cancelled, or too late: what a client's library tries again would be as well
        headers["x-should-retry"] = "false"
    if http is not None and "Allow" in http.headers:
        headers["Allow"] = http.headers["Allow"]
    return web.Response(body=body, status=error.status, headers=headers, content_type="application/json")


def from_http(error: web.HTTPException, request: web.Request) -> RequestError:
    """What aiohttp raised before a route was reached."""
    match error.status:
        case 404:
            return RequestError(_no_route(request), status=404, code="route_not_found")
        case 405:
            return RequestError(
                f"the method {request.method[:20]} is not allowed here", status=405, code="method_not_allowed"
            )
        case 417:
            return RequestError("only the expectation 100-continue can be met", status=417, code="expectation_failed")
    return RequestError(error.reason, status=error.status)


def _no_route(request: web.Request) -> str:
    path = request.path
    for prefix, reason in NOT_HERE.items():
        if path == prefix or path.startswith(prefix + "/"):
            return f"there is no {prefix} here: {reason}"
    near = _near_route(path, {resource.canonical for resource in request.app.router.resources()})
    return "there is no such route" + (f"; did you mean {near}?" if near else "")


def _near_route(path: str, routes: Iterable[str]) -> str | None:
    """A client's base URL often lacks /v1 or has it twice."""
    wanted = "/v1/" + path[:200].lower().strip("/").removeprefix("v1/").removeprefix("v1/")
    found = difflib.get_close_matches(wanted, sorted(routes), 1, 0.9)
    return found[0] if found else None
