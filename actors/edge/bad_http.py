"""What is not HTTP is answered as every other error, and leaves no traceback in the log."""

from __future__ import annotations

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong

from vlmrt.actors.edge.error_answers import error_response, from_http
from vlmrt.runtime.errors import RequestError


class EdgeRunner(web.AppRunner):
    """An AppRunner whose connections say in an error body what they could not read."""

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        return _Server(
            server.request_handler,
            request_factory=server.request_factory,
            handler_cancellation=server.handler_cancellation,
            **{name: value for name, value in self._kwargs.items() if name != "handler_cancellation"},
        )


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(web.RequestHandler):
    __slots__ = ()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        if isinstance(resp, web.HTTPException):  # raised before any middleware was reached
            assert isinstance(request, web.Request)
            resp = error_response(from_http(resp, request), request, resp)
        return await super().finish_response(request, resp, start_time)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if isinstance(exc, HttpProcessingError):
            return _closing(_unreadable(exc), request)
        super().handle_error(request, status, exc, message)  # logs it; raises where an answer has begun
        return _closing(RequestError("internal error", status=500, code="internal_error"), request)


def _unreadable(error: HttpProcessingError) -> RequestError:
    if isinstance(error, LineTooLong):
        return RequestError(f"a line of the head has more than {error.args[1]} bytes", code="invalid_http")
    return RequestError("what came is not HTTP", code="invalid_http")


def _closing(error: RequestError, request: web.BaseRequest) -> web.Response:
    response = error_response(error, request)
    response.force_close()
    return response
