"""The HTTP application: routes, error bodies, request ids, and who may speak to it from a browser."""

from __future__ import annotations

import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware
from msgspec import Struct

import vlmrt
from vlmrt.actors.edge.chat import ChatEndpoint
from vlmrt.actors.edge.completions import CompletionEndpoint
from vlmrt.actors.edge.health import Health
from vlmrt.actors.edge.responses import ModelCard, ModelList, encode_json, error_body
from vlmrt.actors.edge.scheduler_link import SchedulerLink
from vlmrt.actors.edge.served_model import ALIAS
from vlmrt.actors.edge.tokenization import TokenizationEndpoint
from vlmrt.runtime.config import Config
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.messages import PROTOCOL_VERSION
from vlmrt.runtime.metrics import Metrics, prometheus_text

REQUEST_ID = "x-request-id"
LABEL = web.RequestKey("label", str)  # what the client calls the request; never a key of ours
MAX_LINE_BYTES = 16 << 10
_LABEL = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class AppCollaborators(Struct, frozen=True):
    """What the routes answer with."""

    config: Config
    chat: ChatEndpoint
    completions: CompletionEndpoint
    tokenization: TokenizationEndpoint
    link: SchedulerLink
    health: Health
    metrics: Metrics


def build_app(collaborators: AppCollaborators) -> web.Application:
    """All routes of the edge.  Whatever goes wrong in one is answered with the four keys of an OpenAI error."""
    routes = Routes(collaborators)
    origins = OriginPolicy(collaborators.config)
    app = web.Application(middlewares=[_guard(collaborators, origins)], client_max_size=1)
    app.on_response_prepare.append(_add_headers(origins))
    app.add_routes(
        [
            web.get("/", routes.root),
            web.post("/v1/chat/completions", collaborators.chat.post),
            web.post("/v1/completions", collaborators.completions.post),
            web.post("/tokenize", collaborators.tokenization.tokenize),
            web.post("/detokenize", collaborators.tokenization.detokenize),
            web.get("/v1/models", routes.models),
            web.get("/v1/models/{id:.+}", routes.model),
            web.get("/health", routes.ready),
            web.get("/health/ready", routes.ready),
            web.get("/health/live", routes.live),
            web.get("/ping", routes.live),
            web.get("/version", routes.version),
            web.get("/metrics", routes.metrics),
        ]
    )
    if collaborators.config.server.admin_routes:
        app.add_routes(
            [
                web.post("/reset_prefix_cache", routes.reset_prefix_cache),
                web.post("/reset_mm_cache", routes.reset_mm_cache),
            ]
        )
    return app


