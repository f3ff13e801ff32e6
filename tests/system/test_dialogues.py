"""Dialogues through the running server: caches of every tier change nothing but the work that is done."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.pictures import Picture, picture
from tests.reference import Reference
from tests.system.server import Server, launch
from vlmrt.tools.checkpoint import make_checkpoint

NUM_TOKENS = 12
NUM_PICTURES = 24  # that all dialogues choose from
MAX_PIXELS = 340_000  # of a picture of the model: then a slab may be as small as one
ROWS_GIB = 1 / 2**30 * 64 * 4  # of one row of the model's width in float32
TINY = [
    *("--num-kv-blocks", "150", "--max-model-len", "2200", "--kv-host-cache-gib", "0.0015"),
    *("--embedding-cache-gib", f"{900 * ROWS_GIB:.9f}", "--embedding-host-cache-gib", f"{2500 * ROWS_GIB:.9f}"),
]
NO_CACHES = ["--no-prefix-caching", "--no-embedding-caching", "--num-kv-blocks", "300", "--max-model-len", "2200"]
WORDS = "what is this picture and how many red shapes do you see left of the blue one".split()


class Turn(NamedTuple):
    """What the user says: words, and pictures in front of them."""

    text: str
    pictures: tuple[int, ...]


class Answer(NamedTuple):
    prompt_ids: list[int]
    output_ids: list[int]
    text: str
    num_cached_tokens: int


def make_dialogue(seed: int) -> list[Turn]:
    """Two to four turns with a picture in the first, and now and then one in a later turn."""
    rng = random.Random(seed)
    turns = []
    for number in range(rng.randint(2, 4)):
        wanted = 1 if number == 0 else rng.choice((0, 0, 1))
        chosen = tuple(rng.randrange(NUM_PICTURES) for _ in range(wanted))
        turns.append(Turn(" ".join(rng.choices(WORDS, k=rng.randint(2, 30))), chosen))
    return turns


def message(turn: Turn) -> dict[str, Any]:
    parts = [picture(index).part for index in turn.pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": turn.text}]}


def ask(server: Server, messages: list[dict[str, Any]]) -> Answer:
    found = server.client.chat.completions.create(
        model="model",
        messages=messages,  # type: ignore[arg-type]
        max_tokens=NUM_TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True, "repetition_penalty": 1.0},
    ).model_dump()
    choice, cached = found["choices"][0], found["usage"]["prompt_tokens_details"]["cached_tokens"]
    return Answer(found["prompt_token_ids"], choice["token_ids"], choice["message"]["content"], cached)


def hold(server: Server, turns: list[Turn]) -> list[Answer]:
    """A dialogue whose history has the model's own answers."""
    messages: list[dict[str, Any]] = []
    answers = []
    for turn in turns:
        messages.append(message(turn))
        answers.append(ask(server, messages))
        messages.append({"role": "assistant", "content": answers[-1].text})
    return answers


def hold_all(checkpoint: Path, run_root: Path, arguments: list[str], dialogues: list[list[Turn]]) -> Iterator[Any]:
    """The answers of every dialogue, then the server's metrics."""
    with launch("--model", str(checkpoint), *arguments, run_root=run_root) as server:
        with ThreadPoolExecutor(8) as pool:
            yield list(pool.map(lambda turns: hold(server, turns), dialogues))
        yield server.metrics()


def small_pictures(checkpoint: Path) -> Path:
    """The checkpoint with a lower limit on a picture's pixels."""
    place = checkpoint / "preprocessor_config.json"
    options = json.loads(place.read_text())
    options["max_pixels"] = MAX_PIXELS
    if "size" in options:
        options["size"]["longest_edge"] = MAX_PIXELS
    place.write_text(json.dumps(options))
    return checkpoint


