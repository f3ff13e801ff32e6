"""What the process behind an LLM tells it: one line of JSON each."""

from __future__ import annotations

import msgspec


class Loading(msgspec.Struct, frozen=True, tag=True):
    actor: str
    stage: str
    done: int
    total: int


class ServiceReady(msgspec.Struct, frozen=True, tag=True):
    url: str
    max_num_seqs: int


class ServiceNews(msgspec.Struct, frozen=True, tag=True):
    """For a log: an actor was lost, or restarts."""

    text: str


class ServiceFailed(msgspec.Struct, frozen=True, tag=True):
    message: str


Report = Loading | ServiceReady | ServiceNews | ServiceFailed

encode_report = msgspec.json.Encoder().encode
decode_report = msgspec.json.Decoder(Report).decode
