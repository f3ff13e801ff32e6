"""Lines of a file of requests -> requests; results -> lines of answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from vlmrt.runtime.errors import RequestError, error_type
from vlmrt.tools.offline.client import CHAT_PATH, COMPLETIONS_PATH, Request, Result
from vlmrt.tools.offline.outputs import CompletionOutput, Usage, decode_answer

_PATHS = (CHAT_PATH, COMPLETIONS_PATH)
_MAX_CHOICES = 128


class Line(Struct, frozen=True):
    """One line that was read; where it holds no request, why."""

    custom_id: str
    is_batch: bool  # OpenAI's form, answered in OpenAI's form
    request: Request | RequestError


def read_line(text: bytes, number: int, defaults: Mapping[str, Mapping[str, Any]]) -> Line:
    """`number` counts from 1; `defaults` has, for each path, the fields for requests that do not say them."""
    custom_id, is_batch = f"line-{number}", False
    try:
        fields = msgspec.json.decode(text, type=dict[str, Any])
        given_id = fields.pop("custom_id", None)
        if given_id is not None and not isinstance(given_id, str):
            raise RequestError("custom_id is not a string", code="invalid_value", param="custom_id")
        custom_id = given_id or custom_id
        is_batch = "body" in fields
        path, body = _batch_request(fields) if is_batch else _plain_request(fields)
        if body.get("stream"):
            raise RequestError("stream = true: answers in a file are whole", param="stream", code="unsupported_value")
    except msgspec.MsgspecError as error:
        return Line(custom_id, is_batch, RequestError(f"the line is not a JSON object: {error}", code="invalid_json"))
    except RequestError as error:
        return Line(custom_id, is_batch, error)
    n = body.get("n")
    num_choices = n if isinstance(n, int) and 1 <= n <= _MAX_CHOICES else 1  # the service says what is wrong with it
    return Line(custom_id, is_batch, Request(path, {**defaults[path], **body}, num_choices))


def _batch_request(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    method, url, body = fields.get("method", "POST"), fields.get("url"), fields["body"]
    if method != "POST" or url not in _PATHS:
        raise RequestError(
            f"method {method!r:.40}, url {url!r:.100}: POST and one of {', '.join(_PATHS)} are expected",
            code="unsupported_value",
            param="url",
        )
    if not isinstance(body, dict):
        raise RequestError("body is not an object", code="invalid_value", param="body")
    return url, body


def _plain_request(fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if ("messages" in fields) == ("prompt" in fields):
        raise RequestError("exactly one of messages, prompt and body is needed", code="missing_field")
    return (CHAT_PATH if "messages" in fields else COMPLETIONS_PATH), fields


class _ErrorObject(Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class _BatchResponse(Struct):
    status_code: int
    request_id: str
    body: Any


class _BatchError(Struct):
    code: str | None
    message: str


class _BatchLine(Struct):
    id: str
    custom_id: str
    response: _BatchResponse
    error: _BatchError | None


class _AnswerLine(Struct, omit_defaults=True):
    custom_id: str
    outputs: tuple[CompletionOutput, ...] = ()
    usage: Usage | None = None
    error: _ErrorObject | None = None


class Written(Struct, frozen=True):
    """An answer's line, and what a count needs of it."""

    line: bytes
    failed: bool
    num_tokens: int = 0


def write_line(line: Line, result: Result) -> Written:
    if isinstance(result, RequestError):
        error = _ErrorObject(result.message, error_type(result.status), result.param, result.code)
        if not line.is_batch:
            return Written(_encode(_AnswerLine(line.custom_id, error=error)), failed=True)
        response = _BatchResponse(result.status, "", {"error": error})
        batch_error = _BatchError(result.code, result.message)
        return Written(_encode(_BatchLine(f"batch_req_{line.custom_id}", line.custom_id, response, batch_error)), True)
    answer = decode_answer(result.body)
    if line.is_batch:
        response = _BatchResponse(200, answer.id, msgspec.Raw(result.body))
        encoded = _encode(_BatchLine(f"batch_req_{line.custom_id}", line.custom_id, response, None))
    else:
        encoded = _encode(_AnswerLine(line.custom_id, answer.outputs, answer.usage))
    return Written(encoded, False, answer.usage.completion_tokens)


def _encode(value: Struct) -> bytes:
    return msgspec.json.encode(value) + b"\n"


class _Seen(Struct):
    """A line of answers, as far as it is read again."""

    custom_id: str
    error: Any = None


_seen_decoder = msgspec.json.Decoder(_Seen)


def answered_id(text: bytes) -> str | None:
    """Whose answer this line of a file of answers is; None: a failure.  Raises: ValueError for other lines."""
    try:
        seen = _seen_decoder.decode(text)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None
    return seen.custom_id if seen.error is None else None
