"""A stream says what the whole answer says, and a seed what it says alone: in any batch, also after preemption."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.system.server import Server, launch
from vlmrt.tools.demo.evaluate import messages, questions, scenery

ROUTE = "/v1/chat/completions"
DONE = b"data: [DONE]\n\n"
NUM_TALKERS = 8
TALK_TOKENS = 160  # ten blocks each, which nobody has set aside for them: where there are few, talkers are preempted
TINY = ("--num-kv-blocks", "70", "--max-model-len", "1100", "--max-num-seqs", "16")
KINDS = ("color", "count", "describe", "read", "compare", "chat")
CLOSE = 1e-3  # of a logprob: a prompt found in the cache is computed in other pieces


class Answer(NamedTuple):
    text: str
    finish_reason: str
    tokens: list[str]
    logprobs: list[float]
    counts: tuple[int, int, int]  # of tokens: prompt, answer, all


def prompts(count: int) -> list[dict[str, Any]]:
    """Bodies of every sort: with and without pictures, ends of every reason, characters of one to four bytes."""
    dialogues = questions(count, KINDS, scenery(None), seed=5)
    bodies = []
    for number, dialogue in enumerate(dialogues):
        rng = random.Random(number)
        fields: dict[str, Any] = {"messages": messages(rng, dialogue), "max_tokens": 64}
        match number % 5:
            case 1:
                fields["max_tokens"] = rng.randint(1, 5)
            case 2:
                fields["stop"] = rng.sample([" ", ".", "e", "re", "is", "here is"], 2)
            case 3:
                said = "".join(rng.choices("é漢字🙂 абв", k=12))
                fields |= {"messages": [{"role": "user", "content": said}], "ignore_eos": True, "max_tokens": 40}
            case 4:
                allowed = {str(token_id): 100 for token_id in rng.sample(range(1000), 12)}
                fields |= {"logit_bias": allowed, "frequency_penalty": 2.0, "max_tokens": 30}
        bodies.append({"model": "model", "temperature": 0, "logprobs": True, "top_logprobs": 2, **fields})
    return bodies


def whole(server: Server, body: dict[str, Any]) -> Answer:
    found = server.http.post(ROUTE, json=body)
    assert found.status_code == 200, found.text
    answer = found.json()
    choice = answer["choices"][0]
    entries = (choice["logprobs"] or {"content": []})["content"]
    return _answer(choice["message"]["content"], choice["finish_reason"], entries, answer["usage"])


def streamed(server: Server, body: dict[str, Any]) -> Answer:
    """The chunks put together as the bytes on the wire say, whose last are those that clients wait for."""
    fields = {**body, "stream": True, "stream_options": {"include_usage": True}}
    found = server.http.post(ROUTE, json=fields)
    assert found.status_code == 200, found.text
    assert found.content.endswith(b"\n\n" + DONE)
    events = found.content.removesuffix(DONE).decode().split("\n\n")[:-1]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    text, reason, entries = "", "", []
    for chunk in chunks:
        for choice in chunk["choices"]:
            text += choice["delta"].get("content") or ""
            reason += choice["finish_reason"] or ""
            entries += (choice["logprobs"] or {"content": []})["content"]
    return _answer(text, reason, entries, chunks[-1]["usage"])


def _answer(text: str, reason: str, entries: list[dict[str, Any]], usage: dict[str, Any]) -> Answer:
    tokens, values = [entry["token"] for entry in entries], [entry["logprob"] for entry in entries]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode("utf-8", "replace") == text or not entries
    return Answer(
        text, reason, tokens, values, (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"])
    )


def check_same(one: Answer, other: Answer) -> None:
    assert other._replace(logprobs=one.logprobs) == one
    assert other.logprobs == pytest.approx(one.logprobs, abs=CLOSE)


def check_streams(server: Server, count: int) -> None:
    for body in prompts(count):
        check_same(whole(server, body), streamed(server, body))


def test_twenty_streams_say_what_the_whole_answers_say(demo_server: Server) -> None:
    check_streams(demo_server, 20)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_two_hundred_streams_say_what_the_whole_answers_say(demo_server: Server) -> None:
    check_streams(demo_server, 200)


# ---------------------------------------------------------------- seeds


def seeded(seed: int) -> dict[str, Any]:
    """A long answer by chance, some about a picture."""
    dialogue = questions(seed + 1, KINDS, scenery(None), seed=6)[seed]
    said = messages(random.Random(seed), dialogue) if seed % 2 else [{"role": "user", "content": f"Tell me {seed}"}]
    return {
        "model": "model",
        "messages": said,
        "seed": seed,
        "temperature": 1.3,
        "top_p": 0.95,
        "max_tokens": TALK_TOKENS,
        "ignore_eos": True,
    }


@pytest.fixture(scope="module")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Room for the keys and values of a few requests."""
    root: Path = tmp_path_factory.mktemp("r")
    with launch(*TINY, "--dtype", "float32", "--device", "cpu", run_root=root) as server:
        yield server


def num_preempted(server: Server) -> float:
    return server.counted(["vlmrt_preemptions_total"])["vlmrt_preemptions_total"]


def check_seeds(server: Server, num_seeds: int) -> float:
    """Every seed alone, then all at once among greedy ones of another length.  Returns how many were preempted."""
    bodies = [seeded(seed) for seed in range(num_seeds)]
    alone = [whole(server, body) for body in bodies]
    assert len({answer.text for answer in alone}) > num_seeds // 2
    greedy = [{**seeded(number), "temperature": 0, "max_tokens": 90 + 9 * number} for number in range(NUM_TALKERS)]
    before = num_preempted(server)
    all_at_once = server.at_once([partial(whole, server, body) for body in greedy + bodies])
    assert all(other.finish_reason == "length" for other in all_at_once)
    streams = server.at_once([partial(streamed, server, body) for body in bodies])
    for one, *again in zip(alone, all_at_once[len(greedy) :], streams, strict=True):
        for other in again:
            check_same(one, other)
    return num_preempted(server) - before


@pytest.mark.timeout(600)
def test_a_seed_says_the_same_alone_and_in_a_batch_that_is_preempted(tiny_server: Server) -> None:
    assert check_seeds(tiny_server, 4) > 0


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_twenty_four_seeds_say_the_same_alone_and_preempted(tiny_server: Server) -> None:
    count = check_seeds(tiny_server, 24)
    print(f"{count:g} preemptions")
    assert count > 0


@pytest.mark.timeout(600)
def test_greedy_answers_are_the_same_alone_and_preempted(tiny_server: Server) -> None:
    bodies = [{**seeded(number), "temperature": 0} for number in range(NUM_TALKERS)]
    alone = [whole(tiny_server, body) for body in bodies]
    before = num_preempted(tiny_server)
    streams = tiny_server.at_once([partial(streamed, tiny_server, body) for body in bodies])
    for one, other in zip(alone, streams, strict=True):
        check_same(one, other)
    assert num_preempted(tiny_server) > before
