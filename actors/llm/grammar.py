"""Structured output: what the tokens of a slot's sequence may go on with, by a grammar as llguidance reads it.

Grammars are compiled in threads of their own from a sequence's admission on; its first token waits for that, if need
be.  Every rank follows its own sequences by its own tokens, so that all of a group come to the same masks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray

from vlmrt.actors.llm.sampler import ANY_TOKEN
from vlmrt.actors.llm.slots import Slots

MAX_COMPILED = 64  # grammars that are kept, least recently used first to go
COMPILING_THREADS = 2
MAX_MASK_THREADS = 8

logger = logging.getLogger(__name__)


def load_tokenizer(directory: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """A checkpoint's tokenizer for masks of vocab_size tokens; a grammar's end is followed by any of eos_token_ids.

    Raises: OSError if there is no tokenizer.json, ValueError if it is not one or has more tokens.
    """
    text = (directory / "tokenizer.json").read_text(encoding="utf-8")
    return LLTokenizer(text, n_vocab=vocab_size, eos_token=list(eos_token_ids) or None)


class GrammarCompiler:
    """Grammar texts -> matchers, in threads.

    The tokenizer is made in such a thread too, from the first moment on: it takes a second for a large vocabulary, all
    the while keeping other Python code from running, which is better done before anybody streams.
    """

    def __init__(self, load: Callable[[], LLTokenizer]) -> None:
        self._threads = ThreadPoolExecutor(COMPILING_THREADS, "grammar")
        self._tokenizer = self._threads.submit(_loaded, load)
        self._compiled = lru_cache(MAX_COMPILED)(self._compile)

    def matcher(self, grammar: str, token_ids: Sequence[int]) -> Future[LLMatcher | None]:
        """A matcher that has taken in these tokens; None where no grammar can be followed."""
        return self._threads.submit(self._matcher, grammar, token_ids)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _matcher(self, grammar: str, token_ids: Sequence[int]) -> LLMatcher | None:
        compiled = self._compiled(grammar)
        if compiled is None:
            return None
        matcher = compiled.deep_copy()
        consume(matcher, token_ids)
        return matcher

    def _compile(self, grammar: str) -> LLMatcher | None:
        tokenizer = self._tokenizer.result()
        if tokenizer is None:
            return None
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # copies begin with what the first mask takes: milliseconds
        return matcher


def _loaded(load: Callable[[], LLTokenizer]) -> LLTokenizer | None:
    try:
        return load()
    except (OSError, ValueError) as error:
        logger.warning("no grammar can be followed, requests that have one will fail: %s", error)
        return None


def consume(matcher: LLMatcher, token_ids: Iterable[int]) -> None:
    """Take in tokens, those behind the end of the grammar without a look."""
    for token_id in token_ids:
        if matcher.is_stopped():
            return
        matcher.consume_token(token_id)


@dataclass(slots=True)
class _Followed:
    """The grammar of the sequence in a slot."""

    matcher: Future[LLMatcher | None]
    num_consumed: int  # output tokens


class SlotGrammars:
    """The matchers of the sequences in the slots."""

    def __init__(self, slots: Slots, compiler: GrammarCompiler | None) -> None:
        """compiler: None: no grammar can be followed."""
        self._slots = slots
        self._compiler = compiler
        self._followed: dict[int, _Followed] = {}
        self._executor: LLExecutor | None = None

    def admit(self, slot: int, grammar: str) -> None:
        """Follow this grammar from where the sequence that has entered the slot is: the first token, or a later one."""
        if self._compiler is None:
            return
        first, last = int(self._slots.num_prompt_tokens[slot]), int(self._slots.num_known[slot])
        token_ids = self._slots.token_ids[slot, first:last].tolist()
        self._followed[slot] = _Followed(self._compiler.matcher(grammar, token_ids), len(token_ids))

    def release(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self._followed.pop(slot, None)

    def clear(self) -> None:
        self._followed.clear()

    def fill(
        self, slots: NDArray[np.int64], output_positions: NDArray[np.int64], words: NDArray[np.int32]
    ) -> list[int]:
        """Write the mask of each slot's token at that output position; the slots know all tokens before it.

        Shapes: int64 [R], int64 [R], int32 [R, ceil(vocab_size / 32)] -> slots that have no next token, or no grammar
        that can be followed.  Behind the end of a grammar, where a step planned ahead comes, only its end is allowed.
        """
        words.fill(ANY_TOKEN)
        failed, ready = [], []
        for row, (slot, position) in enumerate(zip(slots.tolist(), output_positions.tolist(), strict=True)):
            matcher = self._at(slot, position)
            if matcher is None:
                failed.append(slot)
            else:
                ready.append((matcher, row))
        if len(ready) == 1:
            fill_next_token_bitmask(ready[0][0], words, ready[0][1])
        elif ready:
            if self._executor is None:
                self._executor = LLExecutor(max(1, min(MAX_MASK_THREADS, len(os.sched_getaffinity(0)) // 2)))
            fill_next_token_bitmask_par(self._executor, ready, words)
        for matcher, row in ready:
            if matcher.is_error() or not words[row].any():
                words[row] = ANY_TOKEN
                failed.append(int(slots[row]))
        return failed

    def _at(self, slot: int, output_position: int) -> LLMatcher | None:
        """The matcher with all tokens before that position taken in, each once, however often it is asked for."""
        followed = self._followed.get(slot)
        matcher = None if followed is None else followed.matcher.result()
        if followed is None or matcher is None:
            return None
        first = int(self._slots.num_prompt_tokens[slot])
        new = self._slots.token_ids[slot, first + followed.num_consumed : first + output_position]
        consume(matcher, new.tolist())
        followed.num_consumed = output_position
        return None if matcher.is_error() else matcher