def check_same_answers(checkpoint: Path, run_root: Path, num_dialogues: int) -> dict[str, float]:
    """Caches on, all of them tiny, and off.  Returns the metrics with caches on.

    A batch of another composition may decide a near-tie otherwise: then both answers are held against the reference,
    and what follows in that dialogue has another history.
    """
    dialogues = [make_dialogue(seed) for seed in range(num_dialogues)]
    answers, metrics = hold_all(checkpoint, run_root, TINY, dialogues)
    plain_answers, plain_metrics = hold_all(checkpoint, run_root, NO_CACHES, dialogues)
    assert plain_metrics.get("vlmrt_prefix_cache_hits_total", 0) == 0
    num_ties = 0
    for turns, with_caches, without in zip(dialogues, answers, plain_answers, strict=True):
        for number, (one, other) in enumerate(zip(with_caches, without, strict=True)):
            assert one.prompt_ids == other.prompt_ids
            if one.output_ids == other.output_ids:
                continue
            num_ties += 1
            reference = Reference(checkpoint)
            messages: list[dict[str, Any]] = []
            for turn, answer in zip(turns[: number + 1], with_caches, strict=False):
                messages += [message(turn), {"role": "assistant", "content": answer.text}]
            pictures: list[Picture] = [picture(index) for turn in turns[: number + 1] for index in turn.pictures]
            inputs = reference.inputs(messages[:-1], pictures)
            for found in (one, other):
                reference.judge(inputs, found.output_ids)
            break
    print(f"{sum(map(len, dialogues))} turns, {num_ties} near-ties; {interesting(metrics)}")
    assert num_ties <= max(1, num_dialogues // 20)
    return metrics  # type: ignore[no-any-return]


def interesting(metrics: dict[str, float]) -> dict[str, float]:
    names = ("prefix_cache", "embedding_cache", "preemptions", "images_")
    return {name: value for name, value in metrics.items() if any(part in name for part in names)}


def check_that_every_tier_was_at_work(metrics: dict[str, float]) -> None:
    for name in (
        "prefix_cache_hits_total",
        "prefix_cache_evictions_total",
        "prefix_cache_host_hits_total",
        "prefix_cache_host_evictions_total",
        "embedding_cache_evictions_total",
        "embedding_cache_host_hits_total",
        "embedding_cache_host_evictions_total",
    ):
        assert metrics.get(f"vlmrt_{name}", 0) > 0, name


def test_dialogues_over_tiny_caches_have_the_answers_of_a_server_without_caches(tmp_path: Path, run_root: Path) -> None:
    checkpoint = small_pictures(make_checkpoint(tmp_path / "model", "test-qwen2-vl", dtype="float32"))
    check_that_every_tier_was_at_work(check_same_answers(checkpoint, run_root, num_dialogues=24))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("preset", ["test-qwen2-vl", "test-qwen2.5-vl"])
def test_two_hundred_dialogues_over_tiny_caches(preset: str, tmp_path: Path, run_root: Path) -> None:
    checkpoint = small_pictures(make_checkpoint(tmp_path / "model", preset, dtype="float32"))
    check_that_every_tier_was_at_work(check_same_answers(checkpoint, run_root, num_dialogues=200))


def test_a_growing_dialogue_decodes_and_encodes_each_picture_once_and_computes_only_what_is_new(
    tmp_path: Path, run_root: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", "test-qwen2-vl", dtype="float32")
    pictures_of_turn = {1: (1,), 4: (4,)}
    turns = [Turn(f"turn {number}: what do you see", pictures_of_turn.get(number, ())) for number in range(1, 9)]
    block_size, num_before = 16, 0
    with launch("--model", str(checkpoint), run_root=run_root) as server:
        for answer in hold(server, turns):
            num_computed = len(answer.prompt_ids) - answer.num_cached_tokens
            assert num_computed <= len(answer.prompt_ids) - num_before + block_size
            num_before = len(answer.prompt_ids)

        def images() -> list[float]:
            metrics = server.metrics()
            return [metrics.get(f"vlmrt_images_{what}_total", 0) for what in ("decoded", "encoded")]

        server.wait_until(lambda: min(images()) >= 2, "metrics of the media worker and the ViT")
        assert images() == [2, 2]
