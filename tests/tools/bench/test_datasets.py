"""What is asked, by the name of a dataset."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from vlmrt.tools.bench.arrivals import Arrivals
from vlmrt.tools.bench.asks import Ask, Dialogue, Target
from vlmrt.tools.bench.clips import Clip, draw_clip
from vlmrt.tools.bench.datasets import DATASETS, Work
from vlmrt.tools.bench.media import MediaFile, MediaUrl, is_video, part
from vlmrt.tools.bench.options import DATASET_NAMES
from vlmrt.tools.bench.pictures import Picture, picture
from vlmrt.tools.bench.recorded import recorded
from vlmrt.tools.bench.recounted import Tokenizer, tokens_so_far
from vlmrt.tools.bench.settings import Settings
from vlmrt.tools.bench.texts import random_text
from vlmrt.tools.demo import CHECKPOINT

TARGET = Target("http://nowhere")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(str(CHECKPOINT))


def build(name: str, tokenizer: Tokenizer | None = None, **wanted: Any) -> Work:
    dataset = DATASETS[name]
    return dataset.build(msgspec.structs.replace(dataset.usual, **wanted), tokenizer)


def asks(work: Work) -> list[Ask]:
    return list(itertools.chain.from_iterable(work.clients))


def settings(name: str, **fields: Any) -> Settings:
    return Settings(TARGET, name, DATASETS[name].usual, **fields)


def test_the_names_of_the_options_are_those_of_the_datasets() -> None:
    assert tuple(DATASETS) == DATASET_NAMES


def test_random_text_has_exactly_the_tokens_asked_for_with_a_tokenizer(tokenizer: Tokenizer) -> None:
    for length in (1, 7, 64):
        assert tokenizer.count(random_text(length, np.random.default_rng(length), tokenizer)) == length
    assert len(random_text(9, np.random.default_rng(0)).split()) == 9  # about that many without one
    assert random_text(0, np.random.default_rng(0)) == ""


def test_lengths_are_drawn_around_what_was_asked_for_and_prompts_share_their_prefix() -> None:
    found = asks(build("random", num_prompts=60, input_tokens=20, output_tokens=10, range_ratio=0.5, prefix_tokens=6))
    words = [ask.text.split() for ask in found]
    assert len({tuple(line[:6]) for line in words}) == 1
    assert len({tuple(line[6:12]) for line in words}) == 60  # beyond it no two are alike
    lengths = {len(line) - 6 for line in words}
    assert (min(lengths) >= 10, max(lengths) <= 30, len(lengths) > 5) == (True, True, True)
    assert {ask.num_tokens for ask in found} <= set(range(5, 16))


def test_pictures_are_fresh_unless_they_are_to_be_the_same() -> None:
    fresh = [ask.media for ask in asks(build("images", num_prompts=4, num_images=2, image_sizes=((64, 48), (32, 32))))]
    assert len(set(itertools.chain(*fresh))) == 8
    assert [(shown.width, shown.height) for shown in fresh[0] if isinstance(shown, Picture)] == [(64, 48), (32, 32)]
    same = [ask.media for ask in asks(build("two-images", num_prompts=4))]
    assert len(set(same)) == 1
    assert len(set(same[0])) == 2


def test_the_notebooks_benchmark_is_ten_clients_and_a_hundred_requests_of_the_same_two_pictures() -> None:
    load = settings("two-images", max_concurrency=DATASETS["two-images"].usual_concurrency).load(None)
    assert (len(load.clients), load.num_slots) == (100, 10)
    assert {ask.num_tokens for client in load.clients for ask in client} == {256}


def test_a_warm_up_shows_nothing_of_the_measured_run() -> None:
    for name in ("images", "two-images", "dialogues", "sliding-window", "clips", "stall"):
        some = settings(name, max_concurrency=None if name == "stall" else 3)
        measured, warm_up = (
            {media for client in load.clients for ask in client for media in ask.media}
            for load in (some.load(None), some.warm_up(None))
        )
        assert warm_up
        assert not measured & warm_up
    some = settings("random")
    measured_texts, warm_texts = (
        {client[0].text for client in load.clients} for load in (some.load(None), some.warm_up(None))
    )
    assert not measured_texts & warm_texts


def test_a_dialogue_shows_its_picture_once_and_a_window_drops_the_oldest() -> None:
    (dialogue,) = build("dialogues", num_prompts=1, num_turns=7).clients
    assert [ask.turn for ask in dialogue] == [1, 2, 3, 4, 5, 6, 7]
    assert [len(ask.media) for ask in dialogue] == [1, 0, 0, 0, 0, 0, 0]
    (user,) = build("sliding-window", num_prompts=1, num_turns=3, window=4).clients
    assert [ask.turn for ask in user] == [1, 1, 1]
    for before, after in itertools.pairwise(user):
        assert after.media[:-1] == before.media[1:]
        assert after.media[-1] not in before.media


def test_only_the_first_request_of_a_dialogue_has_a_time() -> None:
    load = settings("dialogues", arrivals=Arrivals(2.0)).load(None)
    assert [[ask.at_s > 0 for ask in client] for client in load.clients[1:3]] == [
        [True, False, False, False, False]
    ] * 2


def test_the_stall_test_has_streams_and_bursts_at_their_own_times() -> None:
    load = settings("stall").load(None)
    assert len(load.streams) == 8
    assert {stream.num_tokens for stream in load.streams} == {None}
    assert [client[0].at_s for client in load.clients] == [1.5] * 8 + [2.0] * 8 + [2.5] * 8 + [3.0] * 8


def test_a_clip_is_a_file_that_says_how_it_is_to_be_looked_at() -> None:
    clip = Clip(64, 48, 0.4, (1,), fps=2.0)
    assert draw_clip(clip) == draw_clip(clip)
    said = json.loads(part(clip))
    assert said["type"] == "video_url"
    assert said["video_url"]["url"].startswith("data:video/mp4;base64,")
    assert said["video_url"]["fps"] == 2.0


def test_a_picture_is_sent_in_its_format() -> None:
    for name, magic in (("jpeg", "/9j/"), ("png", "iVBORw0KGgo")):
        shown = picture((16, 16), 1, "x", format=name)  # type: ignore[arg-type]
        assert json.loads(part(shown))["image_url"]["url"].startswith(f"data:image/{name};base64,{magic}")


LINES = """
{"prompt": "What is it?", "image_files": ["a.png", "https://images.example/b.png"], "video_files": ["c.mp4"]}

