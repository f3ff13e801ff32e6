"""Token ids as they come -> whole characters, cut at stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Protocol

import msgspec
from msgspec import Struct
from tokenizers import Tokenizer

REPLACEMENT = "�"


class TextStream(Protocol):
    """Tokens of one answer in, whole characters out; all that came out together equals the full decode."""

    def push(self, token_ids: Iterable[int]) -> str: ...

    def flush(self) -> str: ...


class Vocabulary:
    """What the text streams of one tokenizer share: the bytes of each token, found once.

    Args: always_shown: special tokens that are text like any other.
    """

    def __init__(self, tokenizer: Tokenizer, always_shown: Collection[str] = ()) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().items()
        special = (id for id, token in added if token.special and token.content not in always_shown)
        self.special_ids = frozenset(special)
        self._bytes: dict[int, bytes] = dict.fromkeys(self.special_ids, b"")
        decoder = msgspec.json.decode(tokenizer.to_str()).get("decoder") or {}
        self._byte_level = decoder.get("type") == "ByteLevel"
        self._char_bytes = _byte_level_alphabet()

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        if self._byte_level:
            return ByteLevelStream(self.token_bytes if skip_special_tokens else self.all_token_bytes)
        return DecodedStream(self.tokenizer, skip_special_tokens)

    def all_token_bytes(self, token_id: int) -> bytes:
        """As token_bytes, but special tokens are written with their names."""
        if token_id in self.special_ids:
            return (self.tokenizer.id_to_token(token_id) or "").encode()
        return self.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """What a token is called in an answer: the text that it is by itself."""
        return self.all_token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a byte-level token stands for; none for special tokens and unknown ids."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self.tokenizer.id_to_token(token_id) or ""
            try:
                known = bytes([self._char_bytes[char] for char in token])
            except KeyError:  # an added token is stored as it reads
                known = token.encode()
            self._bytes[token_id] = known
        return known


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary.  Source: GPT-2's encoder."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


class ByteLevelStream:
    """For byte-level vocabularies: the bytes of the tokens through an incremental UTF-8 decoder, at O(1) a token."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        return self._decoder.decode(b"".join(map(self._token_bytes, token_ids)))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class DecodedStream:
    """For any other vocabulary: decode a window of tokens with and without the new ones, give out the difference."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._decode = partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
        self._token_ids: list[int] = []
        self._start = 0  # of the window
        self._shown = 0  # tokens whose text is out

    def push(self, token_ids: Iterable[int]) -> str:
        self._token_ids.extend(token_ids)
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):  # perhaps the first bytes of a character
            return ""
        self._start, self._shown = self._shown, len(self._token_ids)
        return text

    def flush(self) -> str:
        text = self._new_text()
        self._start = self._shown = len(self._token_ids)
        return text

    def _new_text(self) -> str:
        before = self._decode(self._token_ids[self._start : self._shown])
        return self._decode(self._token_ids[self._start :])[len(before) :]


class StopFinder:
    """Holds text back while it may be the start of a stop string, and cuts it where one is complete.

    The one that is complete first counts, whatever pieces the text comes in; of several that end together the longest.
    Args: include: the text is cut behind the stop string, not before it.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that is safe to show; nothing more once `found` is set."""
        if self.found is not None or not self._stops:
            return "" if self.found is not None else text
        held = self._held + text
        places = [(at + len(stop), at, stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if places:
            end, at, self.found = min(places)
            self._held = ""
            return held[: end if self._include else at]
        keep = self._num_held(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


class TextRule(Struct, frozen=True):
    """How the tokens of an answer become its text."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False  # the stop string, and the text of the token that ends the answer, are shown
    skip_special_tokens: bool = True


class Detokenizer:
    """The text of one answer.

    Args: stop strings count only beyond the first min_tokens tokens, as stop tokens do.
    """

    def __init__(self, vocabulary: Vocabulary, rule: TextRule | None = None, min_tokens: int = 0) -> None:
        rule = rule or TextRule()
        self._text = vocabulary.stream(rule.skip_special_tokens)
        self._stops = StopFinder(rule.stops, rule.include_stop)
        self._num_free_tokens = min_tokens

    @property
    def stop(self) -> str | None:
        """The stop string that is complete, if one is; what comes after it is dropped."""
        return self._stops.found

    def push(self, token_ids: Sequence[int]) -> str:
        if not self._num_free_tokens:
            return self._stops.push(self._text.push(token_ids))
        free = self._text.push(token_ids[: self._num_free_tokens])
        rest = token_ids[self._num_free_tokens :]
        self._num_free_tokens = max(0, self._num_free_tokens - len(token_ids))
        return free + (self._stops.push(self._text.push(rest)) if rest else "")

    def flush(self) -> str:
        """The rest, when no more tokens come: characters cut in the middle read U+FFFD, as in the full decode."""
        shown = self._stops.push(self._text.flush())
        return shown if self.stop is not None else shown + self._stops.flush()
