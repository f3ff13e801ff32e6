"""The HTTP application: routes, API keys, request ids, and who may speak to it from a browser."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from functools import cached_property

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware
from msgspec import Struct

import vlmrt
from vlmrt.actors.edge.access_log import BROKEN, AccessLog
from vlmrt.actors.edge.anthropic_api import MessagesEndpoint
from vlmrt.actors.edge.api_keys import TENANT, ApiKeys
from vlmrt.actors.edge.chat import ChatEndpoint
from vlmrt.actors.edge.completions import CompletionEndpoint
from vlmrt.actors.edge.error_answers import ANTHROPIC, LABEL, error_response, from_http
from vlmrt.actors.edge.health import Health, LiveReport, Load, ResetReport, Version
from vlmrt.actors.edge.openapi import openapi_document
from vlmrt.actors.edge.page_files import PageConfig, PageFiles, accepts_html
from vlmrt.actors.edge.responses import encode_json
from vlmrt.actors.edge.responses_api import ResponsesEndpoint
from vlmrt.actors.edge.scheduler_link import SchedulerLink
from vlmrt.actors.edge.served_model import ModelList, ServedModel
from vlmrt.actors.edge.tokenization import TokenizationEndpoint
from vlmrt.runtime.config import Config
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.messages import PROTOCOL_VERSION
from vlmrt.runtime.metrics import Metrics
from vlmrt.runtime.prometheus import CONTENT_TYPE, prometheus_text
from vlmrt.runtime.service_stats import StatsHistory

REQUEST_ID = "x-request-id"
MAX_LINE_BYTES = 16 << 10
ALLOWED_HEADERS = "authorization, content-type, x-api-key, x-request-id"  # of a page that does not say what it sends
_LABEL = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_HEADER_NAMES = re.compile(r"[\w, -]{1,2048}", re.ASCII)
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class AppCollaborators(Struct, frozen=True):
    """What the routes answer with."""

    config: Config
    model: ServedModel
    chat: ChatEndpoint
    completions: CompletionEndpoint
    responses: ResponsesEndpoint
    messages: MessagesEndpoint
    tokenization: TokenizationEndpoint
    link: SchedulerLink
    health: Health
    stats: StatsHistory
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
            web.post("/v1/responses", collaborators.responses.post),
            web.post("/v1/messages", collaborators.messages.post),
            web.post("/v1/messages/count_tokens", collaborators.messages.count_tokens),
            web.post("/tokenize", collaborators.tokenization.tokenize),
            web.post("/detokenize", collaborators.tokenization.detokenize),
            web.get("/v1/models", routes.models),
            web.get("/v1/models/{id:.+}", routes.model),
            web.get("/health", routes.ready),
            web.get("/health/ready", routes.ready),
            web.get("/health/live", routes.live),
            web.get("/ping", routes.live),
            web.get("/version", routes.version),
            web.get("/load", routes.load),
            web.get("/metrics", routes.metrics),
            web.get("/stats", routes.stats),
            web.get("/openapi.json", routes.openapi),
        ]
    )
    if routes.page is not None:
        app.add_routes([web.get("/page/config", routes.page_config), web.get("/page/{file:.+}", routes.page.file)])
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
        self.page = PageFiles() if collaborators.config.server.page else None

    async def root(self, request: web.Request) -> web.Response:
        if self.page is not None and accepts_html(request):
            return self.page.index(request)
        name = self._with.model.names[0]
        return web.Response(text=f"vlmrt {vlmrt.__version__} serves {name}; the API is at /v1/chat/completions\n")

    async def page_config(self, request: web.Request) -> web.Response:
        return _json(PageConfig.of(self._with.config), headers={"Cache-Control": "no-store"})

    async def models(self, request: web.Request) -> web.Response:
        model = self._with.model
        return _json(ModelList(tuple(model.card(name, self._created) for name in model.names)))

    async def model(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        self._with.model.check(name)
        return _json(self._with.model.card(name, self._created))

    async def openapi(self, request: web.Request) -> web.Response:
        return web.Response(body=self._document, content_type="application/json")

    @cached_property
    def _document(self) -> bytes:
        return openapi_document(self._with.config.server)

    async def live(self, request: web.Request) -> web.Response:
        return _json(LiveReport())

    async def ready(self, request: web.Request) -> web.Response:
        report = self._with.health.report()
        headers = {} if report.ready else {"Retry-After": "1"}
        return _json(report, status=200 if report.ready else 503, headers=headers)

    async def version(self, request: web.Request) -> web.Response:
        hooks = self._with.config.supervision.fault_hooks
        return _json(Version(vlmrt.__version__, PROTOCOL_VERSION, hooks))

    async def load(self, request: web.Request) -> web.Response:
        return _json(Load(self._with.link.num_open))

    async def metrics(self, request: web.Request) -> web.Response:
        status = self._with.health.status
        if status is None:
            raise _not_yet("metrics")
        compat = self._with.config.server.metrics_compat == "vllm"
        text = prometheus_text(status, self._with.model.names[0] if compat else None)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})

    async def stats(self, request: web.Request) -> web.Response:
        stats = self._with.stats.stats()
        if stats is None:
            raise _not_yet("stats")
        return _json(stats, headers={"Cache-Control": "no-store"})

    async def reset_prefix_cache(self, request: web.Request) -> web.Response:
        await self._with.link.reset("prefix")
        return _json(ResetReport("prefix"))

    async def reset_mm_cache(self, request: web.Request) -> web.Response:
        await self._with.link.reset("embedding")
        return _json(ResetReport("embedding"))


class OriginPolicy:
    """Which browsers' pages may call: those of the server itself, and the origins of --cors-origins.

    A server on a loopback address answers only to local names, so that no foreign name can be pointed at it.
    """

    def __init__(self, config: Config) -> None:
        self._allowed = config.server.cors_origins
        self._local_names = (*_LOCAL_NAMES, config.server.host.lower()) if config.server.is_local else ()

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


def _host_name(host: str) -> str:
    """The Host header without its port."""
    host = host.lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")


def _guard(collaborators: AppCollaborators, origins: OriginPolicy) -> Middleware:
    """The outermost middleware: request id, origin, key, and every error as an error body."""
    metrics = collaborators.metrics
    keys = ApiKeys(collaborators.config.server.api_keys)
    access_log = AccessLog(collaborators.config.server)

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        label = request.headers.get(REQUEST_ID, "")
        request[LABEL] = label if _LABEL.fullmatch(label) else secrets.token_hex(16)
        with access_log.line(request) as line:
            response = await answer(request, handler)
            line.status = response.status
            return response

    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            origins.check(request)
            request[TENANT] = keys.check(request)
            response = await handler(request)
        except RequestError as error:
            request[BROKEN] = error.code or str(error.status)
            metrics.add("request_errors_total", code=request[BROKEN])
            response = error_response(error, request)
        except web.HTTPException as error:
            if request.method == hdrs.METH_OPTIONS and isinstance(error, web.HTTPMethodNotAllowed):
                response = _options(request, error)
            else:
                response = error_response(from_http(error, request), request, error)
        except ConnectionResetError:  # nobody is left to answer
            response = web.Response(status=499)
        except Exception:
            logger.exception("a request failed", extra={"request_id": request[LABEL]})
            request[BROKEN] = "internal_error"
            metrics.add("request_errors_total", code="internal_error")
            response = error_response(RequestError("internal error", status=500, code="internal_error"), request)
        metrics.add("http_requests_total", code=str(response.status))
        return response

    return guard


def _options(request: web.Request, refused: web.HTTPMethodNotAllowed) -> web.Response:
    """What a route allows; to a browser's page also what it may send there."""
    allow = ", ".join(sorted({*refused.allowed_methods, hdrs.METH_OPTIONS}))
    headers = {"Allow": allow}
    if "Access-Control-Request-Method" in request.headers:
        asked = request.headers.get("Access-Control-Request-Headers", "")
        headers["Access-Control-Allow-Methods"] = allow
        headers["Access-Control-Allow-Headers"] = asked if _HEADER_NAMES.fullmatch(asked) else ALLOWED_HEADERS
        headers["Access-Control-Max-Age"] = "600"
    return web.Response(status=204, headers=headers)


def _add_headers(origins: OriginPolicy) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
        response.headers[REQUEST_ID] = request.get(LABEL, "")
        if request.path.startswith(ANTHROPIC):
            response.headers["request-id"] = request.get(LABEL, "")
        origin = request.headers.get("Origin")
        if origin is not None and origins.allows(origin):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = f"{REQUEST_ID}, x-vlmrt-ignored"
            response.headers.add("Vary", "Origin")  # the page's has one already

    return add_headers


def _not_yet(what: str) -> RequestError:
    return RequestError(f"no {what} yet; try again", status=503, code="service_unavailable", retry_after_s=1)


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=encode_json(value), status=status, headers=headers, content_type="application/json")
