"""The chat completion request: its Structs, and every check that needs neither tokenizer nor picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta, Raw, Struct

from vlmrt.actors.edge.chat_template import RESERVED_NAMES, TemplateOptions
from vlmrt.actors.edge.refusals import NULL, refuse, short
from vlmrt.actors.edge.request_fields import PRINTABLE, SamplingFields, check_sampling, parse_body
from vlmrt.actors.edge.tool_prompt import template_calls
from vlmrt.actors.edge.tools import MAX_CALLS, KnownTool, MadeCall, Tool, ToolChoice, ToolUse, tool_use

MAX_MESSAGES = 4096
MAX_PARTS = 4096  # of one message
MAX_UUID_CHARS = 128

Role = Literal["system", "developer", "user", "assistant", "tool"]
Pixels = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class ImageUrl(Struct, frozen=True, gc=False):
    url: str | None = None
    detail: Literal["auto", "low", "high"] | None = None
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None


class ContentPart(Struct, frozen=True, gc=False):
    """One part of a message; `type` says which of the other fields counts."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: ImageUrl | str | None = None
    image: str | None = None
    min_pixels: Pixels | None = None  # of a picture after resizing, here or in image_url
    max_pixels: Pixels | None = None
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
    tool_calls: list[MadeCall] | None = None  # of the assistant
    tool_call_id: str | None = None


class PixelSize(Struct, frozen=True, forbid_unknown_fields=True):
    """The same limits by the names that newer processors have for them."""

    shortest_edge: Pixels | None = None
    longest_edge: Pixels | None = None


