"""Answers of POST /v1/responses, whole and as typed events."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Raw, Struct

from vlmrt.actors.edge.choice import Piece, ToolCallDelta
from vlmrt.actors.edge.generation import Answer
from vlmrt.actors.edge.refusals import NULL
from vlmrt.actors.edge.responses import ChatUsage, encode_json
from vlmrt.actors.edge.responses_request import FunctionTool, NamedTools, ResponsesRequest, TextFormat, TextOptions
from vlmrt.actors.edge.stream import DONE
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.messages import Sampling

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(Struct, frozen=True, tag_field="type", tag="output_text"):
    text: str
    annotations: tuple[Raw, ...] = ()
    logprobs: tuple[Raw, ...] = ()


class OutputMessage(Struct, frozen=True, tag_field="type", tag="message"):
    id: str
    status: Status
    content: tuple[OutputText, ...]
    role: Literal["assistant"] = "assistant"


class FunctionCall(Struct, frozen=True, tag_field="type", tag="function_call"):
    id: str
    status: Status
    call_id: str
    name: str
    arguments: str


class InputTokensDetails(Struct, frozen=True):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct, frozen=True):
    reasoning_tokens: int = 0


class ResponseUsage(Struct, frozen=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    total_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()


class ResponseFailure(Struct, frozen=True):
    code: str
    message: str


class IncompleteDetails(Struct, frozen=True):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseObject(Struct, frozen=True, kw_only=True):
    """An answer, and what was asked for it."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: tuple[OutputMessage | FunctionCall, ...] = ()
    usage: ResponseUsage | None = None
    instructions: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    text: TextOptions
    tools: tuple[FunctionTool, ...]
    tool_choice: Literal["none", "auto", "required"] | NamedTools
    parallel_tool_calls: bool
    metadata: Raw
    user: Raw
    reasoning: Raw
    safety_identifier: Raw
    prompt_cache_key: Raw
    truncation: Literal["auto", "disabled"]
    previous_response_id: None = None
    background: Literal[False] = False
    store: Literal[False] = False  # nothing is kept, whatever was asked
    service_tier: Literal["default"] = "default"
    top_logprobs: Literal[0] = 0
    max_tool_calls: None = None


