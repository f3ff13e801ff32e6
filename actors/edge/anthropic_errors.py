"""Errors as Anthropic's clients read them."""

from __future__ import annotations

from msgspec import Struct

from vlmrt.actors.edge.responses import encode_json
from vlmrt.runtime.errors import RequestError

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class AnthropicErrorDetail(Struct, frozen=True):
    type: str
    message: str
    param: str | None
    code: str | None


class AnthropicError(Struct, frozen=True, tag_field="type", tag="error"):
    error: AnthropicErrorDetail
    request_id: str | None


def anthropic_error_body(error: RequestError, label: str) -> bytes:
    """With the param and code of our own errors beside what Anthropic's have."""
    kind = ERROR_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    detail = AnthropicErrorDetail(kind, error.message, error.param, error.code)
    return encode_json(AnthropicError(detail, label or None))
