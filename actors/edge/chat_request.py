"""The chat completion request: its Structs, and every check that needs neither tokenizer nor media."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from vlmrt.actors.edge.chat_template import RESERVED_NAMES, TemplateOptions
from vlmrt.actors.edge.media_parts import (
    ContentPart,
    MediaDefaults,
    MediaSource,
    ProcessorOptions,
    check_part,
    is_image,
    is_video,
    media_defaults,
    part_sources,
)
from vlmrt.actors.edge.refusals import NULL, refuse
from vlmrt.actors.edge.request_fields import SamplingFields, check_sampling, parse_body
from vlmrt.actors.edge.tool_prompt import template_calls
from vlmrt.actors.edge.tools import MAX_CALLS, KnownTool, MadeCall, Tool, ToolChoice, ToolUse, tool_use

MAX_MESSAGES = 4096
MAX_PARTS = 4096  # of one message

Role = Literal["system", "developer", "user", "assistant", "tool"]


class ChatMessage(Struct, frozen=True):
    role: Role
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[MadeCall] | None = None  # of the assistant
    tool_call_id: str | None = None


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
    defaults: MediaDefaults
    cache_salt: str


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
    defaults = media_defaults(processor)
    options = TemplateOptions(
        add_generation_prompt=add_generation_prompt is not False,
        continue_final_message=bool(continue_final_message),
        tools=[tool.definition() for tool in tools] or None,
        variables=template_variables or {},
    )
    return Conversation(messages, options, defaults, cache_salt or "")


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
            check_part(part, f"{param}.content[{index}]")


def media_sources(messages: Sequence[ChatMessage], defaults: MediaDefaults) -> list[MediaSource]:
    """The pictures and videos of a conversation, in prompt order."""
    sources: list[MediaSource] = []
    for index, message in enumerate(messages):
        if isinstance(message.content, list):
            sources += part_sources(message.content, f"messages[{index}].content", defaults)
    return sources


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as a chat template reads them: developer is system, a picture is {"type": "image"}
    and a video {"type": "video"}.

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
    if is_image(part):
        return {"type": "image"}
    if is_video(part):
        return {"type": "video"}
    return {"type": "text", "text": (part.text if part.type == "text" else part.refusal) or ""}
