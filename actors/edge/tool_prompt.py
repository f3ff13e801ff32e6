"""Tools, calls and their results in the messages of a prompt, in the words that Qwen's models were trained on.

A chat template that reads `tools` writes them itself.  For one that does not (Qwen2-VL, Qwen2.5-VL) they are written
into the messages, so that the prompt reads as the template of Qwen2.5's language models would have it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from vlmrt.actors.edge.tools import CALL_BEGIN, CALL_END, MadeCall, call_head
from vlmrt.runtime.errors import RequestError

SYSTEM_TEXT = "You are a helpful assistant."  # Qwen-VL's own, where a client sends none
_BEFORE_TOOLS = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_AFTER_TOOLS = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    f'{CALL_BEGIN}{CALL_END} XML tags:\n{CALL_BEGIN}\n{{"name": <function-name>, "arguments": <args-json-object>}}'
    f"\n{CALL_END}"
)
_RESULT_BEGIN, _RESULT_END = "<tool_response>\n", "\n</tool_response>"

Message = dict[str, Any]  # as templates read it: role, content (a text or a list of parts), tool_calls, ...


def template_calls(calls: Sequence[MadeCall], param: str) -> list[dict[str, Any]]:
    """Calls of an assistant's turn as templates read them: arguments are an object.

    Raises: RequestError 400 where arguments are not the JSON of an object.
    """
    rendered = []
    for index, call in enumerate(calls):
        function = {"name": call.function.name, "arguments": _object(call, f"{param}[{index}].function.arguments")}
        rendered.append({"type": "function", "function": function, **({"id": call.id} if call.id is not None else {})})
    return rendered


def _object(call: MadeCall, param: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(f"{param} must be the JSON of an object", param=param, code="invalid_value")
    return arguments


def write_tools(messages: Sequence[Message], definitions: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages as a template reads them that knows only roles and content."""
    written: list[Message] = []
    for is_result, run in groupby(messages, key=lambda message: message["role"] == "tool"):
        turns = list(run)
        written += [_results(turns)] if is_result else map(_with_calls, turns)
    return _with_tools(written, definitions) if definitions else written


def _with_tools(messages: list[Message], definitions: Sequence[Mapping[str, Any]]) -> list[Message]:
    lines = "".join("\n" + _json(definition) for definition in definitions)
    text = _BEFORE_TOOLS + lines + _AFTER_TOOLS
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": SYSTEM_TEXT + text}, *messages]
    first, *others = messages
    return [{**first, "content": _appended(first["content"], text)}, *others]


def _with_calls(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [
        f"{CALL_BEGIN}\n{call_head(call['function']['name'])}{_json(call['function']['arguments'])}}}\n{CALL_END}"
        for call in calls
    ]
    content, text = message["content"], "\n".join(texts)
    without = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**without, "content": _appended(content, "\n" + text) if content else text}


def _results(messages: Sequence[Message]) -> Message:
    """Results that follow each other are one turn of the user."""
    parts: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        content = message["content"]
        parts.append({"type": "text", "text": ("\n" if index else "") + _RESULT_BEGIN})
        parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts.append({"type": "text", "text": _RESULT_END})
    if all(part["type"] == "text" for part in parts):
        return {"role": "user", "content": "".join(part["text"] for part in parts)}
    return {"role": "user", "content": parts}


def _appended(content: str | list[dict[str, Any]], text: str) -> str | list[dict[str, Any]]:
    return content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