class ResponsesFormat:
    """Writes the answer to one request."""

    def __init__(self, answer_id: str, request: ResponsesRequest, sampling: Sampling, model: str) -> None:
        wanted = request.text or TextOptions()
        self._response = ResponseObject(
            id=answer_id,
            created_at=int(time.time()),
            status="in_progress",
            model=model,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            text=TextOptions(wanted.format or TextFormat("text"), wanted.verbosity or "medium"),
            tools=tuple(_told(tool) for tool in request.tools or ()),
            tool_choice=request.tool_choice or "auto",
            parallel_tool_calls=request.parallel_tool_calls is not False,
            metadata=request.metadata if bytes(request.metadata) != b"null" else Raw(b"{}"),
            user=request.user,
            reasoning=NULL,
            safety_identifier=request.safety_identifier,
            prompt_cache_key=request.prompt_cache_key,
            truncation=request.truncation or "disabled",
        )
        self._num_events = 0
        self._events: list[bytes] = []
        self._items: list[OutputMessage | FunctionCall] = []  # those that have ended
        self._open: OutputMessage | FunctionCall | None = None
        self._texts: list[str] = []  # of the open item
        self._finish_reason: str | None = None

    def whole(self, answer: Answer, choices: Sequence[Piece]) -> bytes:
        self.news(answer, choices)
        return encode_json(self._finished(answer))

    def begin(self, answer: Answer) -> bytes:
        self._event("response.created", response=self._response)
        self._event("response.in_progress", response=self._response)
        return self._written()

    def news(self, answer: Answer, pieces: Sequence[Piece]) -> bytes:
        for piece in pieces:
            for delta in piece.deltas:
                if isinstance(delta.content, str):
                    self._text(delta.content)
                for call in delta.tool_calls or ():
                    self._call(call)
            if piece.finish_reason is not None:
                self._finish_reason = piece.finish_reason
                self._finish()
        return self._written()

    def end(self, answer: Answer) -> bytes:
        response = self._finished(answer)
        self._event(f"response.{response.status}", response=response)
        return self._written() + DONE

    def failed(self, error: RequestError) -> bytes:
        failure = ResponseFailure(error.code or "server_error", error.message)
        response = msgspec.structs.replace(self._response, status="failed", error=failure, output=tuple(self._items))
        self._event("error", code=failure.code, message=failure.message, param=error.param)
        self._event("response.failed", response=response)
        return self._written() + DONE

    def _finished(self, answer: Answer) -> ResponseObject:
        is_cut = self._finish_reason == "length"
        return msgspec.structs.replace(
            self._response,
            completed_at=None if is_cut else int(time.time()),
            status=self._status(),
            incomplete_details=IncompleteDetails() if is_cut else None,
            output=tuple(self._items),
            usage=response_usage(answer.usage),
        )

    def _status(self) -> Status:
        return "incomplete" if self._finish_reason == "length" else "completed"

    def _text(self, text: str) -> None:
        if not isinstance(self._open, OutputMessage):
            self._close("completed")
            self._begin(OutputMessage(f"msg_{secrets.token_hex(16)}", "in_progress", ()))
            self._item_event("response.content_part.added", content_index=0, part=OutputText(""))
        self._texts.append(text)
        self._item_event("response.output_text.delta", content_index=0, delta=text, logprobs=())

    def _call(self, piece: ToolCallDelta) -> None:
        if piece.id and piece.function.name:
            self._close("completed")
            item_id = f"fc_{secrets.token_hex(16)}"
            self._begin(FunctionCall(item_id, "in_progress", piece.id, piece.function.name, ""))
        if piece.function.arguments:
            self._texts.append(piece.function.arguments)
            self._item_event("response.function_call_arguments.delta", delta=piece.function.arguments)

    def _finish(self) -> None:
        """No more comes: an answer of nothing at all is an empty message."""
        if self._open is None and not self._items:
            self._text("")
        self._close(self._status())

    def _begin(self, item: OutputMessage | FunctionCall) -> None:
        self._open = item
        self._texts.clear()
        self._event("response.output_item.added", output_index=len(self._items), item=item)

    def _close(self, status: Status) -> None:
        """End the open item, if there is one."""
        item, text = self._open, "".join(self._texts)
        if item is None:
            return
        if isinstance(item, OutputMessage):
            part = OutputText(text)
            self._item_event("response.output_text.done", content_index=0, text=text, logprobs=())
            self._item_event("response.content_part.done", content_index=0, part=part)
            item = msgspec.structs.replace(item, status=status, content=(part,))
        else:
            self._item_event("response.function_call_arguments.done", name=item.name, arguments=text)
            item = msgspec.structs.replace(item, status=status, arguments=text)
        self._event("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)
        self._open = None

    def _item_event(self, kind: str, **fields: Any) -> None:
        assert self._open is not None
        self._event(kind, item_id=self._open.id, output_index=len(self._items), **fields)

    def _event(self, kind: str, **fields: Any) -> None:
        event = encode_json({"type": kind, "sequence_number": self._num_events, **fields})
        self._num_events += 1
        self._events.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), event))

    def _written(self) -> bytes:
        """The events since the last call."""
        events, self._events = self._events, []
        return b"".join(events)


def response_usage(usage: ChatUsage) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
    )


def _told(tool: FunctionTool) -> FunctionTool:
    """The tool as answers show it, where every field is present."""
    return msgspec.structs.replace(
        tool,
        description=None if tool.description is UNSET else tool.description,
        parameters=NULL if tool.parameters is UNSET else tool.parameters,
        strict=None if tool.strict is UNSET else tool.strict,
    )
