"""What a stream of a parser's deltas amounts to."""

from __future__ import annotations

from collections.abc import Iterable

from vlmrt.actors.edge.choice import ToolCall
from vlmrt.actors.edge.tool_parser import Arguments, CallStart, Content, Delta


def join(deltas: Iterable[Delta]) -> tuple[str, tuple[ToolCall, ...]]:
    """(content, calls)."""
    content: list[str] = []
    starts: list[CallStart] = []
    arguments: dict[int, list[str]] = {}
    for delta in deltas:
        match delta:
            case Content():
                content.append(delta.text)
            case CallStart():
                assert delta.index == len(starts)
                starts.append(delta)
                arguments[delta.index] = []
            case Arguments():
                arguments[delta.index].append(delta.text)
    calls = (ToolCall(call.id, call.name, "".join(arguments[call.index])) for call in starts)
    return "".join(content), tuple(calls)
