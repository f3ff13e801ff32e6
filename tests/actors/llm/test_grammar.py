"""What follows a grammar: valid where it ends, the same however the work is cut up, and nobody else's concern."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from typing import Any, cast

import pytest
from llguidance import LLMatcher, LLTokenizer

from tests.actors.llm.conftest import Checkpoint
from tests.actors.llm.driver import NUM_SLOTS, Driver, Request, make_runner
from tests.actors.llm.test_out_of_memory import Cramped
from vlmrt.actors.llm.grammar import GrammarCompiler, load_tokenizer
from vlmrt.actors.models.layers import TensorParallel
from vlmrt.actors.models.qwen2_vl.language import LanguageModel
from vlmrt.runtime.messages import FailedRow, LogitBias, Sampling

LETTERS = LLMatcher.grammar_from_regex("[a-z]{200}")
DATE = LLMatcher.grammar_from_regex("[12][0-9]{3}-[01][0-9]")
WRONG = "start: missing"


@pytest.fixture(scope="module")
def tokenizer(one_checkpoint: Checkpoint) -> LLTokenizer:
    config = one_checkpoint.config
    return load_tokenizer(one_checkpoint.directory, config.text.vocab_size, config.eos_token_ids)


def make_driver(checkpoint: Checkpoint, compiler: GrammarCompiler | None, model: Cramped | None = None) -> Driver:
    used = checkpoint.model if model is None else cast(LanguageModel, model)
    return Driver(make_runner(used, checkpoint.config, TensorParallel(), compiler=compiler))


def begin(driver: Driver, requests: Sequence[Request], chunk: int = 1000) -> None:
    for request in requests:
        driver.admit(request)
        driver.prefill(request, chunk)


def text_of(tokenizer: LLTokenizer, token_ids: Sequence[int]) -> tuple[str, bool]:
    """The text up to the first end token, and whether there is one."""
    ends = [index for index, token_id in enumerate(token_ids) if token_id in tokenizer.eos_tokens]
    kept = token_ids[: ends[0]] if ends else token_ids
    return tokenizer.decode_bytes(list(kept)).decode(errors="replace"), bool(ends)


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """Of values of bounded length."""
    kinds = ["integer", "boolean", "string", "enum", "null", *["array", "object"] * (depth > 0)]
    match rng.choice(kinds):
        case "integer":
            low = rng.randrange(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(0, 300)}
        case "string":
            return {"type": "string", "maxLength": rng.randrange(1, 6)}
        case "enum":
            return {"enum": rng.sample(["red", "green", 3, None, "ä", 2.5], rng.randrange(1, 4))}
        case "array":
            least = rng.randrange(2)
            items = random_schema(rng, depth - 1)
            return {"type": "array", "items": items, "minItems": least, "maxItems": least + 2}
        case "object":
            properties = {name: random_schema(rng, depth - 1) for name in rng.sample("abcd", rng.randrange(1, 4))}
            required = [name for name in properties if rng.random() < 0.7]
            return {
                "type": "object", "properties": properties, "required": required, "additionalProperties": False,
            }  # fmt: skip
        case kind:
            return {"type": kind}


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    if "enum" in schema:
        return value in schema["enum"] and not isinstance(value, bool)
    match schema["type"]:
        case "integer":
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            return is_integer and schema["minimum"] <= value <= schema["maximum"]
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "string":
            return isinstance(value, str) and len(value) <= schema["maxLength"]
        case "array":
            within = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
            return within and all(is_valid(each, schema["items"]) for each in value)
        case _:
            within = isinstance(value, dict) and set(schema["required"]) <= set(value) <= set(schema["properties"])
            return within and all(is_valid(each, schema["properties"][name]) for name, each in value.items())


def test_answers_that_end_are_valid_json_of_their_schemas(
    one_checkpoint: Checkpoint, compiler: GrammarCompiler, tokenizer: LLTokenizer
) -> None:
    """Steps planned behind the end allow nothing but the end, and fail nobody."""
    rng = random.Random(0)
    num_ended = 0
    for batch in range(10):
        driver = make_driver(one_checkpoint, compiler)
        schemas = [random_schema(rng) for _ in range(5)]
        requests = []
        for index, schema in enumerate(schemas):
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
            sampling = Sampling(temperature=rng.choice((0.0, 1.0)), top_p=0.95, seed=index, grammar=grammar)
            requests.append(one_checkpoint.prompt(100 * batch + index, 5, sampling=sampling)[0])
        begin(driver, requests)
        driver.decode(requests, 50)
        for request, schema in zip(requests, schemas, strict=True):
            text, has_ended = text_of(tokenizer, request.output_ids)
            num_ended += has_ended
            if has_ended:
                assert is_valid(json.loads(text), schema), (text, schema)
                behind = request.output_ids[request.output_ids.index(tokenizer.eos_token) :]
                assert set(behind) <= set(tokenizer.eos_tokens)
    assert num_ended >= 40


def mixed_requests(checkpoint: Checkpoint) -> list[Request]:
    asked = (
        Sampling(temperature=1.0, seed=1, grammar=LETTERS),
        Sampling(temperature=1.0, seed=2),
        Sampling(temperature=0.0, grammar=LETTERS, num_logprobs=1),
        Sampling(temperature=0.0),
        Sampling(
            temperature=0.9, seed=3, frequency_penalty=0.5, grammar=LETTERS,
            logit_bias=(LogitBias(68, -100.0), LogitBias(70, 3.0, before=5)),
        ),
    )  # fmt: skip
    return [checkpoint.prompt(40 + i, 9, sampling=sampling)[0] for i, sampling in enumerate(asked)]


def outputs_of(checkpoint: Checkpoint, compiler: GrammarCompiler, requests: Sequence[Request]) -> list[list[int]]:
    driver = make_driver(checkpoint, compiler)
    begin(driver, requests)
    driver.decode(requests, 9)
    return [request.output_ids for request in requests]


def test_rows_beside_a_grammar_give_the_tokens_they_give_without(
    one_checkpoint: Checkpoint, compiler: GrammarCompiler, tokenizer: LLTokenizer
) -> None:
    together = outputs_of(one_checkpoint, compiler, mixed_requests(one_checkpoint))
    alone = [outputs_of(one_checkpoint, compiler, [each])[0] for each in mixed_requests(one_checkpoint)]
    assert together == alone
    for row in (0, 2, 4):
        assert re.fullmatch("[a-z]+", text_of(tokenizer, together[row])[0])
    assert not re.fullmatch("[a-z]+", text_of(tokenizer, together[1])[0])


@pytest.mark.parametrize("chunk", [2, 4])
def test_chunks_and_waiting_for_each_step_change_no_token(
    one_checkpoint: Checkpoint, compiler: GrammarCompiler, chunk: int
) -> None:
    expected = outputs_of(one_checkpoint, compiler, mixed_requests(one_checkpoint))
    driver = make_driver(one_checkpoint, compiler)
    requests = mixed_requests(one_checkpoint)
    begin(driver, requests, chunk)
    driver.decode(requests, 9, one_ahead=False)
    assert [request.output_ids for request in requests] == expected


@pytest.mark.parametrize("after", [1, 4])
def test_a_preempted_sequence_goes_on_within_its_grammar(
    one_checkpoint: Checkpoint, compiler: GrammarCompiler, after: int
) -> None:
    """Its seed, its biases and their end, its grammar and its log-probabilities are where they were."""
    expected = mixed_requests(one_checkpoint)
    outputs_of(one_checkpoint, compiler, expected)
    driver = make_driver(one_checkpoint, compiler)
    requests = mixed_requests(one_checkpoint)
    begin(driver, requests)
    driver.decode(requests, after - 1)
    for request in requests:
        driver.release(request)
    driver.run([])
    for request in reversed(requests):  # each in another's slot
        driver.admit(request)
        driver.prefill(request, 6)
    driver.decode(requests, 9 - after)
    assert [request.output_ids for request in requests] == [request.output_ids for request in expected]
    found, whole = requests[2].logprobs, expected[2].logprobs
    assert [each.logprob for each in found] == pytest.approx([each.logprob for each in whole], abs=1e-4)


def test_a_step_in_pieces_takes_in_no_token_twice(one_checkpoint: Checkpoint, compiler: GrammarCompiler) -> None:
    expected = outputs_of(one_checkpoint, compiler, mixed_requests(one_checkpoint))
    model = Cramped(one_checkpoint.model)
    driver = make_driver(one_checkpoint, compiler, model)
    requests = mixed_requests(one_checkpoint)
    begin(driver, requests)
    model.max_logits = 1
    driver.decode(requests, 9)
    assert model.num_refused == 2 * 9  # at once, and again with all memory given back
    assert [request.output_ids for request in requests] == expected


def test_a_grammar_that_cannot_be_followed_fails_its_row_alone(
    one_checkpoint: Checkpoint, compiler: GrammarCompiler, tokenizer: LLTokenizer
) -> None:
    """In its step and the one planned behind it; its slot serves the next request."""
    driver = make_driver(one_checkpoint, compiler)
    plain, _ = one_checkpoint.prompt(70, 7)
    wrong, _ = one_checkpoint.prompt(71, 7, sampling=Sampling(grammar=WRONG))
    dated, _ = one_checkpoint.prompt(72, 7, sampling=Sampling(temperature=0.0, grammar=DATE))
    begin(driver, [plain])
    for request in (wrong, dated):
        driver.admit(request)
    rows = [(plain, 1), (wrong, 7), (dated, 7)]
    plan = driver.plan(rows)
    launched = driver.runner.launch(plan)
    next_rows = [(plain, 1), (wrong, 1), (dated, 1)]
    next_plan = driver.plan(next_rows)
    next_launched = driver.runner.launch(next_plan)
    for planned, step, pending in ((rows, plan, launched), (next_rows, next_plan, next_launched)):
        result = driver.runner.complete(pending)
        assert result.failed == (FailedRow(1, "grammar"),)
        driver.take(planned, step, result)
    driver.release(wrong)
    driver.free_slots.sort()
    again, _ = one_checkpoint.prompt(73, 7, sampling=Sampling(temperature=0.0, grammar=DATE))
    begin(driver, [again])
    assert again.slot == 1
    driver.decode([plain, dated, again], 9)
    for request in (dated, again):
        text, has_ended = text_of(tokenizer, request.output_ids)
        assert has_ended
        assert re.fullmatch("[12][0-9]{3}-[01][0-9]", text)
    alone, _ = one_checkpoint.prompt(70, 7)
    begin(driver, [alone])
    driver.decode([alone], 11)
    assert plain.output_ids == alone.output_ids


def test_a_rank_without_a_tokenizer_fails_requests_with_a_grammar_only(
    one_checkpoint: Checkpoint, tmp_path: Any
) -> None:
    compiler = GrammarCompiler(lambda: load_tokenizer(tmp_path, 1, ()))
    for each in (compiler, None):
        driver = make_driver(one_checkpoint, each)
        plain, _ = one_checkpoint.prompt(80, 7)
        dated, _ = one_checkpoint.prompt(81, 7, sampling=Sampling(grammar=DATE))
        for request in (plain, dated):
            driver.admit(request)
        assert driver.run([(plain, 7), (dated, 7)]).failed == (FailedRow(1, "grammar"),)
        assert len(plain.output_ids) == 1
    compiler.close()


def test_a_cleared_rank_follows_no_grammar_of_before(one_checkpoint: Checkpoint, compiler: GrammarCompiler) -> None:
    driver = make_driver(one_checkpoint, compiler)
    requests = [one_checkpoint.prompt(90 + i, 7, sampling=Sampling(grammar=DATE))[0] for i in range(NUM_SLOTS)]
    begin(driver, requests)
    driver.runner.clear()
    expected = outputs_of(one_checkpoint, compiler, mixed_requests(one_checkpoint))
    driver = Driver(driver.runner)
    requests = mixed_requests(one_checkpoint)
    begin(driver, requests)
    driver.decode(requests, 9)
    assert [request.output_ids for request in requests] == expected
