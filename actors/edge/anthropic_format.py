"""Answers of POST /v1/messages, whole and as events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import Raw, Struct

from vlmrt.actors.edge.anthropic_errors import anthropic_error_body
from vlmrt.actors.edge.choice import Piece, ToolCallDelta
from vlmrt.actors.edge.generation import Answer
from vlmrt.actors.edge.responses import ChatUsage, encode_json
from vlmrt.runtime.errors import RequestError

NO_INPUT = Raw(b"{}")

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TextBlock(Struct, frozen=True, tag_field="type", tag="text"):
    text: str
    citations: None = None


class DirectCaller(Struct, frozen=True, tag_field="type", tag="direct"):
    """The model itself, not a tool that runs on a server."""


class ToolUseBlock(Struct, frozen=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: Raw
    caller: DirectCaller = DirectCaller()


class MessageUsage(Struct, frozen=True):
    input_tokens: int  # those that no cache held
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_creation: None = None
    inference_geo: None = None
    output_tokens_details: None = None
    server_tool_use: None = None
    service_tier: Literal["standard"] = "standard"


class AnthropicMessage(Struct, frozen=True, tag_field="type", tag="message"):
    id: str
    model: str
    content: tuple[TextBlock | ToolUseBlock, ...]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    role: Literal["assistant"] = "assistant"
    stop_details: None = None
    container: None = None


class TokenCount(Struct, frozen=True):
    input_tokens: int


class MessagesFormat:
    """Writes the answer to one request."""

    def __init__(self, answer_id: str, model: str, label: str) -> None:
        """Args: label: what the client calls the request."""
        self._answer_id = answer_id
        self._model = model
        self._label = label
        self._events: list[bytes] = []
        self._blocks: list[TextBlock | ToolUseBlock] = []  # those that have ended
        self._open: TextBlock | ToolUseBlock | None = None
        self._texts: list[str] = []  # of the open block
        self._stop_reason: StopReason | None = None
        self._stop_sequence: str | None = None

    def whole(self, answer: Answer, choices: Sequence[Piece]) -> bytes:
        self.news(answer, choices)
        return encode_json(self._message(answer))

    def begin(self, answer: Answer) -> bytes:
        self._event("message_start", message=self._message(answer))
        self._event("ping")
        return self._written()

    def news(self, answer: Answer, pieces: Sequence[Piece]) -> bytes:
        for piece in pieces:
            for delta in piece.deltas:
                if isinstance(delta.content, str):
                    self._text(delta.content)
                for call in delta.tool_calls or ():
                    self._call(call)
            if piece.finish_reason is not None:
                self._close()
                self._finish(piece)
        return self._written()

    def end(self, answer: Answer) -> bytes:
        delta = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        self._event("message_delta", delta=delta, usage=_message_usage(answer.usage))
        self._event("message_stop")
        return self._written()

    def failed(self, error: RequestError) -> bytes:
        return b"event: error\ndata: %b\n\n" % anthropic_error_body(error, self._label)

    def _message(self, answer: Answer) -> AnthropicMessage:
        return AnthropicMessage(
            id=self._answer_id,
            model=self._model,
            content=tuple(self._blocks),
            stop_reason=self._stop_reason,
            stop_sequence=self._stop_sequence,
            usage=_message_usage(answer.usage),
        )

    def _finish(self, piece: Piece) -> None:
        if piece.finish_reason == "length":
            self._stop_reason = "max_tokens"
        elif any(isinstance(block, ToolUseBlock) for block in self._blocks):
            self._stop_reason = "tool_use"
        elif isinstance(piece.stop_reason, str):
            self._stop_reason, self._stop_sequence = "stop_sequence", piece.stop_reason
        else:
            self._stop_reason = "end_turn"

    def _text(self, text: str) -> None:
        if not isinstance(self._open, TextBlock):
            self._begin(TextBlock(""))
        self._delta({"type": "text_delta", "text": text}, text)

    def _call(self, piece: ToolCallDelta) -> None:
        if piece.id and piece.function.name:
            self._begin(ToolUseBlock(piece.id, piece.function.name, NO_INPUT))
        if piece.function.arguments:
            self._delta(
                {"type": "input_json_delta", "partial_json": piece.function.arguments}, piece.function.arguments
            )

    def _begin(self, block: TextBlock | ToolUseBlock) -> None:
        self._close()
        self._open = block
        self._event("content_block_start", index=len(self._blocks), content_block=block)

    def _delta(self, delta: dict[str, str], text: str) -> None:
        self._texts.append(text)
        self._event("content_block_delta", index=len(self._blocks), delta=delta)

    def _close(self) -> None:
        """End the open block, if there is one."""
        block, text = self._open, "".join(self._texts)
        if block is None:
            return
        self._event("content_block_stop", index=len(self._blocks))
        if isinstance(block, TextBlock):
            self._blocks.append(TextBlock(text))
        else:
            self._blocks.append(ToolUseBlock(block.id, block.name, _input(text)))
        self._open = None
        self._texts.clear()

    def _event(self, kind: str, **fields: Any) -> None:
        self._events.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), encode_json({"type": kind, **fields})))

    def _written(self) -> bytes:
        """The events since the last call."""
        events, self._events = self._events, []
        return b"".join(events)


def _input(arguments: str) -> Raw:
    """Those of a call that was cut short are no object, and none is better than a body that is no JSON."""
    try:
        msgspec.json.decode(arguments, type=dict[str, Any])
    except msgspec.MsgspecError:
        return NO_INPUT
    return Raw(arguments.encode())


def _message_usage(usage: ChatUsage) -> MessageUsage:
    cached = usage.prompt_tokens_details.cached_tokens
    return MessageUsage(usage.prompt_tokens - cached, usage.completion_tokens, cached)
