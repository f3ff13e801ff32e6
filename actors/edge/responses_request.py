"""The request of POST /v1/responses, and the chat request that it stands for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from vlmrt.actors.edge.chat_request import ChatRequest
from vlmrt.actors.edge.chat_translation import UNSUPPORTED, ChatMessages, FieldNames, chat_request, not_supported
from vlmrt.actors.edge.refusals import NULL, refuse
from vlmrt.actors.edge.request_fields import SamplingFields, parse_body


class InputPart(Struct, frozen=True, gc=False):
    """One part of an input message, or of a function's output; `type` says which of the other fields counts."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    file_id: str | None = None
    detail: Literal["auto", "low", "high"] | None = None


class InputItem(Struct, frozen=True, gc=False):
    """One item of the input; `type` says which of the other fields counts."""

    type: str = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None


class TextFormat(Struct, frozen=True):
    type: str
    name: str | UnsetType = UNSET
    schema: Raw | UnsetType = UNSET
    description: str | UnsetType | None = UNSET
    strict: bool | UnsetType | None = UNSET


class TextOptions(Struct, frozen=True):
    format: TextFormat | None = None
    verbosity: str | None = None  # accepted and without effect


class FunctionTool(Struct, frozen=True):
    type: str
    name: str | UnsetType = UNSET
    description: str | UnsetType | None = UNSET
    parameters: Raw | UnsetType = UNSET
    strict: bool | UnsetType | None = UNSET


class ToolName(Struct, frozen=True):
    type: str
    name: str


class NamedTools(Struct, frozen=True):
    """A `tool_choice` that names one function, or some with a mode."""

    type: str
    name: str | None = None
    mode: str | None = None
    tools: list[ToolName] | None = None


class ResponsesRequest(SamplingFields, frozen=True, kw_only=True):
    """POST /v1/responses.  None means that the client left the choice to the server."""

    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTools | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    conversation: Raw = NULL
    prompt: Raw = NULL
    background: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: Raw = NULL  # accepted and without effect, as all below
    max_tool_calls: Raw = NULL
    reasoning: Raw = NULL
    truncation: Literal["auto", "disabled"] | None = None
    prompt_cache_retention: Raw = NULL


_decoder = msgspec.json.Decoder(ResponsesRequest)


def parse_responses_request(body: bytes) -> tuple[ResponsesRequest, tuple[str, ...]]:
    """(the request, names of top-level fields that nobody reads).

    Raises: RequestError 400 naming field, value and bound.
    """
    request, ignored = parse_body(body, _decoder)
    kept = "the server keeps no conversations: send all of its items as input"
    refuse(request.previous_response_id is not None, "previous_response_id", f" is not supported: {kept}", UNSUPPORTED)
    refuse(bytes(request.conversation) != b"null", "conversation", f" is not supported: {kept}", UNSUPPORTED)
    refuse(bytes(request.prompt) != b"null", "prompt", " is not supported: the server keeps no prompts", UNSUPPORTED)
    unkept = " = true is not supported: the server keeps no responses"
    refuse(bool(request.background), "background", unkept, UNSUPPORTED)
    refuse(bool(request.top_logprobs), "top_logprobs", " is not supported here; chat completions have it", UNSUPPORTED)
    refuse((request.n or 1) != 1, "n", f" = {request.n}: a response is one answer")
    refuse(request.input == [], "input", " is empty: at least one item is needed")
    return request, ignored


def chat_of_responses(request: ResponsesRequest) -> tuple[ChatRequest, FieldNames]:
    """Raises: RequestError 400 naming field, value and bound."""
    names = FieldNames()
    names.add("messages", "input")
    names.add("max_completion_tokens", "max_output_tokens")
    messages = ChatMessages(names)
    if request.instructions is not None:
        messages.add("system", request.instructions, "instructions")
        names.add("messages[0].content", "instructions")
    if isinstance(request.input, str):
        messages.add("user", request.input, "input")
        names.add(f"messages[{len(messages.all) - 1}].content", "input")
    else:
        for index, item in enumerate(request.input):
            _add_item(item, f"input[{index}]", messages)
    fields: dict[str, Any] = {
        "messages": messages.all,
        "max_completion_tokens": request.max_output_tokens or request.output_limit,
        "max_tokens": None,
        "stream_options": None,
        **_text_fields(request, names),
        **_tool_fields(request, names),
    }
    return chat_request(request, fields, names), names


