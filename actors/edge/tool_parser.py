"""Text of an answer as it comes -> its content and its tool calls, in the form that Qwen's models write:

<tool_call>
{"name": "f", "arguments": {...}}
</tool_call>

What comes out depends on the text alone, never on where it was cut.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from typing import Literal, Protocol

import msgspec
from msgspec import Raw, Struct

from vlmrt.actors.edge.tools import CALL_BEGIN, CALL_END

BLANKS = " \t\r\n"
MAX_PIECE_CHARS = 4096  # read at a time: a state that leaves the rest to another copies it
CALL_TAIL = "}\n" + CALL_END
_PLACE = re.compile(r"[^ \t\r\n0-9+\-.eEtrufalsn:,]")  # outside strings: brackets, quotes, and what JSON does not have
_STRING_PLACE = re.compile(r'["\\\x00-\x1f]')
_HEAD = re.compile(re.escape(CALL_BEGIN) + r'\n\{"name": "([A-Za-z0-9_-]+)", "arguments": ')


class Content(Struct, frozen=True):
    text: str


class CallStart(Struct, frozen=True):
    index: int
    id: str
    name: str


class Arguments(Struct, frozen=True):
    """A piece of a call's arguments, which are JSON when all pieces are joined."""

    index: int
    text: str


Delta = Content | CallStart | Arguments


