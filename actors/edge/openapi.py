"""The OpenAPI document of the edge, made from the Structs that its routes read and answer with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import NODEFAULT, Raw, Struct

import vlmrt
from vlmrt.actors.edge.anthropic_errors import AnthropicError
from vlmrt.actors.edge.anthropic_format import AnthropicMessage, TokenCount
from vlmrt.actors.edge.anthropic_request import MessagesRequest
from vlmrt.actors.edge.api_keys import OPEN_ROUTES
from vlmrt.actors.edge.chat_request import ChatRequest
from vlmrt.actors.edge.completion_request import CompletionRequest
from vlmrt.actors.edge.error_answers import ANTHROPIC
from vlmrt.actors.edge.health import HealthReport, LiveReport, Load, ResetReport, Version
from vlmrt.actors.edge.page_files import MEDIA_TYPES, PageConfig
from vlmrt.actors.edge.responses import (
    ChatCompletion,
    DetokenizeAnswer,
    ErrorBody,
    TextCompletion,
    TokenizeAnswer,
    encode_json,
)
from vlmrt.actors.edge.responses_format import ResponseObject
from vlmrt.actors.edge.responses_request import ResponsesRequest
from vlmrt.actors.edge.served_model import ModelCard, ModelList
from vlmrt.actors.edge.tokenization import DetokenizeRequest, TokenizeRequest
from vlmrt.runtime.config import ServerOptions
from vlmrt.runtime.service_stats import ServiceStats

TEXT = "text/plain"
HTML = "text/html"
JSON = "application/json"
EVENTS = "text/event-stream"
REF = "#/components/schemas/{name}"
SECURITY: list[dict[str, list[str]]] = [{"bearer": []}, {"x-api-key": []}]

STATUSES = {
    400: "A field, or HTTP itself, is wrong; the message names field, value and bound",
    401: "No API key, or none of this server's",
    403: "Asked under a foreign host name, or by a page of an origin that is not allowed",
    404: "There is no such model, or file",
    408: "The body stopped coming",
    413: "The body is too large",
    415: "The body is not JSON, or is compressed",
    429: "Too many requests wait, or hold media; try again",
    500: "A defect of the server",
    503: "The service is starting, restarting or shutting down; try again",
    504: "The request took too long",
}
HEADERS = {
    401: {"WWW-Authenticate": {"schema": {"type": "string", "const": "Bearer"}}},
    429: {"Retry-After": {"schema": {"type": "integer", "minimum": 1, "maximum": 60}}},
    503: {"Retry-After": {"schema": {"type": "integer", "minimum": 1, "maximum": 60}}},
}
EVERYWHERE = (400, 403, 500)
READING = (404, 408, 413, 415, 429)  # a body
GENERATING = (*READING, 503, 504)


class Operation(Struct, frozen=True, kw_only=True):
    """One method of one route.  EVERYWHERE's errors come with each."""

    method: Literal["get", "post"] = "get"
    path: str
    summary: str
    answer: type[Struct] | None  # None: a text
    texts: tuple[str, ...] = (TEXT,)  # media types of a text
    body: type[Struct] | None = None
    events: str = ""  # of the streamed form of the answer; empty: it has none
    errors: tuple[int, ...] = ()
    answers: tuple[int, ...] = (200,)  # statuses with which `answer` comes
    path_parameters: tuple[str, ...] = ()
    admin: bool = False  # there only with --admin-routes
    page: bool = False  # not there with --no-page

    @property
    def key(self) -> tuple[str, str]:
        return self.method.upper(), self.path


