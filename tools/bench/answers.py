"""The bytes of an answer while they come -> when which tokens arrived.

A server that sends counts with every chunk (continuous_usage_stats) says itself how many tokens there are so far: a
token without text is counted, and so are several that share a chunk. Of one that does not, a token is a chunk with
text, until a tokenizer counts the text again after the end (recounted.py).
"""

from __future__ import annotations

import re
from typing import Literal

CountedBy = Literal["usage", "tokenizer", "chunks"]

# no quote within a JSON string lacks its backslash; a longer number is no count of tokens, and every gap is a figure
USAGE = re.compile(rb'"completion_tokens":\s*(\d{1,7})(?!\d)')
PROMPT = re.compile(rb'"prompt_tokens":\s*(\d{1,9})(?!\d)')
TEXT = re.compile(rb'"(?:content|text|reasoning_content|reasoning|arguments)":\s*"(?!")')
ERROR = re.compile(rb'^data: ?(\{"error".*?)\r?$', re.MULTILINE)
END = re.compile(rb"^data: ?\[DONE\]\r?$", re.MULTILINE)
MAX_SHOWN_BYTES = 300


class Answer:
    """What has come of one answer, however its bytes were cut into pieces."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.times_s: list[float] = []  # of arrivals that brought tokens
        self.num_tokens: list[int] = []  # so far, at each of these times
        self.num_bytes: list[int] = []  # of whole lines so far, at each of these times
        self.counted_by: CountedBy | None = None  # None: no token yet
        self.usage_tokens: int | None = None  # of the whole answer as the server told them at last; read at its end
        self.prompt_tokens: int | None = None  # by the server
        self.error: str | None = None
        self.done = False
        self._rest = b""
        self._read_bytes = 0

    @property
    def count(self) -> int:
        return self.num_tokens[-1] if self.num_tokens else 0

    def push(self, piece: bytes, now_s: float) -> None:
        self.pieces.append(piece)
        data = self._rest + piece if self._rest else piece
        end = data.rfind(b"\n") + 1
        self._rest = data[end:]
        if not end:
            return
        lines = data[:end] if self._rest else data
        self._read_bytes += end
        if b'{"error"' in lines and (failed := ERROR.search(lines)) is not None:
            self.error = failed[1][:MAX_SHOWN_BYTES].decode(errors="replace")
        self.done = self.done or (b"[DONE]" in lines and END.search(lines) is not None)
        num_tokens = self._counted(lines)
        if num_tokens > self.count:
            self.times_s.append(now_s)
            self.num_tokens.append(num_tokens)
            self.num_bytes.append(self._read_bytes)

    def _counted(self, lines: bytes) -> int:
        """Tokens so far, with those of these lines."""
        if self.counted_by is None:
            self.counted_by = _counts_in(lines)
        if self.counted_by == "usage":
            at = lines.rfind(b'"completion_tokens":')
            found = USAGE.match(lines, at) if at >= 0 else None
            return int(found[1]) if found is not None else self.count
        if self.counted_by == "chunks":
            return self.count + sum(TEXT.search(line) is not None for line in lines.split(b"\n"))
        return self.count

    def end(self) -> bytes:
        """Nothing more comes. Returns all of it, which the answer itself keeps no longer."""
        whole, self.pieces = b"".join(self.pieces), []
        self.usage_tokens = _last(whole, b'"completion_tokens":', USAGE)
        self.prompt_tokens = _last(whole, b'"prompt_tokens":', PROMPT)
        return whole


def _last(text: bytes, name: bytes, pattern: re.Pattern[bytes]) -> int | None:
    found = pattern.match(text, at) if (at := text.rfind(name)) >= 0 else None
    return int(found[1]) if found is not None else None


def _counts_in(lines: bytes) -> CountedBy | None:
    """How the tokens of an answer are counted, by the first of its lines that says so."""
    for line in lines.split(b"\n"):
        if (found := USAGE.search(line)) is not None and int(found[1]) > 0:
            return "usage"
        if TEXT.search(line) is not None:
            return "chunks"
    return None
