"""Tokens of an answer whose chunks came without counts, by the tokenizer of its model."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from vlmrt.tools.bench.answers import Answer
from vlmrt.tools.bench.asks import text_of


class Tokenizer:
    """A tokenizer.json, or the directory that it lies in."""

    def __init__(self, path: str) -> None:
        """Raises: ValueError if there is none, or it cannot be read."""
        from pathlib import Path

        from tokenizers import Tokenizer as Loaded

        place = Path(path)
        file = place / "tokenizer.json" if place.is_dir() else place
        if not file.is_file():
            raise ValueError(f"--tokenizer {path}: no tokenizer.json there")
        try:
            self._loaded: Any = Loaded.from_file(str(file))
        except Exception as wrong:  # the package raises Exception itself
            raise ValueError(f"--tokenizer {path}: {wrong}") from wrong

    def ends(self, text: str) -> list[int]:
        """The number of characters up to the end of each token."""
        return [end for _, end in self._loaded.encode(text, add_special_tokens=False).offsets]

    def count(self, text: str) -> int:
        return len(self.ends(text))


def texts_by_arrival(answer: Answer, whole: bytes) -> list[str]:
    """The text that each arrival brought; nothing where the server sent counts.

    Raises: ValueError if the answer is no stream of chunks.
    """
    if answer.counted_by != "chunks":
        return []
    return [text_of(whole[start:end]) for start, end in pairwise((0, *answer.num_bytes))]


def recount(answer: Answer, texts: Sequence[str], tokenizer: Tokenizer) -> None:
    """Put the tokenizer's counts in place of the number of chunks. A token is there when its last character is."""
    if not texts:
        return
    counts = tokens_so_far(texts, tokenizer)
    kept = [index for index, (before, count) in enumerate(pairwise((0, *counts))) if count > before]
    answer.times_s = [answer.times_s[index] for index in kept]
    answer.num_bytes = [answer.num_bytes[index] for index in kept]
    answer.num_tokens = [counts[index] for index in kept]
    answer.counted_by = "tokenizer"


def tokens_so_far(texts: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """How many tokens of the joined text are complete after each of its pieces."""
    ends = tokenizer.ends("".join(texts))
    return [bisect_right(ends, num_chars) for num_chars in accumulate(map(len, texts))]
