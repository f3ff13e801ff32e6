"""What is asked, by the name of a dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from vlmrt.tools.bench.asks import Ask
from vlmrt.tools.bench.clips import Clip
from vlmrt.tools.bench.media import Media
from vlmrt.tools.bench.pictures import PictureFormat, picture
from vlmrt.tools.bench.recorded import recorded
from vlmrt.tools.bench.recounted import Tokenizer
from vlmrt.tools.bench.replies import Client
from vlmrt.tools.bench.texts import around, random_text

TEXT = "Write a long story about a river, a town and the people who live there."
QUESTION = "Compare these pictures and describe what you see in each of them."
DIFFERENT = "Are these images different?"
CLIP_QUESTION = "What happens in this clip?"
TURNS = (
    "What is in this picture?",
    "Which of its colours is the brightest, and where is it?",
    "Tell me more about the shapes.",
    "What could have happened just before?",
    "Give the picture a title and say why.",
)
BURST_PERIOD_S = 0.5
QUIET_S = 1.5  # text streams alone, before the first image arrives

Size = tuple[int, int]  # (width, height)


class Wanted(msgspec.Struct, frozen=True):
    """What the options of a run say of its requests."""

    num_prompts: int = 100
    input_tokens: int = 128  # of random text
    output_tokens: int = 128
    range_ratio: float = 0.0  # lengths are drawn from (1 - range_ratio) to (1 + range_ratio) times these
    prefix_tokens: int = 0  # of text that all prompts begin with
    image_sizes: tuple[Size, ...] = ((640, 480),)  # in turn
    num_images: int = 1  # of one request
    image_format: PictureFormat = "jpeg"
    same_images: bool = False  # in all requests
    num_turns: int = 5  # of a dialogue, or of a user of a sliding window
    window: int = 5  # pictures that a request of a sliding window shows
    clip_s: float = 10.0
    clip_fps: float | None = 2.0  # that the server is asked to look at; None: as the server does
    clip_size: Size = (1280, 720)
    num_streams: int = 8  # of text, beside the bursts of the stall test
    burst: int = 8  # requests that come at once in the stall test
    path: str | None = None
    seed: int = 0


class Work(NamedTuple):
    """Clients whose requests are answered one after the other, and streams beside them."""

    clients: list[Client]
    streams: tuple[Ask, ...] = ()
    has_times: bool = False  # requests say themselves when they are sent


class Dataset(NamedTuple):
    says: str
    build: Callable[[Wanted, Tokenizer | None], Work]
    usual: Wanted = Wanted()  # where the options do not say it
    usual_concurrency: int | None = None


def texts(wanted: Wanted, tokenizer: Tokenizer | None) -> Work:
    shared = random_text(wanted.prefix_tokens, np.random.default_rng((wanted.seed, 1)), tokenizer)
    clients: list[Client] = []
    for number in range(wanted.num_prompts):
        rng = np.random.default_rng((wanted.seed, 2, number))
        length = around(wanted.input_tokens, wanted.range_ratio, rng)
        text = " ".join(filter(None, (shared, random_text(length, rng, tokenizer))))
        clients.append((_ask(text, wanted, rng),))
    return Work(clients)


def images(question: str) -> Callable[[Wanted, Tokenizer | None], Work]:
    """Requests of generated pictures and a question, or random text where its length is said."""

    def build(wanted: Wanted, tokenizer: Tokenizer | None) -> Work:
        clients: list[Client] = []
        for number in range(wanted.num_prompts):
            rng = np.random.default_rng((wanted.seed, 3, number))
            shown = tuple(_picture(wanted, "images", number, index) for index in range(wanted.num_images))
            text = random_text(wanted.input_tokens, rng, tokenizer) or question
            clients.append((_ask(text, wanted, rng, shown),))
        return Work(clients)

    return build


def clips(wanted: Wanted, tokenizer: Tokenizer | None) -> Work:
    clients: list[Client] = []
    for number in range(wanted.num_prompts):
        rng = np.random.default_rng((wanted.seed, 4, number))
        seed = (wanted.seed, 4, 0 if wanted.same_images else number)
        shown = Clip(*wanted.clip_size, wanted.clip_s, seed, wanted.clip_fps)
        text = random_text(wanted.input_tokens, rng, tokenizer) or CLIP_QUESTION
        clients.append((_ask(text, wanted, rng, (shown,)),))
    return Work(clients)


def dialogue(shown: tuple[Media, ...], num_turns: int, num_tokens: int, *, exact: bool = True) -> Client:
    """Pictures in turn 1, and text alone in the others, behind all turns before them and what was answered."""
    return tuple(
        Ask(TURNS[(turn - 1) % len(TURNS)], num_tokens, shown if turn == 1 else (), turn=turn, exact=exact)
        for turn in range(1, num_turns + 1)
    )


def window_user(seen: tuple[Media, ...], window: int, num_tokens: int, *, exact: bool = True) -> Client:
    """Asks about the last pictures, one of them fresh from the second time on; without a history."""
    turns = range(len(seen) - window + 1)
    return tuple(Ask(QUESTION, num_tokens, seen[turn : turn + window], exact=exact) for turn in turns)


def dialogues(wanted: Wanted, tokenizer: Tokenizer | None) -> Work:
    def one(number: int) -> Client:
        shown = tuple(_picture(wanted, "dialogues", number, index) for index in range(wanted.num_images))
        return dialogue(shown, wanted.num_turns, wanted.output_tokens, exact=False)

    return Work([one(number) for number in range(wanted.num_prompts)])


def windows(wanted: Wanted, tokenizer: Tokenizer | None) -> Work:
    def user(number: int) -> Client:
        num_pictures = wanted.window + wanted.num_turns - 1
        seen = tuple(_picture(wanted, "window", number, index) for index in range(num_pictures))
        return window_user(seen, wanted.window, wanted.output_tokens, exact=False)

    return Work([user(number) for number in range(wanted.num_prompts)])


def stall(wanted: Wanted, tokenizer: Tokenizer | None) -> Work:
    """Text streams, and bursts of requests with large pictures beside them."""
    clients: list[Client] = []
    for number in range(wanted.num_prompts):
        rng = np.random.default_rng((wanted.seed, 5, number))
        shown = tuple(_picture(wanted, "stall", number, index) for index in range(wanted.num_images))
        at_s = QUIET_S + number // wanted.burst * BURST_PERIOD_S
        clients.append((msgspec.structs.replace(_ask(QUESTION, wanted, rng, shown), at_s=at_s),))
    streams = tuple(Ask(f"{TEXT} ({wanted.seed}, {index})", None, exact=False) for index in range(wanted.num_streams))
    return Work(clients, streams, has_times=True)


def from_file(wanted: Wanted, tokenizer: Tokenizer | None) -> Work:
    """Raises: ValueError naming the line, OSError."""
    if wanted.path is None:
        raise ValueError("--dataset-name jsonl needs --dataset-path FILE")
    asks = recorded(Path(wanted.path), wanted.output_tokens)
    if not asks:
        raise ValueError(f"--dataset-path {wanted.path}: the file has no requests")
    return Work([(ask,) for ask in asks[: wanted.num_prompts]])


def _ask(text: str, wanted: Wanted, rng: np.random.Generator, shown: tuple[Media, ...] = ()) -> Ask:
    return Ask(text, around(wanted.output_tokens, wanted.range_ratio, rng), shown, exact=False)


def _picture(wanted: Wanted, name: str, number: int, index: int) -> Media:
    size = wanted.image_sizes[(number * wanted.num_images + index) % len(wanted.image_sizes)]
    return picture(size, wanted.seed, name, 0 if wanted.same_images else number, index, format=wanted.image_format)


DATASETS = {
    "random": Dataset("random text of a given number of tokens", texts),
    "images": Dataset("generated pictures and a question", images(QUESTION), Wanted(input_tokens=0)),
    "two-images": Dataset(
        "10 clients, 100 requests of the same two 640x480 pictures, 256 tokens out: the benchmark of DashInfer-VLM",
        images(DIFFERENT),
        Wanted(input_tokens=0, num_images=2, output_tokens=256, same_images=True),
        usual_concurrency=10,
    ),
    "dialogues": Dataset(
        "dialogues of several turns, a picture in the first", dialogues, Wanted(num_prompts=20), usual_concurrency=10
    ),
    "sliding-window": Dataset(
        "users that ask about their last pictures, one fresh each time",
        windows,
        Wanted(num_prompts=30, num_turns=8, output_tokens=64),
    ),
    "clips": Dataset(
        "short H.264 clips and a question", clips, Wanted(num_prompts=20, input_tokens=0), usual_concurrency=10
    ),
    "stall": Dataset(
        "text streams while bursts of large pictures arrive",
        stall,
        Wanted(num_prompts=32, output_tokens=16, image_sizes=((1280, 960),)),
    ),
    "jsonl": Dataset("requests from a file, one a line", from_file, Wanted(num_prompts=1 << 40)),
}