OPERATIONS = (
    Operation(path="/", summary="What this is; to a browser, the page", answer=None, texts=(TEXT, HTML)),
    Operation(path="/page/config", summary="What bounds the page's requests", answer=PageConfig, page=True),
    Operation(
        path="/page/{file}",
        summary="What the page loads",
        answer=None,
        texts=tuple(sorted({*MEDIA_TYPES.values()} - {HTML})),
        errors=(404,),
        path_parameters=("file",),
        page=True,
    ),
    Operation(
        method="post",
        path="/v1/chat/completions",
        summary="Answer a conversation with pictures and videos",
        body=ChatRequest,
        answer=ChatCompletion,
        events="`data:` lines, each with a chat.completion.chunk; an error is one with `error`; the last is [DONE]",
        errors=GENERATING,
    ),
    Operation(
        method="post",
        path="/v1/completions",
        summary="Continue prompts without a chat template",
        body=CompletionRequest,
        answer=TextCompletion,
        events="`data:` lines, each with a text_completion; an error is one with `error`; the last is [DONE]",
        errors=GENERATING,
    ),
    Operation(
        method="post",
        path="/v1/responses",
        summary="Answer input items, as OpenAI's Responses API",
        body=ResponsesRequest,
        answer=ResponseObject,
        events="typed events, from response.created to response.completed, response.incomplete or response.failed",
        errors=GENERATING,
    ),
    Operation(
        method="post",
        path="/v1/messages",
        summary="Answer messages, as Anthropic's API",
        body=MessagesRequest,
        answer=AnthropicMessage,
        events="typed events, from message_start to message_stop, or an event error",
        errors=GENERATING,
    ),
    Operation(
        method="post",
        path="/v1/messages/count_tokens",
        summary="The length of the prompt that such a request makes",
        body=MessagesRequest,
        answer=TokenCount,
        errors=GENERATING,
    ),
    Operation(
        method="post",
        path="/tokenize",
        summary="The tokens of a prompt or conversation",
        body=TokenizeRequest,
        answer=TokenizeAnswer,
        errors=GENERATING,
    ),
    Operation(
        method="post",
        path="/detokenize",
        summary="The text of tokens",
        body=DetokenizeRequest,
        answer=DetokenizeAnswer,
        errors=READING,
    ),
    Operation(path="/v1/models", summary="The names of the served model", answer=ModelList),
    Operation(
        path="/v1/models/{id}",
        summary="One of them; the name may hold slashes",
        answer=ModelCard,
        errors=(404,),
        path_parameters=("id",),
    ),
    Operation(path="/health", summary="As /health/ready", answer=HealthReport, answers=(200, 503)),
    Operation(path="/health/ready", summary="Is the service ready", answer=HealthReport, answers=(200, 503)),
    Operation(path="/health/live", summary="Does the server answer", answer=LiveReport),
    Operation(path="/ping", summary="As /health/live", answer=LiveReport),
    Operation(path="/version", summary="Of the server", answer=Version),
    Operation(path="/load", summary="Requests being answered", answer=Load),
    Operation(path="/metrics", summary="For Prometheus", answer=None, errors=(503,)),
    Operation(path="/stats", summary="How the service does, in figures", answer=ServiceStats, errors=(503,)),
    Operation(path="/openapi.json", summary="This document", answer=None, texts=()),
    Operation(
        method="post",
        path="/reset_prefix_cache",
        summary="Forget the keys and values of earlier prompts",
        answer=ResetReport,
        errors=(503, 504),
        admin=True,
    ),
    Operation(
        method="post",
        path="/reset_mm_cache",
        summary="Forget the embeddings and names of earlier pictures",
        answer=ResetReport,
        errors=(503, 504),
        admin=True,
    ),
)


def openapi_document(server: ServerOptions) -> bytes:
    """The document of a server with these options: admin routes and keys are in it where the server has them."""
    operations = [
        operation
        for operation in OPERATIONS
        if (server.admin_routes or not operation.admin) and (server.page or not operation.page)
    ]
    guarded = bool(server.api_keys)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        is_guarded = guarded and operation.path not in OPEN_ROUTES
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, is_guarded)
    components: dict[str, Any] = {"schemas": _schemas(operations), "responses": _error_responses()}
    if guarded:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
    return encode_json(
        {
            "openapi": "3.1.0",
            "info": {"title": "vlmrt", "version": vlmrt.__version__, "summary": "OpenAI's API for Qwen-VL models"},
            "paths": paths,
            "components": components,
        }
    )


def _operation(operation: Operation, is_guarded: bool) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": f"{operation.method}_{_word(operation.path)}",
        "summary": operation.summary,
        "parameters": [
            *(
                {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
                for name in operation.path_parameters
            ),
            {
                "name": "x-request-id",
                "in": "header",
                "description": "comes back with the answer; what is not [A-Za-z0-9_.:-]{1,128} is replaced",
                "schema": {"type": "string"},
            },
        ],
        "responses": _responses(operation, is_guarded),
    }
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": _ref(operation.body)}}}
    if is_guarded:
        described["security"] = SECURITY
    return described


