"""Which tokens an answer's text is made of, with their logprobs, told no earlier than the text itself."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable

from msgspec import Struct

from vlmrt.runtime.messages import TokenLogprobs


class ShownToken(Struct, frozen=True):
    """A token whose text is shown.  The bytes of all of an answer's, joined, are the bytes of its text.

    Bytes that are no UTF-8 stand for U+FFFD in the text.
    """

    token_id: int
    logprobs: TokenLogprobs
    text_bytes: bytes  # of the last token before a stop string: those before it
    offset: int  # in the text, of the character that its first byte belongs to


class _Held(Struct, frozen=True):
    token: ShownToken
    last_char: int  # that its bytes belong to
    begun: bytes  # of the character at token.offset, by the tokens before


class TokenTrace:
    """Holds each token of one answer until every character that it has a part in is shown.

    Args: token_bytes tells what a token adds to the text.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held: deque[_Held] = deque()
        self._num_decoded = 0  # characters
        self._num_shown = 0

    def push(self, token_id: int, logprobs: TokenLogprobs) -> None:
        text_bytes = self._token_bytes(token_id)
        begun, _ = self._decoder.getstate()
        offset = self._num_decoded
        self._num_decoded += len(self._decoder.decode(text_bytes))
        is_whole = text_bytes and not self._decoder.getstate()[0]
        last_char = self._num_decoded - 1 if is_whole else self._num_decoded
        self._held.append(_Held(ShownToken(token_id, logprobs, text_bytes, offset), last_char, begun))

    def show(self, text: str) -> list[ShownToken]:
        """The tokens that this piece of the text completes."""
        self._num_shown += len(text)
        shown = []
        while self._held and self._held[0].last_char < self._num_shown:
            shown.append(self._held.popleft().token)
        return shown

    def finish(self, stopped: bool) -> list[ShownToken]:
        """The rest: all of it, or where a stop string was found, what came before the cut."""
        rest, self._held = self._held, deque()
        if not stopped:
            return [held.token for held in rest]
        return [token for held in rest if (token := self._cut(held)) is not None]

    def _cut(self, held: _Held) -> ShownToken | None:
        token = held.token
        room = self._num_shown - token.offset
        if room <= 0:
            return None
        size = len(token.text_bytes)
        while size and len((held.begun + token.text_bytes[:size]).decode(errors="replace")) > room:
            size -= 1
        if token.text_bytes and not size:
            return None
        return ShownToken(token.token_id, token.logprobs, token.text_bytes[:size], token.offset)
