"""The chat completion request: its Structs, and every check that needs neither tokenizer nor picture."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta, Raw, Struct

from vlmrt.runtime.errors import RequestError

MAX_FIELDS = 256  # of the top level of a body
MAX_MESSAGES = 4096
MAX_PARTS = 4096  # of one message
MAX_STOPS = 16
MAX_STOP_CHARS = 512
MAX_STOP_TOKEN_IDS = 256
MAX_SALT_CHARS = 128
MAX_UUID_CHARS = 128
MAX_SHOWN_CHARS = 60  # of a wrong value in an error message
MAX_LOOKUP_BYTES = 1 << 20  # bodies above this get errors without the wrong value
MAX_NAMED_BYTES = 4 << 20  # bodies above this do not have their unknown fields named

NULL = Raw(b"null")

Role = Literal["system", "developer", "user", "assistant", "tool"]
Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]


class ImageUrl(Struct, frozen=True, gc=False):
    url: str | None = None
    detail: Literal["auto", "low", "high"] | None = None


class ContentPart(Struct, frozen=True, gc=False):
    """One part of a message; `type` says which of the other fields counts."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: ImageUrl | str | None = None
    image: str | None = None
    uuid: str | None = None  # the client's name for a picture: where the server knows it, the bytes may be left out

    @property
    def url(self) -> str | None:
        """Of a picture, as it stands; None or empty: the part has no bytes."""
        if isinstance(self.image_url, ImageUrl):
            return self.image_url.url
        return self.image_url if self.image_url is not None else self.image


