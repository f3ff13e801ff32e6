"""Through the whole service, a stream says what the whole answer says: text, logprobs, finish_reason, usage."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.pictures import picture
from tests.system.server import Server, launch
from vlmrt.tools.checkpoint import make_checkpoint

NUM_PROMPTS = 40  # of `make test`; the soak has 200
WORDS = "what is this picture and how many red shapes do you see left of the blue one 漢字 🙂".split()


def body_of(number: int) -> dict[str, Any]:
    """Prompts with and without pictures; of a model without training, so that answers are full of broken characters."""
    rng = random.Random(number)
    parts: list[dict[str, Any]] = [picture(index).part for index in rng.sample((0, 1, 5, 7), number % 3)]
    parts.append({"type": "text", "text": " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))})
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0,
        "max_tokens": rng.randint(1, 30),
        "extra_body": {"return_token_ids": True, "ignore_eos": number % 5 == 0, "repetition_penalty": 1.3},
    }
    if number % 2:
        body |= {"logprobs": True, "top_logprobs": number % 4}
    if number % 3 == 0:
        body["stop"] = ["e", "a", "\ufffd\ufffd"]
    return body


def streamed(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    """What the chunks of a stream say together."""
    create: Any = server.client.chat.completions.create
    said: dict[str, Any] = {"text": "", "logprobs": [], "token_ids": [], "finish_reason": None}
    for chunk in create(model="model", stream=True, stream_options={"include_usage": True}, **body):
        said["usage"] = chunk.usage
        for choice in chunk.choices:
            said["text"] += choice.delta.content or ""
            said["logprobs"] += choice.logprobs.content if choice.logprobs else []
            said["token_ids"] += choice.model_dump().get("token_ids", [])
            said["finish_reason"] = choice.finish_reason
    return said


def check_streams(server: Server, numbers: range) -> None:
    create: Any = server.client.chat.completions.create
    reasons = set()
    for number in numbers:
        body = body_of(number)
        whole, said = create(model="model", **body), streamed(server, body)
        choice = whole.choices[0]
        assert said["text"] == choice.message.content
        assert said["finish_reason"] == choice.finish_reason
        assert said["token_ids"] == choice.model_dump()["token_ids"]
        assert said["logprobs"] == (choice.logprobs.content if choice.logprobs else [])
        assert said["usage"] == whole.usage
        assert whole.usage.completion_tokens == len(said["token_ids"])
        reasons.add(choice.finish_reason)
    assert reasons == {"stop", "length"}


def check_with_tiny_model(directory: Path, run_root: Path, numbers: range) -> None:
    checkpoint = make_checkpoint(directory / "model", "test-qwen2-vl", dtype="float32")
    with launch(
        "--model", str(checkpoint), "--no-prefix-caching", run_root=run_root
    ) as server:  # usage counts what is cached
        check_streams(server, numbers)


def test_streams_join_to_whole_answers(tmp_path: Path, run_root: Path) -> None:
    check_with_tiny_model(tmp_path, run_root, range(NUM_PROMPTS))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_two_hundred_streams_join_to_whole_answers(tmp_path: Path, run_root: Path) -> None:
    check_with_tiny_model(tmp_path, run_root, range(200))
