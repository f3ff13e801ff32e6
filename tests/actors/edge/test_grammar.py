"""Grammars that reach a rank have been compiled once: what cannot be kept to is refused, what takes long as well."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from msgspec import Raw

from tests.actors.edge.grammars import VOCAB_SIZE, load_vocabulary
from vlmrt.actors.edge.grammar import MAX_WAITING, GrammarChecker, load_grammar_tokenizer
from vlmrt.actors.edge.response_format import OutputGrammar, output_grammar
from vlmrt.runtime.errors import RequestError

DIGITS = OutputGrammar("start: /[0-9]+/", "guided_grammar")


class CountingExecutor(ThreadPoolExecutor):
    """Counts what it is given to do; the work waits while `held`."""

    def __init__(self) -> None:
        super().__init__(1)
        self.num_jobs = 0
        self.held = threading.Event()
        self.held.set()

    def submit(self, work, /, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.num_jobs += 1

        def wait_and_work():  # type: ignore[no-untyped-def]
            self.held.wait(30)
            return work(*args, **kwargs)

        return super().submit(wait_and_work)


@pytest.fixture
def executor() -> Iterator[CountingExecutor]:
    with CountingExecutor() as executor:
        yield executor
        executor.held.set()


@pytest.fixture
def checker(checkpoint: Path, executor: CountingExecutor) -> GrammarChecker:
    return GrammarChecker(load_vocabulary(checkpoint).compiled, executor)


def grammar(text: str) -> OutputGrammar:
    asked = output_grammar(guided_grammar=text)
    assert asked is not None
    return asked


async def test_a_sound_grammar_is_passed_on_as_it_is(checker: GrammarChecker) -> None:
    assert await checker.accept(DIGITS) == DIGITS.text


async def test_a_verdict_is_remembered(checker: GrammarChecker, executor: CountingExecutor) -> None:
    await checker.accept(DIGITS)
    jobs = executor.num_jobs
    await checker.accept(DIGITS)
    with pytest.raises(RequestError):
        await checker.accept(grammar("start: nowhere"))
    assert executor.num_jobs == jobs + 1
    with pytest.raises(RequestError, match="nowhere"):
        await checker.accept(grammar("start: nowhere"))
    assert executor.num_jobs == jobs + 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("start: nowhere", 'unknown name: "nowhere"'),
        ("start: (", "cannot be used"),
        ("start: a\na: b\nb: a", "no text matches it"),
        ("start: /(?=a)b/", "invalid regex"),
        ('start: <[99999]> "x"', "cannot be used"),
        ("root ::= (((", "cannot be used"),
        ('start: %json {"not": {}}', 'Unimplemented keys: ["not"]'),
        ("start: X0\n" + "\n".join(f"X{i}: X{i + 1} X{i + 1}" for i in range(40)) + '\nX40: "x"', "too big"),
    ],
)
async def test_a_grammar_that_cannot_be_kept_to_is_refused(checker: GrammarChecker, text: str, reason: str) -> None:
    with pytest.raises(RequestError) as caught:
        await checker.accept(grammar(text))
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "invalid_grammar", "guided_grammar")
    assert reason in error.message
    assert len(error.message) < 400
    assert "\n" not in error.message


@pytest.mark.parametrize("schema", [b'{"not": {}}', b'{"$ref": "#"}', b'{"enum": []}', b'{"$ref": "http://a/b"}'])
async def test_a_schema_that_is_not_supported_names_its_field(checker: GrammarChecker, schema: bytes) -> None:
    asked = output_grammar(guided_json=Raw(schema))
    assert asked is not None
    with pytest.raises(RequestError) as caught:
        await checker.accept(asked)
    assert (caught.value.status, caught.value.param) == (400, "guided_json")


async def test_gbnf_is_translated(checker: GrammarChecker, checkpoint: Path) -> None:
    text = await checker.accept(grammar('root ::= "a" digits\ndigits ::= [0-9]+'))
    assert load_vocabulary(checkpoint).accepts(text, "a42")


async def test_what_takes_too_long_is_refused_and_not_tried_again(checkpoint: Path, executor: CountingExecutor) -> None:
    checker = GrammarChecker(load_vocabulary(checkpoint).compiled, executor, deadline_s=0.2)
    slow = OutputGrammar('start: %json {"type": "integer", "multipleOf": 79999}', "guided_grammar")
    for _ in range(2):
        with pytest.raises(RequestError, match=r"takes longer than 0\.2 s to compile") as caught:
            await checker.accept(slow)
        assert caught.value.status == 400
    assert executor.num_jobs == 1


async def test_who_waits_too_long_behind_others_may_try_again(checkpoint: Path, executor: CountingExecutor) -> None:
    checker = GrammarChecker(load_vocabulary(checkpoint).compiled, executor, deadline_s=0.2)
    await checker.accept(DIGITS)
    executor.held.clear()
    with pytest.raises(RequestError) as caught:
        await checker.accept(OutputGrammar('start: "a"', "guided_grammar"))
    assert (caught.value.status, caught.value.retry_after_s) == (503, 5)
    executor.held.set()
    assert await checker.accept(OutputGrammar('start: "a"', "guided_grammar"))


async def test_only_so_many_wait_at_a_time(checker: GrammarChecker, executor: CountingExecutor) -> None:
    await checker.accept(DIGITS)
    executor.held.clear()
    waiting = [asyncio.create_task(checker.accept(grammar(f'start: "{index}"'))) for index in range(MAX_WAITING)]
    await asyncio.sleep(0)
    with pytest.raises(RequestError) as caught:
        await checker.accept(grammar('start: "one more"'))
    assert (caught.value.status, caught.value.code) == (503, "grammar_busy")
    executor.held.set()
    await asyncio.gather(*waiting)


async def test_a_tokenizer_that_is_wider_than_the_logits_serves_no_grammar(
    checkpoint: Path, executor: CountingExecutor
) -> None:
    assert load_grammar_tokenizer(checkpoint / "tokenizer.json", VOCAB_SIZE, []) is not None
    assert load_grammar_tokenizer(checkpoint / "nowhere.json", VOCAB_SIZE, []) is None
    tokenizer = load_grammar_tokenizer(checkpoint / "tokenizer.json", 100, [])
    with pytest.raises(RequestError) as caught:
        await GrammarChecker(tokenizer, executor).accept(DIGITS)
    assert (caught.value.status, caught.value.code) == (501, "grammar_unavailable")