class ChatMessage(Struct, frozen=True):
    role: Role
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class StreamOptions(Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ChatRequest(Struct, frozen=True, kw_only=True):
    """POST /v1/chat/completions.  None means that the client left the choice to the server."""

    messages: list[ChatMessage]
    model: str | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Annotated[int, Meta(ge=0, le=2**31 - 1)]] | None = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Meta(ge=-(2**63))] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: dict[str, Any] | None = None
    tools: Raw = NULL  # what is refused or ignored is never built
    functions: Raw = NULL
    tool_choice: str | dict[str, Any] | None = None
    modalities: list[str] | None = None
    logit_bias: Raw = NULL
    cache_salt: str | None = None
    priority: Int32 | None = None
    return_token_ids: bool | None = None  # the answer names its prompt_token_ids and token_ids
    # accepted and without effect
    user: Raw = NULL
    metadata: Raw = NULL
    store: Raw = NULL
    service_tier: Raw = NULL
    parallel_tool_calls: Raw = NULL
    safety_identifier: Raw = NULL
    prompt_cache_key: Raw = NULL
    reasoning_effort: Raw = NULL
    verbosity: Raw = NULL
    prediction: None = None
    audio: None = None

    @property
    def output_limit(self) -> int | None:
        """The newer name wins; None: as much as the context holds."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ImageSource(Struct, frozen=True):
    """Where a picture of the prompt comes from, and the field that says so."""

    url: str  # empty: from what the server knows under its uuid
    param: str
    low_detail: bool
    uuid: str = ""


_request_decoder = msgspec.json.Decoder(ChatRequest)
_fields_decoder = msgspec.json.Decoder(dict[str, Raw])
_KNOWN_FIELDS = frozenset(ChatRequest.__struct_fields__)
_NAME = re.compile(r"[\w.-]{1,64}")
_PRINTABLE = re.compile(r"[\x21-\x7e]*")


def parse_chat_request(body: bytes) -> tuple[ChatRequest, tuple[str, ...]]:
    """(the checked request, names of top-level fields that nobody reads).

    Raises: RequestError 400 naming field, value and bound.
    """
    try:
        fields = _fields_decoder.decode(body) if len(body) <= MAX_NAMED_BYTES else {}
        if len(fields) > MAX_FIELDS:
            raise RequestError(f"the body has {len(fields)} fields, more than {MAX_FIELDS}", code="too_many_fields")
        request = _request_decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _wrong_field(error, body) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise RequestError("the body is not valid JSON: nested too deeply", code="invalid_json") from None
    _check_request(request)
    return request, tuple(sorted(fields.keys() - _KNOWN_FIELDS))


def _wrong_field(error: msgspec.ValidationError, body: bytes) -> RequestError:
    message, _, path = str(error).partition(" - at `")
    param = path.removesuffix("`").removeprefix("$").removeprefix(".") or None
    missing = re.search(r"missing required field `(\w+)`", message)
    if missing:
        param = f"{param}.{missing[1]}" if param else missing[1]
        return RequestError(f"{param} is required", code="missing_field", param=param)
    message = message[:1].lower() + message[1:].replace("`", "").replace("null", "null").replace("array", "list")
    shown = _show_value(body, param) if param else ""
    return RequestError(f"{param or 'the body'}{shown}: {message}", code="invalid_value", param=param)


def _show_value(body: bytes, param: str) -> str:
    """What the body has at that path, cut short; nothing where that is not cheap to find."""
    if len(body) > MAX_LOOKUP_BYTES:
        return ""
    try:
        value: Any = msgspec.json.decode(body)
        for key in re.findall(r"[^.\[\]]+", param):
            value = value[int(key)] if isinstance(value, list) else value[key]
        text = msgspec.json.encode(value).decode()
    except (msgspec.DecodeError, RecursionError, LookupError, TypeError, ValueError):
        return ""
    return f" = {text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + '...'}"


def _refuse(condition: bool, param: str, message: str, code: str = "invalid_value") -> None:
    if condition:
        raise RequestError(f"{param}{message}", param=param, code=code)


def _check_request(request: ChatRequest) -> None:
    _check_unsupported(request)
    _check_stops(request)
    _refuse(request.seed is not None and request.seed >= 2**63, "seed", f" = {request.seed} is above 2**63 - 1")
    minimum, limit = request.min_tokens or 0, request.output_limit
    above = limit is not None and minimum > limit
    _refuse(above, "min_tokens", f" = {minimum} is above max_tokens = {limit}")
    for name in ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"):
        value = getattr(request, name)
        _refuse(value is not None and not math.isfinite(value), name, " must be a finite number")
    salt = request.cache_salt or ""
    _refuse(len(salt) > MAX_SALT_CHARS, "cache_salt", f" has {len(salt)} characters, more than {MAX_SALT_CHARS}")
    _refuse(not _PRINTABLE.fullmatch(salt), "cache_salt", " may hold printable ASCII without spaces only")
    _refuse(not request.messages, "messages", " is empty: at least one message is needed")
    count = len(request.messages)
    _refuse(count > MAX_MESSAGES, "messages", f" has {count} messages, more than {MAX_MESSAGES}")
    for index, message in enumerate(request.messages):
        _check_message(message, f"messages[{index}]")


def _check_unsupported(request: ChatRequest) -> None:
    code = "unsupported_value"
    _refuse((request.n or 1) != 1, "n", f" = {request.n} is not supported (supported: 1)", code)
    _refuse(bool(request.logprobs), "logprobs", " = true is not supported yet", code)
    _refuse(bool(request.top_logprobs), "top_logprobs", " needs logprobs, which is not supported yet", code)
    _refuse(_is_filled(request.tools), "tools", ": tool calls are not supported yet", code)
    _refuse(_is_filled(request.functions), "functions", ": function calls are not supported", code)
    _refuse(
        request.tool_choice not in (None, "none", "auto"),
        "tool_choice",
        ": only none and auto are supported, since tools are not supported yet",
        code,
    )
    _refuse(_is_filled(request.logit_bias), "logit_bias", " is not supported yet", code)
    _refuse(any(kind != "text" for kind in request.modalities or ()), "modalities", " may hold text only", code)
    kind = (request.response_format or {"type": "text"}).get("type")
    _refuse(kind != "text", "response_format.type", f" = {_short(kind)} is not supported (supported: text)", code)
    _refuse(
        bool(request.return_token_ids and request.stream),
        "return_token_ids",
        " is supported only where stream is false",
        code,
    )
    unstreamed = request.stream_options is not None and not request.stream
    _refuse(unstreamed, "stream_options", " is allowed only where stream is true")


def _is_filled(value: Raw) -> bool:
    return bytes(value).strip() not in (b"null", b"[]", b"{}")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."


def _check_stops(request: ChatRequest) -> None:
    stops = request.stops
    _refuse(len(stops) > MAX_STOPS, "stop", f" has {len(stops)} strings, more than {MAX_STOPS}")
    for stop in stops:
        _refuse(not stop, "stop", " holds an empty string")
        _refuse(
            len(stop) > MAX_STOP_CHARS, "stop", f" holds a string of {len(stop)} characters, more than {MAX_STOP_CHARS}"
        )
    ids = request.stop_token_ids or []
    _refuse(len(ids) > MAX_STOP_TOKEN_IDS, "stop_token_ids", f" has {len(ids)} ids, more than {MAX_STOP_TOKEN_IDS}")


def _check_message(message: ChatMessage, param: str) -> None:
    if message.content is None:
        _refuse(not message.tool_calls, f"{param}.content", " is required", "missing_field")
    bad_name = message.name is not None and not _NAME.fullmatch(message.name)
    _refuse(bad_name, f"{param}.name", " may hold 1 to 64 letters, digits, '.', '_' and '-' only")
    if isinstance(message.content, list):
        _refuse(not message.content, f"{param}.content", " is an empty list: at least one part is needed")
        count = len(message.content)
        _refuse(count > MAX_PARTS, f"{param}.content", f" has {count} parts, more than {MAX_PARTS}")
        for index, part in enumerate(message.content):
            _check_part(part, f"{param}.content[{index}]")


def _check_part(part: ContentPart, param: str) -> None:
    match part.type:
        case "text":
            _refuse(part.text is None, f"{param}.text", " is required", "missing_field")
        case "refusal":
            _refuse(part.refusal is None, f"{param}.refusal", " is required", "missing_field")
        case "image_url" | "image":
            _check_uuid(part.uuid, f"{param}.uuid")
            if part.uuid is None:
                absent = part.image_url is None and (part.type == "image_url" or part.image is None)
                _refuse(absent, f"{param}.{part.type}", " is required", "missing_field")
                _refuse(part.url is None, f"{param}.image_url.url", " is required", "missing_field")
        case "video_url" | "video":
            _refuse(True, f"{param}.type", ": video is not supported yet", "unsupported_part")
        case _:
            problem = f" = {_short(part.type)!r} is not supported (supported: text, image_url, image)"
            _refuse(True, f"{param}.type", problem, "unsupported_part")


def _check_uuid(uuid: str | None, param: str) -> None:
    if uuid is not None:
        _refuse(not uuid, param, " is empty: it needs at least 1 character")
        _refuse(len(uuid) > MAX_UUID_CHARS, param, f" has {len(uuid)} characters, more than {MAX_UUID_CHARS}")
        _refuse(not _PRINTABLE.fullmatch(uuid), param, " may hold printable ASCII without spaces only")


def image_sources(messages: Sequence[ChatMessage]) -> list[ImageSource]:
    """The pictures of a conversation, in prompt order."""
    sources = []
    for m, message in enumerate(messages):
        for p, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if part.type in ("image_url", "image"):
                sources.append(_image_source(part, f"messages[{m}].content[{p}]"))
    return sources


def _image_source(part: ContentPart, param: str) -> ImageSource:
    uuid, low = part.uuid or "", False
    if uuid and not part.url:
        return ImageSource("", f"{param}.uuid", False, uuid)
    if isinstance(part.image_url, ImageUrl):
        param, low = f"{param}.image_url.url", part.image_url.detail == "low"
    else:
        param = f"{param}.image" if part.image_url is None else f"{param}.image_url"
    return ImageSource(cast(str, part.url), param, low, uuid)


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as a chat template reads them: developer is system, a picture is {"type": "image"}."""
    return [_template_message(message) for message in messages]


def _template_message(message: ChatMessage) -> dict[str, Any]:
    rendered: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    if isinstance(message.content, list):
        rendered["content"] = [_template_part(part) for part in message.content]
    else:
        rendered["content"] = message.content or ""
    if message.name is not None:
        rendered["name"] = message.name
    if message.tool_call_id is not None:
        rendered["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        rendered["tool_calls"] = message.tool_calls
    return rendered


def _template_part(part: ContentPart) -> dict[str, str]:
    if part.type in ("image_url", "image"):
        return {"type": "image"}
    return {"type": "text", "text": (part.text if part.type == "text" else part.refusal) or ""}
