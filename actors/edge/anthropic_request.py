"""The request of POST /v1/messages, and the chat request that it stands for."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from vlmrt.actors.edge.chat_request import ChatRequest
from vlmrt.actors.edge.chat_translation import ChatMessages, FieldNames, chat_request, not_supported
from vlmrt.actors.edge.refusals import NULL, refuse
from vlmrt.actors.edge.request_fields import SamplingFields, parse_body
from vlmrt.runtime.errors import RequestError

BLOCKS = "supported: text, image, tool_use, tool_result, thinking"


class Source(Struct, frozen=True, gc=False):
    type: str
    media_type: str | None = None
    data: str | None = None
    url: str | None = None


class ContentBlock(Struct, frozen=True):
    """One block of a message; `type` says which of the other fields counts."""

    type: str
    text: str | None = None
    source: Source | None = None
    id: str | None = None
    name: str | None = None
    input: Raw | UnsetType = UNSET
    tool_use_id: str | None = None
    content: str | list[ContentBlock] | None = None
    is_error: bool | None = None


class Message(Struct, frozen=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class AnthropicTool(Struct, frozen=True):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: Raw | UnsetType = UNSET


class AnthropicChoice(Struct, frozen=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class MessagesRequest(SamplingFields, frozen=True, kw_only=True):
    """POST /v1/messages, which needs max_tokens, and /v1/messages/count_tokens, which does not read it."""

    messages: list[Message]
    system: str | list[ContentBlock] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicChoice | None = None
    stop_sequences: list[str] | None = None
    thinking: Raw = NULL  # accepted and without effect, as all below
    output_config: Raw = NULL
    context_management: Raw = NULL
    container: Raw = NULL


_decoder = msgspec.json.Decoder(MessagesRequest)


def parse_messages_request(body: bytes, *, counts: bool = False) -> tuple[MessagesRequest, tuple[str, ...]]:
    """(the request, names of top-level fields that nobody reads).

    Args: with `counts` it is one of count_tokens.  Raises: RequestError 400 naming field, value and bound.
    """
    request, ignored = parse_body(body, _decoder)
    refuse((request.n or 1) != 1, "n", f" = {request.n}: a message is one answer")
    refuse(request.max_tokens is None and not counts, "max_tokens", " is required", "missing_field")
    return request, ignored


def chat_of_messages(request: MessagesRequest) -> tuple[ChatRequest, FieldNames]:
    """Raises: RequestError 400 naming field, value and bound."""
    names = FieldNames()
    messages = ChatMessages(names)
    if request.system:
        names.add("messages[0].content", "system")
        blocks = request.system
        content = blocks if isinstance(blocks, str) else _content(blocks, "system", 0, names)
        messages.add("system", content, "system")
    for index, message in enumerate(request.messages):
        _add_message(message, f"messages[{index}]", messages)
    fields: dict[str, Any] = {
        "messages": messages.all,
        "max_completion_tokens": request.output_limit,
        "max_tokens": None,
        "stop": request.stop_sequences if request.stop_sequences is not None else request.stop,
        "stream_options": None,
        **_tool_fields(request, names),
    }
    if messages.all and messages.all[-1]["role"] == "assistant":  # its words are the beginning of the answer
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    names.add("max_completion_tokens", "max_tokens")
    names.add("stop", "stop_sequences")
    return chat_request(request, fields, names), names


def _add_message(message: Message, path: str, messages: ChatMessages) -> None:
    """Calls and their results are messages of their own in a chat; the blocks between them stay together."""
    if isinstance(message.content, str):
        messages.names.add(f"messages[{len(messages.all)}].content", f"{path}.content")
        messages.add(message.role, message.content, path)
        return
    refuse(not message.content, f"{path}.content", " is an empty list: at least one block is needed")
    parts: list[dict[str, Any]] = []

    def flush() -> None:
        if parts:
            messages.add(message.role, parts.copy(), path)
            parts.clear()

    for index, block in enumerate(message.content):
        block_path = f"{path}.content[{index}]"
        match block.type:
            case "tool_use":
                refuse(message.role != "assistant", f"{block_path}.type", " = 'tool_use' is the assistant's")
                flush()
                _add_call(block, block_path, messages)
            case "tool_result":
                refuse(message.role != "user", f"{block_path}.type", " = 'tool_result' is the user's")
                flush()
                _add_result(block, block_path, messages)
            case "thinking" | "redacted_thinking":
                pass  # the thoughts of an earlier answer, by whatever model, are no part of the prompt
            case _:
                chat_path = f"messages[{len(messages.all)}].content[{len(parts)}]"
                parts.append(_part(block, block_path, chat_path, messages.names))
    flush()


def _add_call(block: ContentBlock, path: str, messages: ChatMessages) -> None:
    for name in ("id", "name"):
        refuse(getattr(block, name) is None, f"{path}.{name}", " is required", "missing_field")
    given = b"{}" if block.input is UNSET else bytes(block.input).strip()
    refuse(not given.startswith(b"{"), f"{path}.input", " must be an object")
    messages.add_call(block.id or "", block.name or "", given.decode(), path, "input")


def _add_result(block: ContentBlock, path: str, messages: ChatMessages) -> None:
    refuse(block.tool_use_id is None, f"{path}.tool_use_id", " is required", "missing_field")
    index = len(messages.all)
    messages.names.add(f"messages[{index}].content", f"{path}.content")
    content: str | list[dict[str, Any]] = ""
    if isinstance(block.content, list) and block.content:
        content = _content(block.content, f"{path}.content", index, messages.names)
    elif isinstance(block.content, str):
        content = block.content
    messages.add("tool", content, path, tool_call_id=block.tool_use_id)


def _content(blocks: list[ContentBlock], path: str, index: int, names: FieldNames) -> list[dict[str, Any]]:
    """As the chat message of that index has it."""
    return [_part(block, f"{path}[{b}]", f"messages[{index}].content[{b}]", names) for b, block in enumerate(blocks)]


def _part(block: ContentBlock, path: str, chat_path: str, names: FieldNames) -> dict[str, Any]:
    names.add(chat_path, path)
    match block.type:
        case "text":
            return {"type": "text", "text": block.text}
        case "image":
            url, origin = _url(block.source, f"{path}.source")
            names.add(f"{chat_path}.image_url.url", origin)
            return {"type": "image_url", "image_url": {"url": url}}
    raise not_supported(f"{path}.type", block.type, BLOCKS, "unsupported_part")


def _url(source: Source | None, path: str) -> tuple[str, str]:
    """(a picture's URL, the field that it comes from)."""
    if source is None:
        raise RequestError(f"{path} is required", param=path, code="missing_field")
    match source.type:
        case "base64":
            for name in ("media_type", "data"):
                refuse(getattr(source, name) is None, f"{path}.{name}", " is required", "missing_field")
            return f"data:{source.media_type};base64,{source.data}", f"{path}.data"
        case "url":
            refuse(source.url is None, f"{path}.url", " is required", "missing_field")
            return source.url or "", f"{path}.url"
    raise not_supported(f"{path}.type", source.type, "supported: base64, url")


def _tool_fields(request: MessagesRequest, names: FieldNames) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if request.tools:
        fields["tools"] = [_tool(tool, index, names) for index, tool in enumerate(request.tools)]
    choice = request.tool_choice
    if choice is not None:
        if choice.disable_parallel_tool_use is not None:
            fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        if choice.type == "tool":
            refuse(choice.name is None, "tool_choice.name", " is required", "missing_field")
            names.add("tool_choice.function", "tool_choice")
            fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        else:
            fields["tool_choice"] = "required" if choice.type == "any" else choice.type
    return fields


def _tool(tool: AnthropicTool, index: int, names: FieldNames) -> dict[str, Any]:
    path = f"tools[{index}]"
    if tool.type is not None and tool.type != "custom":
        raise not_supported(f"{path}.type", tool.type, "supported: custom")
    refuse(tool.input_schema is UNSET, f"{path}.input_schema", " is required", "missing_field")
    names.add(f"{path}.function", path)
    names.add(f"{path}.function.parameters", f"{path}.input_schema")
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function}
