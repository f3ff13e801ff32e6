"""One request: what is asked, of which server, its body, and the text that came back for the turn after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from vlmrt.tools.bench.media import Media

EVENT = b"data:"
DONE = b"[DONE]"

Counts = Literal["every chunk", "at the end", "none"]


class Ask(msgspec.Struct, frozen=True):
    """One request: media, a text, and how many tokens the answer has."""

    text: str
    num_tokens: int | None  # None: as many as the context holds
    media: tuple[Media, ...] = ()
    at_s: float = 0.0  # not sent earlier than this after the start
    turn: int = 1  # of a dialogue: from 2 on, what its client asked and got since turn 1 is sent before it
    exact: bool = True  # an answer of any other length has failed
    messages: bytes | None = None  # JSON of a list of messages, in place of text and media
    fields: bytes = b"{}"  # JSON of an object: fields of this request's body, before all others


class Target(msgspec.Struct, frozen=True):
    """The server, and what it takes."""

    url: str  # without a slash at its end
    endpoint: str = "/v1/chat/completions"
    model: str = "model"
    headers: tuple[tuple[str, str], ...] = ()
    ignore_eos: bool = True  # whether bodies have that field
    counts: Counts = "every chunk"  # of tokens, that are asked for
    fields: bytes = b'{"temperature":0}'  # JSON of an object: more fields of every body
    verified: bool = True  # the certificate of an https server
    tokenizer: str | None = None  # a tokenizer.json, for answers whose chunks have no counts

    @property
    def is_chat(self) -> bool:
        return self.endpoint.endswith("/chat/completions")


class Dialogue:
    """The messages of a client since turn 1. They stay JSON, so that a body costs little more than its copy."""

    def __init__(self, target: Target, parts: Mapping[Media, bytes]) -> None:
        self._target = target
        self._parts = parts
        self._messages: list[msgspec.Raw] = []

    def body(self, ask: Ask, answer: bytes = b"") -> bytes:
        """`answer`: the stream that the request before this one got; no matter in turn 1.

        Counts come with every chunk where the server does that: a token may have no text of its own, and several may
        share a chunk.
        Raises: ValueError if the answer is no stream of chunks.
        """
        target = self._target
        body: dict[str, object] = {"model": target.model, **self._asked(ask, answer), "stream": True}
        if target.ignore_eos:
            body["ignore_eos"] = True
        if target.counts != "none":
            every_chunk = {"continuous_usage_stats": True} if target.counts == "every chunk" else {}
            body["stream_options"] = {"include_usage": True, **every_chunk}
        if ask.num_tokens is not None:
            body["max_tokens"] = ask.num_tokens
        return msgspec.json.encode(body | fields_of(target.fields) | fields_of(ask.fields))

    def _asked(self, ask: Ask, answer: bytes) -> dict[str, object]:
        if not self._target.is_chat:
            return {"prompt": ask.text}
        if ask.messages is not None:
            return {"messages": msgspec.Raw(ask.messages)}
        if ask.turn == 1:
            self._messages = []
        else:
            self._messages.append(_encoded({"role": "assistant", "content": text_of(answer)}))
        content: object = ask.text
        if ask.media:
            content = [*(msgspec.Raw(self._parts[each]) for each in ask.media), {"type": "text", "text": ask.text}]
        self._messages.append(_encoded({"role": "user", "content": content}))
        return {"messages": self._messages}


def fields_of(text: bytes) -> dict[str, msgspec.Raw]:
    """The fields of a JSON object, each still JSON."""
    return msgspec.json.decode(text, type=dict[str, msgspec.Raw]) if text != b"{}" else {}


def _encoded(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


class Delta(msgspec.Struct):
    content: str | None = None


class Choice(msgspec.Struct):
    delta: Delta | None = None  # of a chat
    text: str | None = None  # of a completion


class Chunk(msgspec.Struct):
    """Of an event, what is the answer's text; errors and the counts at the end have none."""

    choices: tuple[Choice, ...] = ()


_CHUNK = msgspec.json.Decoder(Chunk)


def text_of(answer: bytes) -> str:
    """The text of a whole stream of events, or of some whole lines of one.

    Raises: ValueError if an event is neither a chunk in valid UTF-8 nor the end.
    """
    data = (line.removeprefix(EVENT).strip() for line in answer.split(b"\n") if line.startswith(EVENT))
    try:
        chunks = [_CHUNK.decode(chunk) for chunk in data if chunk != DONE]
    except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
        raise ValueError(f"the answer is no stream of chunks: {wrong}") from wrong
    return "".join(_text(choice) for chunk in chunks for choice in chunk.choices)


def _text(choice: Choice) -> str:
    return (choice.delta.content if choice.delta is not None else choice.text) or ""