def _add_item(item: InputItem, path: str, messages: ChatMessages) -> None:
    match item.type:
        case "message":
            refuse(item.role is None, f"{path}.role", " is required", "missing_field")
            refuse(item.content is None, f"{path}.content", " is required", "missing_field")
            content = _content(item.content, f"{path}.content", len(messages.all), messages.names)
            messages.add(item.role or "", content, path)
        case "function_call":
            for name in ("call_id", "name", "arguments"):
                refuse(getattr(item, name) is None, f"{path}.{name}", " is required", "missing_field")
            messages.add_call(item.call_id or "", item.name or "", item.arguments or "", path, "arguments")
        case "function_call_output":
            refuse(item.call_id is None, f"{path}.call_id", " is required", "missing_field")
            refuse(item.output is None, f"{path}.output", " is required", "missing_field")
            content = _content(item.output, f"{path}.output", len(messages.all), messages.names)
            messages.add("tool", content, path, tool_call_id=item.call_id)
        case "reasoning":
            pass  # the thoughts of an earlier answer, by whatever model, are no part of the prompt
        case _:
            known = "supported: message, function_call, function_call_output, reasoning"
            raise not_supported(f"{path}.type", item.type, known)


def _content(
    content: str | list[InputPart] | None, path: str, index: int, names: FieldNames
) -> str | list[dict[str, Any]]:
    """As the chat message of that index has it."""
    names.add(f"messages[{index}].content", path)
    if isinstance(content, list):
        return [_part(part, f"{path}[{p}]", f"messages[{index}].content[{p}]", names) for p, part in enumerate(content)]
    return content or ""


def _part(part: InputPart, path: str, chat_path: str, names: FieldNames) -> dict[str, Any]:
    match part.type:
        case "input_text" | "output_text" | "text" | "summary_text":
            return {"type": "text", "text": part.text}
        case "refusal":
            return {"type": "refusal", "refusal": part.refusal}
        case "input_image":
            unkept = ": the server keeps no files; send image_url"
            refuse(part.file_id is not None, f"{path}.file_id", unkept, UNSUPPORTED)
            refuse(part.image_url is None, f"{path}.image_url", " is required", "missing_field")
            names.add(f"{chat_path}.image_url.url", f"{path}.image_url")
            return {"type": "image_url", "image_url": {"url": part.image_url, "detail": part.detail}}
    known = "supported: input_text, output_text, refusal, input_image"
    raise not_supported(f"{path}.type", part.type, known, "unsupported_part")


def _text_fields(request: ResponsesRequest, names: FieldNames) -> dict[str, Any]:
    wanted = request.text.format if request.text is not None else None
    if wanted is None or wanted.type == "text":
        return {}
    names.add("response_format", "text.format")
    names.add("response_format.json_schema", "text.format")
    if wanted.type != "json_schema":
        return {"response_format": {"type": wanted.type}}
    refuse(wanted.name is UNSET, "text.format.name", " is required", "missing_field")
    schema = {name: getattr(wanted, name) for name in ("name", "schema", "description", "strict")}
    return {
        "response_format": {
            "type": "json_schema",
            "json_schema": {name: value for name, value in schema.items() if value is not UNSET},
        }
    }


def _tool_fields(request: ResponsesRequest, names: FieldNames) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if request.parallel_tool_calls is not None:
        fields["parallel_tool_calls"] = request.parallel_tool_calls
    if request.tools:
        fields["tools"] = [_tool(tool, index, names) for index, tool in enumerate(request.tools)]
    if isinstance(request.tool_choice, NamedTools):
        fields["tool_choice"] = _named(request.tool_choice, names)
    elif request.tool_choice is not None:
        fields["tool_choice"] = request.tool_choice
    return fields


def _tool(tool: FunctionTool, index: int, names: FieldNames) -> dict[str, Any]:
    if tool.type != "function":
        raise not_supported(f"tools[{index}].type", tool.type, "supported: function")
    refuse(tool.name is UNSET, f"tools[{index}].name", " is required", "missing_field")
    names.add(f"tools[{index}].function", f"tools[{index}]")
    function = {name: getattr(tool, name) for name in ("name", "description", "parameters", "strict")}
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not UNSET}}


def _named(choice: NamedTools, names: FieldNames) -> dict[str, Any]:
    match choice.type:
        case "function":
            refuse(choice.name is None, "tool_choice.name", " is required", "missing_field")
            names.add("tool_choice.function", "tool_choice")
            return {"type": "function", "function": {"name": choice.name}}
        case "allowed_tools":
            names.add("tool_choice.allowed_tools", "tool_choice")
            tools = []
            for index, tool in enumerate(choice.tools or ()):
                if tool.type != "function":
                    raise not_supported(f"tool_choice.tools[{index}].type", tool.type, "supported: function")
                names.add(f"tool_choice.allowed_tools.tools[{index}].function", f"tool_choice.tools[{index}]")
                tools.append({"type": "function", "function": {"name": tool.name}})
            allowed = {"mode": choice.mode or "auto", "tools": tools}
            return {"type": "allowed_tools", "allowed_tools": allowed}
    raise not_supported("tool_choice.type", choice.type, "supported: function, allowed_tools")