class AnswerParser(Protocol):
    """The pieces of one answer's text in, its deltas out."""

    num_calls: int

    def push(self, text: str) -> list[Delta]: ...

    def flush(self) -> list[Delta]: ...


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class NamedCallParser:
    """All text is the arguments of one call, whose function the client named."""

    def __init__(self, name: str, new_id: Callable[[], str] = new_call_id) -> None:
        self.num_calls = 0
        self._name = name
        self._new_id = new_id

    def push(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self.num_calls:
            return [Arguments(0, text)]
        self.num_calls = 1
        return [CallStart(0, self._new_id(), self._name), Arguments(0, text)]

    def flush(self) -> list[Delta]:
        return []


class RequiredCallParser:
    """Nothing but calls, to the letter of the grammar that the answer is held to: arguments go out as they come."""

    def __init__(self, new_id: Callable[[], str] = new_call_id) -> None:
        self.num_calls = 0
        self._new_id = new_id
        self._between = ""  # text outside arguments: the end of one call and the head of the next
        self._arguments: ObjectScanner | None = None

    def push(self, text: str) -> list[Delta]:
        deltas: list[Delta] = []
        while text:
            if self._arguments is not None:
                stop = self._arguments.push(text)
                deltas.append(Arguments(self.num_calls - 1, text[:stop]))
                text = text[stop:]
                if self._arguments.state != "open":
                    self._arguments = None
                continue
            self._between += text
            head = _HEAD.search(self._between)
            if head is None:
                break
            deltas.append(CallStart(self.num_calls, self._new_id(), head[1]))
            self.num_calls += 1
            self._arguments = ObjectScanner()
            text, self._between = self._between[head.end() :], ""
        return deltas

    def flush(self) -> list[Delta]:
        """The head of a call that was cut is content."""
        between, self._between = self._between, ""
        rest = between.removeprefix(CALL_TAIL) if self.num_calls else between
        return [Content(rest)] if rest and not (self.num_calls and CALL_TAIL.startswith(between)) else []


class ToolCallParser:
    """Content until a call begins; a call is held back until its JSON is complete, and is content where it is broken.

    Blanks around calls belong to neither.  Calls beyond max_calls are dropped.
    """

    def __init__(self, max_calls: int, new_id: Callable[[], str] = new_call_id) -> None:
        self.num_calls = 0
        self._max_calls = max_calls
        self._new_id = new_id
        self._read: Callable[[str], str] = self._read_content
        self._deltas: list[Delta] = []
        self._partial = ""  # the end of the text so far, where it may be the beginning of a mark
        self._blanks: list[str] = []  # not out yet: they may stand beside a call
        self._after_call = False  # nothing but blanks has come since
        self._call: list[str] = []  # what has come of a call
        self._object = ObjectScanner()

    def push(self, text: str) -> list[Delta]:
        for start in range(0, len(text), MAX_PIECE_CHARS):
            piece = text[start : start + MAX_PIECE_CHARS]
            while piece:
                piece = self._read(piece)
        deltas, self._deltas = self._deltas, []
        return deltas

    def flush(self) -> list[Delta]:
        """The rest, when no more text comes."""
        if self._read == self._read_call:
            self._give_up_call()
        partial, self._partial = self._partial, ""
        self._show(partial)
        if self._blanks and not self._after_call:
            self._deltas.append(Content("".join(self._blanks)))
        self._blanks.clear()
        return self.push("")

    def _read_content(self, text: str) -> str:
        """Takes text, returns what the next state is to read; so do the other states."""
        text, self._partial = self._partial + text, ""
        before, mark, rest = text.partition(CALL_BEGIN)
        if mark:
            self._show(before)
            self._call, self._object, self._read = [], ObjectScanner(), self._read_call
            return rest
        shown = len(text) - _num_begun(text, CALL_BEGIN)
        self._show(text[:shown])
        self._partial = text[shown:]
        return ""

    def _show(self, text: str) -> None:
        """Content; blanks at its end wait for what follows them."""
        body = text.rstrip(BLANKS)
        if body:
            self._deltas.append(Content("".join((*self._blanks, body))))
            self._blanks.clear()
            self._after_call = False
        if len(body) < len(text):
            self._blanks.append(text[len(body) :])

    def _read_call(self, text: str) -> str:
        start = 0 if self._object.state != "new" else len(text) - len(text.lstrip(BLANKS))
        stop = start + self._object.push(text[start:])
        self._call.append(text[:stop])
        match self._object.state:
            case "broken":
                self._give_up_call()
            case "complete":
                self._end_call("".join(self._call))
        return text[stop:]

    def _end_call(self, text: str) -> None:
        call = _decoded(text)
        if call is None:
            self._give_up_call()
            return
        if self.num_calls < self._max_calls:
            arguments = bytes(call.arguments).decode()
            self._deltas += (
                CallStart(self.num_calls, self._new_id(), call.name),
                Arguments(self.num_calls, arguments),
            )
            self.num_calls += 1
        self._blanks.clear()
        self._after_call = True
        self._read = self._read_end

    def _give_up_call(self) -> None:
        self._read = self._read_content
        self._show(CALL_BEGIN + "".join(self._call))

    def _read_end(self, text: str) -> str:
        """A call counts without its end mark as well."""
        text, self._partial = self._partial + text, ""
        rest = text.lstrip(BLANKS)
        if len(rest) < len(text):
            self._blanks.append(text[: len(text) - len(rest)])
        if rest.startswith(CALL_END):
            self._blanks.clear()
            self._read = self._read_content
            return rest[len(CALL_END) :]
        if CALL_END.startswith(rest):
            self._partial = rest
            return ""
        self._read = self._read_content
        return rest


def _num_begun(text: str, mark: str) -> int:
    """Length of the longest end of the text with which the mark begins."""
    lengths = range(min(len(text), len(mark) - 1), 0, -1)
    return next((length for length in lengths if mark.startswith(text[-length:])), 0)


class _Call(Struct, frozen=True):
    name: str
    arguments: Raw


_call_decoder = msgspec.json.Decoder(_Call)


def _decoded(text: str) -> _Call | None:
    """The call that a JSON object stands for, if it is one."""
    try:
        call = _call_decoder.decode(text)
        arguments = json.loads(bytes(call.arguments), parse_constant=_no_json)  # has no bound on numbers
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    return call if isinstance(arguments, dict) and call.name else None


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


class ObjectScanner:
    """Finds the end of a JSON object by its brackets and quotes; one that is broken in them ends where it breaks."""

    def __init__(self) -> None:
        self.state: Literal["new", "open", "complete", "broken"] = "new"
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def push(self, text: str) -> int:
        """How much of the text belongs to the object."""
        if not text:
            return 0
        if self.state == "new":
            if text[0] != "{":
                self.state = "broken"
                return 0
            self.state = "open"
        at = 0
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = (_STRING_PLACE if self._in_string else _PLACE).search(text, at)
            if found is None:
                break
            at = found.end()
            match found[0]:
                case '"':
                    self._in_string = not self._in_string
                case "\\" if self._in_string:
                    self._escaped = True
                case "{" | "[":
                    self._depth += 1
                case "}" | "]":
                    self._depth -= 1
                    if not self._depth:
                        self.state = "complete"
                        return at
                case _:
                    self.state = "broken"
                    return found.start()
        return len(text)
