"""One request: what is asked, its body, and the text that came back for the turn after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from benchmarks.clips import Clip, clip_url
from benchmarks.images import Picture, data_url

EVENT = b"data: "
DONE = b"[DONE]"

Medium = Picture | Clip


class Ask(NamedTuple):
    """One request: pictures and clips, a text, and how many tokens the answer has."""

    text: str
    num_tokens: int | None  # None: as many as the context holds
    pictures: tuple[Medium, ...] = ()
    at_s: float = 0.0  # not sent earlier than this after the start
    turn: int = 1  # of a dialogue: from 2 on, what its client asked and got since turn 1 is sent before it


def drawn(asks: Iterable[Ask]) -> dict[Medium, msgspec.Raw]:
    """Every picture and clip of these as the part of a message that it is in any body."""
    media = dict.fromkeys(medium for ask in asks for medium in ask.pictures)
    return {medium: encoded(part_of(medium)) for medium in media}


def part_of(medium: Medium) -> dict[str, object]:
    match medium:
        case Picture():
            return {"type": "image_url", "image_url": {"url": data_url(medium)}}
        case Clip():
            sampling = {"fps": medium.fps, "num_frames": medium.num_frames}
            chosen = {name: value for name, value in sampling.items() if value is not None}
            return {"type": "video_url", "video_url": {"url": clip_url(medium), **chosen}}


class Dialogue:
    """The messages of a client since turn 1. They stay JSON, so that a body costs little more than its copy."""

    def __init__(self, parts: Mapping[Medium, msgspec.Raw]) -> None:
        self._parts = parts
        self._messages: list[msgspec.Raw] = []

    def body(self, ask: Ask, answer: bytes = b"") -> bytes:
        """`answer`: the stream that the request before this one got; no matter in turn 1.

        Counts come with every chunk: a token may have no text of its own, and several may share a chunk.
        Raises: ValueError if the answer is no stream of chunks.
        """
        if ask.turn == 1:
            self._messages = []
        else:
            self._messages.append(encoded({"role": "assistant", "content": text_of(answer)}))
        content = [*(self._parts[picture] for picture in ask.pictures), {"type": "text", "text": ask.text}]
        self._messages.append(encoded({"role": "user", "content": content}))
        body: dict[str, object] = {
            "model": "model",
            "messages": self._messages,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if ask.num_tokens is not None:
            body["max_tokens"] = ask.num_tokens
        return msgspec.json.encode(body)


def encoded(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


class Delta(msgspec.Struct):
    content: str | None = None


class Choice(msgspec.Struct):
    delta: Delta


class Chunk(msgspec.Struct):
    """Of an event, what is the answer's text; errors and the counts at the end have none."""

    choices: tuple[Choice, ...] = ()


def text_of(answer: bytes) -> str:
    """The text of a whole stream of events.

    Raises: ValueError if an event is neither a chunk in valid UTF-8 nor the end.
    """
    decoder = msgspec.json.Decoder(Chunk)
    data = (event.removeprefix(EVENT) for event in answer.split(b"\n\n") if event.startswith(EVENT))
    try:
        chunks = [decoder.decode(chunk) for chunk in data if chunk != DONE]
    except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
        raise ValueError(f"the answer is no stream of chunks: {wrong}") from wrong
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
