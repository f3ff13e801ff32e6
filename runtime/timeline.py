"""Where one request spent its time: spans of the actors it went through.

All processes of a host read the same monotonic clock, so times of one actor compare with those of another.  Media and
ViT tell begin and end with their answers, the scheduler gathers those with its own and hands them to the edge, which
keeps the timelines.
"""

from __future__ import annotations

from typing import Literal

import msgspec

SpanName = Literal[
    "receive",  # edge: the request's body
    "fetch",  # edge: the bytes of one picture or clip
    "identify",  # edge: its hash, and its size from the header; of a clip, a media worker's look into it
    "grammar",  # edge: compiling what the answer has to follow
    "prompt",  # edge: template and tokenizer
    "look_up",  # edge: pictures that are named without their bytes, asked of the scheduler
    "queue",  # scheduler: from the submit to the first step that works for the request
    "media_wait",  # scheduler: from the submit until the rows of its last picture were there
    "decode_wait",  # scheduler: from the submit until a media worker began with the picture
    "decode_media",  # media: decode and resize the picture
    "encode_wait",  # scheduler: from its pixels until the ViT began with it
    "encode",  # ViT: the forward that the picture was in
    "restore",  # ViT: its rows copied back from host memory
    "hand_off",  # scheduler: from the rows to the step that reads them
    "prefill",  # LLM: from the first step that works for the request to its first token
    "decode",  # LLM: from its first token to its last
    "stream",  # edge: from the first byte of the answer to the last
]


class Span(msgspec.Struct, frozen=True, array_like=True):
    """One stretch of a request's time.  The groups of a clip are one span: from the first one's begin to the last's
    end."""

    name: SpanName
    actor: str  # an ActorName
    begin_s: float  # of the monotonic clock
    end_s: float
    what: str = ""  # which of several: a picture's place in the request or the beginning of its mm_hash; a choice

    @property
    def duration_s(self) -> float:
        return self.end_s - self.begin_s


class Timeline(msgspec.Struct, frozen=True):
    """What an edge knows of one request, open or ended."""

    label: str  # its x-request-id
    path: str  # the route it came to
    arrived_s: float  # of the monotonic clock
    arrived_at_s: float  # the same moment in seconds since 1970
    answer_id: str = ""  # "": nothing was submitted (yet)
    end_s: float | None = None  # of the monotonic clock; None: it is open
    outcome: str = ""  # finish_reason of its first choice, code of its error, or "aborted"; "" while it is open
    first_token_s: float | None = None  # of the monotonic clock
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_media: int = 0  # pictures and groups of clips in its prompts
    max_gap_s: float = 0.0  # the longest time between two tokens of a choice
    traceparent: str = ""  # the W3C header that the request came with
    spans: tuple[Span, ...] = ()  # by begin_s
    num_lost_spans: int = 0  # for which there was no room
