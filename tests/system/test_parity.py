"""Through the running server, greedy tokens are transformers': both families, tp 1 and 2, caches on and off."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.pictures import Picture, picture
from tests.reference import Reference
from tests.system.server import Server, launch
from vlmrt.tools.checkpoint import make_checkpoint

CONCURRENCY = 16
NUM_TALKERS = 24  # of `make test`; the soak has 40
TALK_TOKENS = 160  # ten blocks each, which nobody has set aside for them: where there are few, talkers are preempted
WORDS = "what is this picture and how many red shapes do you see left of the blue one".split()


class Question(NamedTuple):
    messages: list[dict[str, Any]]
    pictures: list[Picture]


def make_question(index: int) -> Question:
    """The index-th dialogue: one to three turns, up to three pictures in any of them, text before and after."""
    rng = random.Random(index)
    messages: list[dict[str, Any]] = []
    pictures: list[Picture] = []
    if index % 3 == 0:
        messages.append({"role": "system", "content": "Answer briefly."})
    for turn in range(1 + index % 3):
        wanted = rng.choice((0, 1, 1, 2)) if turn else 1 + index % 2
        parts: list[Picture | str] = [picture(rng.randrange(72)) for _ in range(min(wanted, 3 - len(pictures)))]
        parts.append(" ".join(rng.choices(WORDS, k=rng.randint(1, 12))))
        rng.shuffle(parts)
        pictures += [part for part in parts if isinstance(part, Picture)]
        content = [{"type": "text", "text": part} if isinstance(part, str) else part.part for part in parts]
        messages.append({"role": "user", "content": content})
        if turn < index % 3:
            messages.append({"role": "assistant", "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))})
    return Question(messages, pictures)


def ask(server: Server, question: Question, num_tokens: int) -> tuple[list[int], list[int]]:
    """Prompt token ids and output token ids, as the server reports them."""
    answer = server.client.chat.completions.create(
        model="model",
        messages=question.messages,  # type: ignore[arg-type]
        max_tokens=num_tokens,
        temperature=0,
        extra_body={
            "ignore_eos": True,
            "return_token_ids": True,
            "repetition_penalty": 1.0,
        },
    ).model_dump()
    return answer["prompt_token_ids"], answer["choices"][0]["token_ids"]


def check_parity(
    checkpoint: Path, run_root: Path, arguments: list[str], indices: range, num_tokens: int, num_talkers: int
) -> dict[str, int]:
    """Every question asked twice (the second time the caches are warm), and after them, all at once, short questions
    with long answers; returns what was counted.
    """
    talks = [Question([{"role": "user", "content": f"tell me {number}"}], []) for number in range(num_talkers)]
    questions = [make_question(index) for index in indices]
    with launch("--model", str(checkpoint), *arguments, run_root=run_root) as server:
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            answers = list(pool.map(lambda question: ask(server, question, num_tokens), questions * 2))
        talk_answers = server.at_once([partial(ask, server, talk, TALK_TOKENS) for talk in talks])
        metrics = server.counted(("vlmrt_preemptions_total", "vlmrt_prefix_cache_hits_total"))
    reference = Reference(checkpoint)
    for talk, (_, output_ids) in zip(talks, talk_answers, strict=True):
        reference.judge(reference.inputs(talk.messages, talk.pictures), output_ids)
    counted = {"tokens": 0, "ties": 0}
    for question, *both in zip(questions, answers[: len(questions)], answers[len(questions) :], strict=True):
        inputs = reference.inputs(question.messages, question.pictures)
        for prompt_ids, output_ids in both:
            assert prompt_ids == inputs["input_ids"][0].tolist()
            assert len(output_ids) == num_tokens
        verdicts = [reference.judge(inputs, both[0][1])]
        verdicts.append(verdicts[0] if both[1] == both[0] else reference.judge(inputs, both[1][1]))
        for verdict in verdicts:
            counted["tokens"] += verdict.num_argmax + verdict.num_ties
            counted["ties"] += verdict.num_ties
    counted["preemptions"] = int(metrics["vlmrt_preemptions_total"])
    counted["cached_tokens"] = int(metrics["vlmrt_prefix_cache_hits_total"])
    return counted


TINY_KV = ["--num-kv-blocks", "220", "--max-model-len", "3000"]
NO_CACHES = ["--no-prefix-caching", "--no-embedding-caching"]
CASES = {
    "qwen2-vl tp 1 preempting": ("test-qwen2-vl", [*TINY_KV]),
    "qwen2-vl tp 2 without caches": ("test-qwen2-vl", ["--tp", "2", *NO_CACHES]),
    "qwen2.5-vl tp 2 preempting": ("test-qwen2.5-vl", ["--tp", "2", *TINY_KV]),
    "qwen2.5-vl tp 1 without caches": ("test-qwen2.5-vl", [*NO_CACHES, *TINY_KV]),
}


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_the_reference(case: str, tmp_path: Path, run_root: Path) -> None:
    preset, arguments = CASES[case]
    checkpoint = make_checkpoint(tmp_path / "model", preset, dtype="float32")
    counted = check_parity(checkpoint, run_root, arguments, range(10), num_tokens=24, num_talkers=NUM_TALKERS)
    print(case, counted)
    assert counted["tokens"] == 2 * 10 * 24
    if "preempting" in case:
        assert counted["preemptions"] > 0
    assert (counted["cached_tokens"] == 0) == ("without caches" in case)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("preset", ["test-qwen2-vl", "test-qwen2.5-vl"])
@pytest.mark.parametrize("tp", ["1", "2"])
@pytest.mark.parametrize("caches", ["on", "off"])
def test_sixty_requests_of_sixty_four_tokens_equal_the_reference(
    preset: str, tp: str, caches: str, tmp_path: Path, run_root: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", preset, dtype="float32")
    arguments = ["--tp", tp, *TINY_KV, *(NO_CACHES if caches == "off" else [])]
    counted = check_parity(checkpoint, run_root, arguments, range(60), num_tokens=64, num_talkers=40)
    print(f"{preset} tp {tp} caches {caches}: {counted}")
    assert counted["tokens"] == 2 * 60 * 64
    assert counted["preemptions"] > 0