class PixelLimits(Struct, frozen=True):
    """What a client asks of a picture's size after resizing; None: the server's own limits."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    low_detail: bool = False


class ProcessorOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """mm_processor_kwargs: for every picture that has no limits of its own."""

    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    size: PixelSize | None = None

    @property
    def limits(self) -> PixelLimits:
        size = self.size or PixelSize()
        return PixelLimits(self.min_pixels or size.shortest_edge, self.max_pixels or size.longest_edge)


class ChatRequest(SamplingFields, frozen=True, kw_only=True):
    """POST /v1/chat/completions.  None means that the client left the choice to the server."""

    messages: list[ChatMessage]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: ProcessorOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Raw = NULL  # what tools and tool_choice were once called
    function_call: Raw = NULL
    modalities: list[str] | None = None
    echo: bool | None = None  # of completions; here it is refused
    # accepted and without effect
    reasoning_effort: Raw = NULL
    verbosity: Raw = NULL
    prediction: None = None
    audio: None = None

    @property
    def num_logprobs(self) -> int:
        """As in Sampling."""
        return (self.top_logprobs or 0) if self.logprobs else -1

    def tool_use(self) -> ToolUse:
        """Raises: RequestError 400."""
        return tool_use(
            self.tools,
            self.tool_choice,
            self.parallel_tool_calls,
            functions=self.functions,
            function_call=self.function_call,
        )

    def conversation(self, tools: Sequence[KnownTool] = ()) -> Conversation:
        """Args: tools: those that the model is told of.  Raises: RequestError 400."""
        return make_conversation(
            self.messages,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            template_variables=self.chat_template_kwargs,
            processor=self.mm_processor_kwargs,
            cache_salt=self.cache_salt,
            tools=tools,
        )


class Conversation(Struct, frozen=True):
    """What a prompt is made of."""

    messages: list[ChatMessage]
    options: TemplateOptions
    limits: PixelLimits
    cache_salt: str


class ImageSource(Struct, frozen=True):
    """Where a picture of the prompt comes from, and the field that says so."""

    url: str  # empty: from what the server knows under its uuid
    param: str
    limits: PixelLimits = PixelLimits()
    uuid: str = ""


_decoder = msgspec.json.Decoder(ChatRequest)
_NAME = re.compile(r"[\w.-]{1,64}")


def parse_chat_request(body: bytes) -> tuple[ChatRequest, tuple[str, ...]]:
    """(the checked request, names of top-level fields that nobody reads).

    Raises: RequestError 400 naming field, value and bound.
    """
    request, ignored = parse_body(body, _decoder)
    check_chat_request(request)
    return request, ignored


def check_chat_request(request: ChatRequest) -> None:
    """Everything but the conversation.  Raises: RequestError 400."""
    code = "unsupported_value"
    refuse(bool(request.top_logprobs and not request.logprobs), "top_logprobs", " needs logprobs = true")
    refuse(bool(request.echo), "echo", " = true is not supported for chat completions", code)
    refuse(any(kind != "text" for kind in request.modalities or ()), "modalities", " may hold text only", code)
    check_sampling(request)


def make_conversation(
    messages: list[ChatMessage],
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    template_variables: dict[str, Any] | None,
    processor: ProcessorOptions | None,
    cache_salt: str | None = None,
    tools: Sequence[KnownTool] = (),
) -> Conversation:
    """Raises: RequestError 400 naming field, value and bound."""
    refuse(not messages, "messages", " is empty: at least one message is needed")
    refuse(len(messages) > MAX_MESSAGES, "messages", f" has {len(messages)} messages, more than {MAX_MESSAGES}")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")
    both = bool(add_generation_prompt and continue_final_message)
    refuse(both, "continue_final_message", " and add_generation_prompt cannot both be true")
    for name in sorted(RESERVED_NAMES & (template_variables or {}).keys()):
        refuse(True, "chat_template_kwargs", f" may not hold {name}: the server sets it")
    limits = processor.limits if processor is not None else PixelLimits()
    _check_limits(limits, "mm_processor_kwargs")
    options = TemplateOptions(
        add_generation_prompt=add_generation_prompt is not False,
        continue_final_message=bool(continue_final_message),
        tools=[tool.definition() for tool in tools] or None,
        variables=template_variables or {},
    )
    return Conversation(messages, options, limits, cache_salt or "")


def _check_message(message: ChatMessage, param: str) -> None:
    if message.content is None:
        refuse(not message.tool_calls, f"{param}.content", " is required", "missing_field")
    calls = message.tool_calls or ()
    refuse(bool(calls) and message.role != "assistant", f"{param}.tool_calls", " belong to the assistant's messages")
    refuse(len(calls) > MAX_CALLS, f"{param}.tool_calls", f" has {len(calls)} calls, more than {MAX_CALLS}")
    bad_name = message.name is not None and not _NAME.fullmatch(message.name)
    refuse(bad_name, f"{param}.name", " may hold 1 to 64 letters, digits, '.', '_' and '-' only")
    if isinstance(message.content, list):
        refuse(not message.content, f"{param}.content", " is an empty list: at least one part is needed")
        count = len(message.content)
        refuse(count > MAX_PARTS, f"{param}.content", f" has {count} parts, more than {MAX_PARTS}")
        for index, part in enumerate(message.content):
            _check_part(part, f"{param}.content[{index}]")


def _check_part(part: ContentPart, param: str) -> None:
    match part.type:
        case "text":
            refuse(part.text is None, f"{param}.text", " is required", "missing_field")
        case "refusal":
            refuse(part.refusal is None, f"{param}.refusal", " is required", "missing_field")
        case "image_url" | "image":
            _check_uuid(part.uuid, f"{param}.uuid")
            _check_limits(_part_limits(part), param)
            if part.uuid is None:
                absent = part.image_url is None and (part.type == "image_url" or part.image is None)
                refuse(absent, f"{param}.{part.type}", " is required", "missing_field")
                refuse(part.url is None, f"{param}.image_url.url", " is required", "missing_field")
        case "video_url" | "video":
            refuse(True, f"{param}.type", ": video is not supported yet", "unsupported_part")
        case _:
            problem = f" = {short(part.type)!r} is not supported (supported: text, image_url, image)"
            refuse(True, f"{param}.type", problem, "unsupported_part")


def _check_limits(limits: PixelLimits, param: str) -> None:
    low, high = limits.min_pixels or 1, limits.max_pixels
    refuse(high is not None and low > high, f"{param}.min_pixels", f" = {low} is above max_pixels = {high}")


def _check_uuid(uuid: str | None, param: str) -> None:
    if uuid is not None:
        refuse(not uuid, param, " is empty: it needs at least 1 character")
        refuse(len(uuid) > MAX_UUID_CHARS, param, f" has {len(uuid)} characters, more than {MAX_UUID_CHARS}")
        refuse(not PRINTABLE.fullmatch(uuid), param, " may hold printable ASCII without spaces only")


def image_sources(messages: Sequence[ChatMessage], limits: PixelLimits) -> list[ImageSource]:
    """The pictures of a conversation, in prompt order; the limits are for those that have none."""
    sources = []
    for m, message in enumerate(messages):
        for p, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if part.type in ("image_url", "image"):
                sources.append(_image_source(part, f"messages[{m}].content[{p}]", limits))
    return sources


def _image_source(part: ContentPart, param: str, limits: PixelLimits) -> ImageSource:
    uuid, low = part.uuid or "", False
    if uuid and not part.url:
        return ImageSource("", f"{param}.uuid", uuid=uuid)
    if isinstance(part.image_url, ImageUrl):
        param, low = f"{param}.image_url.url", part.image_url.detail == "low"
    else:
        param = f"{param}.image" if part.image_url is None else f"{param}.image_url"
    asked = _part_limits(part)
    limits = PixelLimits(asked.min_pixels or limits.min_pixels, asked.max_pixels or limits.max_pixels, low)
    return ImageSource(cast(str, part.url), param, limits, uuid)


def _part_limits(part: ContentPart) -> PixelLimits:
    """Those within image_url win."""
    inner = part.image_url if isinstance(part.image_url, ImageUrl) else ImageUrl()
    return PixelLimits(inner.min_pixels or part.min_pixels, inner.max_pixels or part.max_pixels)


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as a chat template reads them: developer is system, a picture is {"type": "image"}.

    Raises: RequestError 400 where a call's arguments are no object.
    """
    return [_template_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _template_message(message: ChatMessage, param: str) -> dict[str, Any]:
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
        rendered["tool_calls"] = template_calls(message.tool_calls, f"{param}.tool_calls")
    return rendered


def _template_part(part: ContentPart) -> dict[str, str]:
    if part.type in ("image_url", "image"):
        return {"type": "image"}
    return {"type": "text", "text": (part.text if part.type == "text" else part.refusal) or ""}