class Routes:
    """The small answers."""

    def __init__(self, collaborators: AppCollaborators) -> None:
        self._with = collaborators
        self._created = int(time.time())

    async def root(self, request: web.Request) -> web.Response:
        name = self._with.config.model.served_names[0]
        return web.Response(text=f"vlmrt {vlmrt.__version__} serves {name}; the API is at /v1/chat/completions\n")

    async def models(self, request: web.Request) -> web.Response:
        cards = tuple(self._card(name) for name in self._with.config.model.served_names)
        return _json(ModelList(cards))

    async def model(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        if name not in (ALIAS, *self._with.config.model.served_names):
            raise RequestError(
                f"the model {name[:100]!r} does not exist", status=404, code="model_not_found", param="model"
            )
        return _json(self._card(name))

    def _card(self, name: str) -> ModelCard:
        return ModelCard(name, self._created, self._with.config.model.max_model_len)

    async def live(self, request: web.Request) -> web.Response:
        return _json({"status": "live"})

    async def ready(self, request: web.Request) -> web.Response:
        report = self._with.health.report()
        headers = {} if report.ready else {"Retry-After": "1"}
        return _json(report, status=200 if report.ready else 503, headers=headers)

    async def version(self, request: web.Request) -> web.Response:
        hooks = self._with.config.supervision.fault_hooks
        return _json({"version": vlmrt.__version__, "protocol": PROTOCOL_VERSION, "fault_hooks": hooks})

    async def metrics(self, request: web.Request) -> web.Response:
        status = self._with.health.status
        if status is None:
            raise RequestError("no metrics yet; try again", status=503, code="service_unavailable", retry_after_s=1)
        return web.Response(
            body=prometheus_text(status), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def reset_prefix_cache(self, request: web.Request) -> web.Response:
        await self._with.link.reset("prefix")
        return _json({"reset": "prefix"})

    async def reset_mm_cache(self, request: web.Request) -> web.Response:
        await self._with.link.reset("embedding")
        return _json({"reset": "embedding"})


class OriginPolicy:
    """Which browsers' pages may call: those of the server itself, and the origins of --cors-origins.

    A server on a loopback address answers only to local names, so that no foreign name can be pointed at it.
    """

    def __init__(self, config: Config) -> None:
        self._allowed = config.server.cors_origins
        host = config.server.host.lower()
        self._local_names = (*_LOCAL_NAMES, host) if _is_loopback(host) else ()

    def check(self, request: web.Request) -> None:
        """Raises: RequestError 403."""
        host = _host_name(request.headers.get("Host", ""))
        if self._local_names and host not in self._local_names and not host.endswith(".localhost"):
            raise RequestError("this server answers to local host names only", status=403, code="host_not_allowed")
        origin = request.headers.get("Origin")
        if origin is not None and not self.allows(origin) and not self._is_own(origin, request):
            raise RequestError("this origin is not among --cors-origins", status=403, code="origin_not_allowed")

    def allows(self, origin: str) -> bool:
        return origin in self._allowed or "*" in self._allowed

    def _is_own(self, origin: str, request: web.Request) -> bool:
        return origin.partition("://")[2].lower() == request.headers.get("Host", "").lower() != ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host_name(host: str) -> str:
    """The Host header without its port."""
    host = host.lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")


def _guard(collaborators: AppCollaborators, origins: OriginPolicy) -> Middleware:
    """The outermost middleware: request id, origin, and every error as an error body."""
    metrics = collaborators.metrics

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        label = request.headers.get(REQUEST_ID, "")
        request[LABEL] = label if _LABEL.fullmatch(label) else secrets.token_hex(16)
        try:
            origins.check(request)
            response = _preflight(request) or await handler(request)
        except RequestError as error:
            metrics.add("request_errors_total", code=error.code or str(error.status))
            response = _error_response(error)
        except web.HTTPException as error:
            response = _error_response(_from_http(error, request), error)
        except ConnectionResetError:  # nobody is left to answer
            response = web.Response(status=499)
        except Exception:
            logger.exception("request %s failed", request[LABEL])
            metrics.add("request_errors_total", code="internal_error")
            response = _error_response(RequestError("internal error", status=500, code="internal_error"))
        metrics.add("http_requests_total", code=str(response.status))
        return response

    return guard


def _preflight(request: web.Request) -> web.Response | None:
    if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
        return None
    return web.Response(
        status=204,
        headers={
            "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
            "Access-Control-Allow-Headers": "authorization, content-type, x-request-id",
            "Access-Control-Max-Age": "600",
        },
    )


def _from_http(error: web.HTTPException, request: web.Request) -> RequestError:
    match error.status:
        case 404:
            return RequestError("there is no such route", status=404, code="route_not_found")
        case 405:
            return RequestError(
                f"the method {request.method[:20]} is not allowed here", status=405, code="method_not_allowed"
            )
    return RequestError(error.reason, status=error.status)


def _error_response(error: RequestError, http: web.HTTPException | None = None) -> web.Response:
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 504:
        headers["x-should-retry"] = "false"
    if http is not None and "Allow" in http.headers:
        headers["Allow"] = http.headers["Allow"]
    return web.Response(body=error_body(error), status=error.status, headers=headers, content_type="application/json")


def _add_headers(origins: OriginPolicy) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
        response.headers[REQUEST_ID] = request.get(LABEL, "")
        origin = request.headers.get("Origin")
        if origin is not None and origins.allows(origin):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = f"{REQUEST_ID}, x-vlmrt-ignored"
            response.headers["Vary"] = "Origin"

    return add_headers


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=encode_json(value), status=status, headers=headers, content_type="application/json")
