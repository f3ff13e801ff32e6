"""What the chunks of every streamed answer have in common."""

from __future__ import annotations

from typing import Literal

from vlmrt.actors.edge.generation import Answer
from vlmrt.actors.edge.request_fields import SamplingFields
from vlmrt.actors.edge.responses import encode_json
from vlmrt.actors.edge.stream import DONE

UsageStyle = Literal["none", "last", "every"]


def usage_style(fields: SamplingFields) -> UsageStyle:
    options = fields.stream_options
    if options is None:
        return "none"
    if options.continuous_usage_stats:
        return "every"
    return "last" if options.include_usage else "none"


class ChunkWriter:
    """Server-sent events of one answer.  What is the same in all of them is encoded once.

    Args: constant: the fields that all have; usage: "last" adds a chunk of its own before the end, and null to the
    others; "every" puts the counts so far into every chunk as well.
    """

    def __init__(self, constant: dict[str, str | int], usage: UsageStyle) -> None:
        self._start = b"data: " + encode_json(constant)[:-1] + b',"choices":['
        self._usage = usage
        self._end = b',"usage":null}\n\n' if usage == "last" else b"}\n\n"

    def chunk(self, answer: Answer, choice: bytes, extra: bytes = b"") -> bytes:
        """One event.

        Args: choice: its one choice, encoded; extra: further fields of the chunk, encoded, each after a comma.
        """
        end = self._end if self._usage != "every" else b',"usage":' + encode_json(answer.usage) + b"}\n\n"
        return b"".join((self._start, choice, b"]", extra, end))

    def end(self, answer: Answer) -> bytes:
        if self._usage == "none":
            return DONE
        return self._start + b'],"usage":' + encode_json(answer.usage) + b"}\n\n" + DONE
