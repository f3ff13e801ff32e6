"""Whether a grammar can be kept to: compiled once against the checkpoint's tokenizer before a rank ever sees it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Generic, TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from vlmrt.actors.edge.response_format import OutputGrammar, check_size
from vlmrt.runtime.errors import RequestError

DEADLINE_S = 5.0  # what is known to take longer is refused before; half of it, alone, is too long
MAX_WAITING = 256  # grammars that are compiled or wait for it
MAX_VERDICTS = 4096
MAX_REASON_CHARS = 300

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Job(Generic[T]):
    """Work for the thread that remembers when it began."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._began_s: float | None = None

    def __call__(self) -> T:
        self._began_s = time.monotonic()
        return self._work()

    def ran_s(self) -> float:
        """How long it has been running; 0 where it has not begun."""
        return 0.0 if self._began_s is None else time.monotonic() - self._began_s


def load_grammar_tokenizer(file: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer | None:
    """The tokenizer as grammars are compiled against, for logits of that width; None where it cannot be used.

    To be called before anybody is served: a vocabulary of 152,000 takes 1.4 s, in which no other Python code runs.
    """
    try:
        text = file.read_text(encoding="utf-8")
        return LLTokenizer(text, n_vocab=vocab_size, eos_token=list(eos_token_ids) or None)
    except (OSError, ValueError) as error:
        logger.warning("%s: requests with a grammar will be refused: %s", file, error)
        return None


class GrammarChecker:
    """Compiles grammars as the ranks will, in a thread of its own, and remembers what came of it."""

    def __init__(self, tokenizer: LLTokenizer | None, executor: Executor, deadline_s: float = DEADLINE_S) -> None:
        """Args: the executor has one thread, which nothing else waits for."""
        self._tokenizer = tokenizer
        self._executor = executor
        self._deadline_s = deadline_s
        self._num_waiting = 0
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()  # what is wrong with a grammar; empty: nothing

    async def accept(self, grammar: OutputGrammar) -> str:
        """The grammar as a rank reads it.

        Raises: RequestError 400 where it cannot be kept to, 503 where too many others are being compiled, 501 where
        no grammar can be.
        """
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise RequestError(
                f"{grammar.param}: this model's tokenizer cannot be used with grammars",
                status=501,
                code="grammar_unavailable",
                param=grammar.param,
            )
        text = grammar.text
        if grammar.is_gbnf:
            text = await self._run(lambda: _translated(grammar)) or ""
            if not text:
                raise _refused(grammar.param, self._too_slow())
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        verdict = self._verdicts.get(digest)
        if verdict is None:
            verdict = await self._run(lambda: _judge(tokenizer, text))
            verdict = self._too_slow() if verdict is None else verdict
            self._verdicts[digest] = verdict
            if len(self._verdicts) > MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        else:
            self._verdicts.move_to_end(digest)
        if verdict:
            raise _refused(grammar.param, verdict)
        return text

    async def _run(self, work: Callable[[], T]) -> T | None:
        """What the work returns; None: it was given enough time and has not ended."""
        if self._num_waiting >= MAX_WAITING:
            raise _busy()
        job = Job(work)
        self._num_waiting += 1
        try:
            async with asyncio.timeout(self._deadline_s):
                return await asyncio.get_running_loop().run_in_executor(self._executor, job)
        except TimeoutError:
            if job.ran_s() < self._deadline_s / 2:  # it stood behind others
                raise _busy() from None
            return None
        finally:
            self._num_waiting -= 1

    def _too_slow(self) -> str:
        return f"takes longer than {self._deadline_s:g} s to compile"


def _judge(tokenizer: LLTokenizer, text: str) -> str:
    """What is wrong with the grammar; the first mask shows what compiling it did not."""
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=LLParserLimits(verbose_errors=False))
    if not matcher.is_error():
        matcher.compute_bitmask()
    reason = matcher.get_error()
    if reason.startswith("NoExtension") or (not reason and matcher.is_stopped() and not matcher.is_accepting()):
        return "no text matches it"
    first_line = reason.partition("\n")[0]
    return first_line if len(first_line) <= MAX_REASON_CHARS else first_line[:MAX_REASON_CHARS] + "..."


def _translated(grammar: OutputGrammar) -> str:
    try:
        text: str = any_to_lark(grammar.text)
    except Exception as error:  # the library raises no narrower type for every mistake in a grammar
        raise _refused(grammar.param, str(error)[:MAX_REASON_CHARS] or type(error).__name__) from None
    check_size(OutputGrammar(text, grammar.param))
    return text


def _refused(param: str, reason: str) -> RequestError:
    return RequestError(f"{param} cannot be used: {reason}", param=param, code="invalid_grammar")


def _busy() -> RequestError:
    return RequestError("too many grammars are being compiled", status=503, code="grammar_busy", retry_after_s=5)
