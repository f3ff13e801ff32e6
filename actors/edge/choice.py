"""One choice of an answer: its tokens as they come -> text cut at stops -> deltas of its message, and its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from msgspec import UNSET, Struct, UnsetType

from vlmrt.actors.edge.detokenizer import Detokenizer, TextRule, Vocabulary
from vlmrt.actors.edge.token_trace import ShownToken, TokenTrace
from vlmrt.runtime.messages import FinishReason, Sampling, StopRule, TokenOutput

ShownReason = FinishReason | Literal["tool_calls"]  # why a choice ended, as clients read it


class FunctionDelta(Struct, frozen=True):
    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(Struct, frozen=True):
    """A piece of a call: its id, type and name come first, then its arguments bit by bit."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Delta(Struct, frozen=True):
    """What one piece of text adds to a message."""

    content: str | UnsetType = UNSET
    tool_calls: tuple[ToolCallDelta, ...] | UnsetType = UNSET


class Shape(Protocol):
    """What the text of one choice becomes."""

    def push(self, text: str) -> Sequence[Delta]:
        """What the message gains by this piece; what may yet turn out otherwise is held back."""
        ...

    def finish(self, reason: FinishReason) -> tuple[Sequence[Delta], ShownReason]:
        """What was held back, when the text has ended for that reason, and the reason to be shown."""
        ...


class PlainText:
    """The text is the message's content."""

    def push(self, text: str) -> Sequence[Delta]:
        return (Delta(text),) if text else ()

    def finish(self, reason: FinishReason) -> tuple[Sequence[Delta], ShownReason]:
        return (), reason


class ToolCall(Struct, frozen=True):
    id: str
    name: str
    arguments: str


class Piece(Struct, frozen=True):
    """News of one choice.  Everything in it travels once; the last of a choice has its finish_reason."""

    index: int
    deltas: tuple[Delta, ...]
    tokens: tuple[ShownToken, ...]  # where logprobs are asked for
    token_ids: tuple[int, ...]  # all, the end token included
    finish_reason: ShownReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token that a client named and that ended it

    @property
    def content(self) -> str:
        return "".join(delta.content for delta in self.deltas if isinstance(delta.content, str))

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Those that begin in it, as far as it has them."""
        pieces = [call for delta in self.deltas if isinstance(delta.tool_calls, tuple) for call in delta.tool_calls]
        arguments: dict[int, list[str]] = {}
        for piece in pieces:
            arguments.setdefault(piece.index, []).append(piece.function.arguments)
        return tuple(
            ToolCall(piece.id, piece.function.name, "".join(arguments[piece.index]))
            for piece in pieces
            if isinstance(piece.id, str) and isinstance(piece.function.name, str)
        )


class ChoiceRule(Struct, frozen=True):
    """How the tokens of a choice are read."""

    sampling: Sampling
    stop: StopRule
    text: TextRule = TextRule()
    named_stop_ids: frozenset[int] = frozenset()  # of stop.stop_token_ids, those that the client named
    shape: Callable[[], Shape] = PlainText


class Choice:
    """What has come of one choice."""

    def __init__(self, index: int, rule: ChoiceRule, vocabulary: Vocabulary) -> None:
        self.index = index
        self.num_tokens = 0
        self.ended = False
        self._named_stop_ids = rule.named_stop_ids
        self._hidden_ids = frozenset(() if rule.text.include_stop else rule.stop.stop_token_ids)
        self._detokenizer = Detokenizer(vocabulary, rule.text, rule.stop.min_tokens)
        self._shape = rule.shape()
        self._trace: TokenTrace | None = None
        if rule.sampling.num_logprobs >= 0:
            skip = rule.text.skip_special_tokens
            self._trace = TokenTrace(vocabulary.token_bytes if skip else vocabulary.all_token_bytes)
        self._has_stops = bool(rule.text.stops)
        self._waiting_tokens: list[ShownToken] = []
        self._waiting_ids: list[int] = []

    @property
    def stopped(self) -> bool:
        """A stop string ended it: no more of its tokens are needed."""
        return self._detokenizer.stop is not None

    def take(self, outputs: Sequence[TokenOutput]) -> Piece | None:
        """What these outputs, at least one, let out; None where that is nothing yet."""
        token_ids = [token_id for output in outputs for token_id in output.token_ids]
        reason = outputs[-1].finish_reason
        num_shown = len(token_ids) - (reason == "stop" and token_ids[-1:] != [] and token_ids[-1] in self._hidden_ids)
        text, num_read = self._read(token_ids[:num_shown])
        if self._trace is not None:
            logprobs = [entry for output in outputs for entry in output.logprobs]
            for token_id, entry in zip(token_ids[:num_read], logprobs, strict=False):
                self._trace.push(token_id, entry)
        if reason is not None and not self.stopped:
            text += self._detokenizer.flush()
        if self.stopped:
            reason = "stop"
            del token_ids[num_read:]
        self.num_tokens += len(token_ids)
        self._waiting_ids += token_ids
        if self._trace is not None:
            self._waiting_tokens += self._trace.show(text)
        return self._piece(text, reason)

    def _read(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """(text, number of tokens that were read for it): no more than the one that completes a stop string."""
        if not self._has_stops:
            return self._detokenizer.push(token_ids), len(token_ids)
        text, num_read = "", 0
        while num_read < len(token_ids) and not self.stopped:
            text += self._detokenizer.push(token_ids[num_read : num_read + 1])
            num_read += 1
        return text, num_read

    def _piece(self, text: str, reason: FinishReason | None) -> Piece | None:
        deltas = tuple(self._shape.push(text))
        shown_reason: ShownReason | None = None
        stop_reason: str | int | None = None
        if reason is not None:
            self.ended = True
            rest, shown_reason = self._shape.finish(reason)
            deltas += tuple(rest)
            stop_reason = self._stop_reason(reason)
            if self._trace is not None:
                self._waiting_tokens += self._trace.finish(self.stopped)
        if not deltas and reason is None:
            return None
        tokens, self._waiting_tokens = tuple(self._waiting_tokens), []
        token_ids, self._waiting_ids = tuple(self._waiting_ids), []
        return Piece(self.index, deltas, tokens, token_ids, shown_reason, stop_reason)

    def _stop_reason(self, reason: FinishReason) -> str | int | None:
        if self.stopped:
            return self._detokenizer.stop
        last = self._waiting_ids[-1] if self._waiting_ids else None
        return last if reason == "stop" and last in self._named_stop_ids else None
