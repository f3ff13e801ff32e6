"""What a request demands of the form of its answer: a grammar for the ranks, and how the text is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import Struct

from vlmrt.actors.edge.choice import Delta, FunctionDelta, PlainText, Shape, ShownReason, ToolCallDelta
from vlmrt.actors.edge.grammar import GrammarChecker
from vlmrt.actors.edge.refusals import refuse
from vlmrt.actors.edge.request_fields import SamplingFields
from vlmrt.actors.edge.response_format import OutputGrammar
from vlmrt.actors.edge.tool_parser import (
    AnswerParser,
    Arguments,
    CallStart,
    Content,
    NamedCallParser,
    RequiredCallParser,
    ToolCallParser,
)
from vlmrt.actors.edge.tool_parser import Delta as ParsedDelta
from vlmrt.actors.edge.tools import NO_TOOLS, CallTags, ToolUse, answer_grammar
from vlmrt.runtime.messages import FinishReason


class AnswerForm(Struct, frozen=True):
    grammar: str = ""  # as in Sampling
    shape: Callable[[], Shape] = PlainText  # of one choice


class AnswerForms:
    """Works out the form of answers."""

    def __init__(self, checker: GrammarChecker, tags: CallTags) -> None:
        self._checker = checker
        self._tags = tags

    async def form(self, fields: SamplingFields, use: ToolUse = NO_TOOLS) -> AnswerForm:
        """Raises: RequestError 400 naming the field, 503 where too many grammars are being compiled."""
        grammar = answer_grammar(use, fields.output_grammar(), self._tags)
        if grammar is not None:
            _check_beside(fields, grammar)
        text = await self._checker.accept(grammar) if grammar is not None else ""
        return AnswerForm(text, PlainText if use.mode == "none" else lambda: ToolCallShape(use))


def _check_beside(fields: SamplingFields, grammar: OutputGrammar) -> None:
    """A grammar says itself where the answer ends."""
    beside = f" cannot be combined with {grammar.param}"
    refuse(bool(fields.min_tokens), "min_tokens", f" = {fields.min_tokens}{beside}")
    refuse(bool(fields.ignore_eos), "ignore_eos", f" = true{beside}")


class ToolCallShape:
    """Content and tool calls."""

    def __init__(self, use: ToolUse) -> None:
        self._parser = _parser(use)
        self._ends_as_call = use.mode != "named"  # as OpenAI has it

    def push(self, text: str) -> Sequence[Delta]:
        return [_delta(delta) for delta in self._parser.push(text)]

    def finish(self, reason: FinishReason) -> tuple[Sequence[Delta], ShownReason]:
        deltas = [_delta(delta) for delta in self._parser.flush()]
        called = reason == "stop" and self._ends_as_call and self._parser.num_calls
        return deltas, "tool_calls" if called else reason


def _parser(use: ToolUse) -> AnswerParser:
    match use.mode:
        case "named":
            return NamedCallParser(use.allowed[0].name)
        case "required":
            return RequiredCallParser()
        case _:
            return ToolCallParser(use.max_calls)


def _delta(parsed: ParsedDelta) -> Delta:
    match parsed:
        case Content():
            return Delta(content=parsed.text)
        case CallStart():
            start = ToolCallDelta(parsed.index, FunctionDelta("", parsed.name), parsed.id, "function")
            return Delta(tool_calls=(start,))
        case Arguments():
            return Delta(tool_calls=(ToolCallDelta(parsed.index, FunctionDelta(parsed.text)),))