{"prompt": "Go on", "output_tokens": 9}
{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "top_p": 0.5, "model": "theirs", "stream": false}
{"custom_id": "4", "body": {"messages": [{"role": "user", "content": "Ho"}], "max_completion_tokens": 5}}
"""


def test_a_file_may_hold_prompts_bodies_and_lines_of_a_batch(tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text(LINES)
    first, second, third, fourth = recorded(file, output_tokens=32)
    expected = (MediaFile(str(tmp_path / "a.png")), MediaUrl("https://images.example/b.png"))
    assert first.media == (*expected, MediaFile(str(tmp_path / "c.mp4"), is_video=True))
    assert [is_video(media) for media in first.media] == [False, False, True]
    assert [ask.num_tokens for ask in (first, second, third, fourth)] == [32, 9, 4, 5]
    body = json.loads(Dialogue(TARGET, {}).body(third))
    assert body["messages"] == [{"role": "user", "content": "Hi"}]
    assert (body["top_p"], body["model"], body["stream"], body["max_tokens"]) == (0.5, "model", True, 4)
    assert json.loads(Dialogue(TARGET, {}).body(fourth))["messages"][0]["content"] == "Ho"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: "),
        ('{"text": "Hi"}', "line 2: neither prompt, messages nor body"),
        ('{"messages": "Hi"}', "line 2: Expected `array`"),
        ('{"prompt": "Hi", "images": []}', "line 2: Object contains unknown field `images`"),
        ('{"prompt": "Hi", "output_tokens": 99999999999999999999}', "line 2: "),
        ('{"prompt": "Hi", "output_tokens": -5}', "line 2: Expected `int` >= 0"),
        ('{"messages": [], "max_tokens": 3000000000}', "line 2: Expected `int` <= 2147483648"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match="asked.jsonl, " + said):
        recorded(file, 1)


def test_tokens_are_complete_where_their_last_character_is(tokenizer: Tokenizer) -> None:
    text = "about after again, and a \N{GRINNING FACE} face"
    ends = tokenizer.ends(text)
    for cut in range(len(text) + 1):
        first, second = tokens_so_far([text[:cut], text[cut:]], tokenizer)
        assert first == sum(end <= cut for end in ends)
        assert second == len(ends)


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--tokenizer"):
        Tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="--tokenizer"):
        Tokenizer(str(tmp_path))