def _word(path: str) -> str:
    """A path as a part of a name in a program."""
    return "_".join(piece for piece in path.translate(str.maketrans("/{}.-", "     ")).split()) or "root"


def _responses(operation: Operation, is_guarded: bool) -> dict[str, Any]:
    errors = sorted({*EVERYWHERE, *operation.errors, *((401,) if is_guarded else ())} - set(operation.answers))
    content: dict[str, Any] = {}
    if operation.answer is not None:
        content[JSON] = {"schema": _ref(operation.answer)}
    elif operation.path == "/openapi.json":
        content[JSON] = {"schema": {"type": "object"}}
    content |= {text: {"schema": {"type": "string"}} for text in operation.texts if operation.answer is None}
    if operation.events:
        content[EVENTS] = {"schema": {"description": operation.events}}  # readers differ in what they take an event for
    answers = {
        str(status): {
            "description": operation.summary,
            "headers": {"x-request-id": {"schema": {"type": "string"}}},
            "content": content,
        }
        for status in operation.answers
    }
    form = error_form(operation.path)
    return {**answers, **{str(status): {"$ref": _error_ref(status, form)} for status in errors}}


def error_form(path: str) -> type[Struct]:
    return AnthropicError if path.startswith(ANTHROPIC) else ErrorBody


def _error_ref(status: int, form: type[Struct]) -> str:
    return f"#/components/responses/{form.__name__}.{status}"


def _error_responses() -> dict[str, Any]:
    return {
        f"{form.__name__}.{status}": {
            "description": meaning,
            "headers": HEADERS.get(status, {}),
            "content": {JSON: {"schema": _ref(form)}},
        }
        for form in (ErrorBody, AnthropicError)
        for status, meaning in STATUSES.items()
    }


def _ref(struct: type[Struct]) -> dict[str, str]:
    return {"$ref": REF.format(name=struct.__name__)}


def _schemas(operations: Sequence[Operation]) -> dict[str, Any]:
    structs = {
        struct
        for operation in operations
        for struct in (operation.answer, operation.body, ErrorBody, AnthropicError)
        if struct is not None
    }
    twins: dict[Any, Any] = {}
    described = [_describable(struct, twins) for struct in sorted(structs, key=lambda struct: struct.__name__)]
    _, components = msgspec.json.schema_components(described, ref_template=REF)
    return components


def _describable(kind: Any, twins: dict[Any, Any]) -> Any:
    """The same type, where no Struct in it has a default that is Raw: no schema can show one."""
    if isinstance(kind, type) and issubclass(kind, Struct):
        if kind not in twins:
            twins[kind] = kind  # for one that holds itself
            twins[kind] = _twin(kind, twins)
        return twins[kind]
    inner = [_describable(argument, twins) for argument in get_args(kind)]
    if inner == list(get_args(kind)):
        return kind
    origin = get_origin(kind)
    return reduce(or_, inner) if origin in (Union, UnionType) else origin[tuple(inner)]


def _twin(struct: type[Struct], twins: dict[Any, Any]) -> type[Struct]:
    fields = msgspec.structs.fields(struct)
    kinds = [_describable(field.type, twins) for field in fields]
    if kinds == [field.type for field in fields] and not any(isinstance(field.default, Raw) for field in fields):
        return struct
    config = struct.__struct_config__
    twin = msgspec.defstruct(
        struct.__name__,
        [_field(field, kind) for field, kind in zip(fields, kinds, strict=True)],
        kw_only=True,
        tag=config.tag,
        tag_field=config.tag_field,
    )
    twin.__doc__ = struct.__doc__
    return twin


def _field(field: msgspec.structs.FieldInfo, kind: Any) -> tuple[str, Any] | tuple[str, Any, Any]:
    if isinstance(field.default, Raw):
        return field.encode_name, kind, msgspec.field(default_factory=lambda: field.default)
    if field.default_factory is not NODEFAULT:
        return field.encode_name, kind, msgspec.field(default_factory=field.default_factory)
    if field.default is not NODEFAULT:
        return field.encode_name, kind, field.default
    return field.encode_name, kind
