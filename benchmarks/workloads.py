"""The workloads of benchmarks/serve.py: what is sent, and which figures come of it."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.asks import Ask, Medium
from benchmarks.client import Client, Load, Replies, Reply
from benchmarks.clips import Clip
from benchmarks.figures import Figures, itl_figures, span_s, stall_figures, ttft_figures, turn_figures
from benchmarks.images import Picture

VGA = (640, 480)
LARGE = (1280, 960)
HD = (1280, 720)
CLIP_SECONDS = 10
TEXT = "Write a long story about a river, a town and the people who live there."
CLIP_QUESTION = "What happens in this clip?"
QUESTION = "Compare these pictures and describe what you see in each of them."
TURNS = (
    "What is in this picture?",
    "Which of its colours is the brightest, and where is it?",
    "Tell me more about the shapes.",
    "What could have happened just before?",
    "Give the picture a title and say why.",
)
NUM_CLIENTS = 10
WINDOW_PICTURES = 5
BURST_PERIOD_S = 0.5
QUIET_S = 1.5  # text streams alone, before the first image arrives


class Scale(NamedTuple):
    """How much of a workload is run. 1: what the published figures are of."""

    factor: float = 1.0

    def __call__(self, count: int) -> int:
        return max(1, math.ceil(count * self.factor))


class Workload(NamedTuple):
    """One row group of the table."""

    name: str
    says: str
    load: Callable[[Scale, int], Load]  # (scale, seed) -> what is measured
    warm_up: Callable[[Scale, int], Load]  # the same shapes, less of them
    figures: Callable[[Replies], Figures]
    shows_caches: bool = False  # the report says what the server's caches did


def picture(size: tuple[int, int], *seed: int | str) -> Picture:
    numbers = (zlib.crc32(part.encode()) if isinstance(part, str) else part for part in seed)
    return Picture(*size, seed=tuple(numbers))


def closed_loop(asks: Sequence[Ask], num_clients: int) -> Load:
    """Requests dealt to clients that send one after the other."""
    return dealt([(ask,) for ask in asks], num_clients)


def dealt(dialogues: Sequence[Sequence[Ask]], num_clients: int) -> Load:
    """Whole dialogues dealt to clients that go through them one after the other."""
    clients: list[Client] = [
        tuple(itertools.chain.from_iterable(dialogues[index::num_clients])) for index in range(num_clients)
    ]
    return Load(tuple(client for client in clients if client))


def text_stream(num_tokens: int) -> Callable[[Scale, int], Load]:
    def load(scale: Scale, seed: int) -> Load:
        return closed_loop([Ask(f"{TEXT} ({seed})", max(8, scale(num_tokens)))], 1)

    return load


def pictures_loop(
    name: str, num_requests: int, num_pictures: int, num_tokens: int, *, fresh: bool
) -> Callable[[Scale, int], Load]:
    """10 clients that send pictures and a question."""

    def load(scale: Scale, seed: int) -> Load:
        def ask(request: int) -> Ask:
            chosen = (picture(VGA, seed, name, request if fresh else 0, index) for index in range(num_pictures))
            return Ask(QUESTION, max(4, scale(num_tokens)), tuple(chosen))

        return closed_loop([ask(request) for request in range(scale(num_requests))], NUM_CLIENTS)

    return load


def burst(name: str, num_requests: int) -> Callable[[Scale, int], Load]:
    """Requests of one fresh picture each, all at once."""

    def load(scale: Scale, seed: int) -> Load:
        asks = [Ask(QUESTION, 16, (picture(VGA, seed, name, request),)) for request in range(scale(num_requests))]
        return closed_loop(asks, len(asks))

    return load


def stall(name: str, num_bursts: int) -> Callable[[Scale, int], Load]:
    """8 text streams, and bursts of 8 requests of one large picture each beside them."""

    def load(scale: Scale, seed: int) -> Load:
        asks = [
            Ask(QUESTION, 16, (picture(LARGE, seed, name, number, index),), QUIET_S + number * BURST_PERIOD_S)
            for number in range(num_bursts)
            for index in range(scale(8))
        ]
        streams = tuple(Ask(f"{TEXT} ({seed}, {index})", None) for index in range(scale(8)))
        return closed_loop(asks, len(asks))._replace(streams=streams)

    return load


def dialogues(name: str, num_dialogues: int, num_clients: int, num_tokens: int) -> Callable[[Scale, int], Load]:
    """A fresh picture in the first of 5 turns, and text alone in the others."""

    def load(scale: Scale, seed: int) -> Load:
        def dialogue(number: int) -> list[Ask]:
            length = max(4, scale(num_tokens))
            asks = [Ask(text, length, turn=turn) for turn, text in enumerate(TURNS, start=1)]
            return [asks[0]._replace(pictures=(picture(VGA, seed, name, number),)), *asks[1:]]

        return dealt([dialogue(number) for number in range(scale(num_dialogues))], num_clients)

    return load


def sliding_window(name: str, num_users: int, num_turns: int, num_tokens: int) -> Callable[[Scale, int], Load]:
    """Users that each ask about their last 5 pictures, one of them fresh from the second time on."""

    def load(scale: Scale, seed: int) -> Load:
        def user(number: int) -> list[Ask]:
            seen = [picture(VGA, seed, name, number, index) for index in range(WINDOW_PICTURES + num_turns - 1)]
            length = max(4, scale(num_tokens))
            return [Ask(QUESTION, length, tuple(seen[turn : turn + WINDOW_PICTURES])) for turn in range(num_turns)]

        users = [user(number) for number in range(scale(num_users))]
        return dealt(users, len(users))

    return load


def clips(
    name: str,
    num_requests: int,
    num_clients: int,
    num_tokens: int,
    *,
    fresh: bool = True,
    num_frames: int | None = None,
) -> Callable[[Scale, int], Load]:
    """Clients that send a clip and a question, at 2 frames a second unless num_frames says how many."""

    def load(scale: Scale, seed: int) -> Load:
        def ask(request: int) -> Ask:
            numbers = (seed, zlib.crc32(name.encode()), request if fresh else 0)
            clip = Clip(*HD, max(1, scale(CLIP_SECONDS)), numbers, None if num_frames else 2.0, num_frames)
            return Ask(CLIP_QUESTION, max(4, scale(num_tokens)), (clip,))

        return closed_loop([ask(request) for request in range(scale(num_requests))], num_clients)

    return load


def pictures_of(load: Load) -> set[Medium]:
    """The distinct pictures and clips that a load sends."""
    asks = itertools.chain(load.streams, *load.clients)
    return {picture for ask in asks for picture in ask.pictures}


def _answered(replies: Sequence[Reply]) -> list[Reply]:
    return [reply for reply in replies if reply.error is None and reply.times_s]


def stream_rate(replies: Replies) -> Figures:
    answered = _answered(replies.clients)
    num_tokens = sum(reply.num_tokens[-1] for reply in answered)
    return {**itl_figures(answered), "tokens_per_s": num_tokens / span_s(answered), **ttft_figures(answered)}


def request_rate(replies: Replies) -> Figures:
    answered = _answered(replies.clients)
    return {"requests_per_s": len(answered) / span_s(answered), **itl_figures(answered), **ttft_figures(answered)}


def dialogue_rate(replies: Replies) -> Figures:
    answered = _answered(replies.clients)
    rate = len(answered) / span_s(answered)
    return {"requests_per_s": rate, **turn_figures(answered), **itl_figures(answered)}


def image_rate(num_pictures: int) -> Callable[[Replies], Figures]:
    def figures(replies: Replies) -> Figures:
        answered = _answered(replies.clients)
        rate = num_pictures * len(answered) / span_s(answered)
        return {"images_per_s": rate, **ttft_figures(answered), **itl_figures(answered)}

    return figures


def stalls(replies: Replies) -> Figures:
    return stall_figures(_answered(replies.streams), _answered(replies.clients))


def figures_of(workload: Workload, replies: Replies) -> Figures:
    """No figures where no request was answered, and none that had nothing to be taken from."""
    if not all(_answered(group) for group in replies if group):
        return {}
    return {name: value for name, value in workload.figures(replies).items() if math.isfinite(value)}


WORKLOADS = (
    Workload("text-stream", "one text stream, 512 tokens out", text_stream(512), text_stream(64), stream_rate),
    Workload(
        "two-images-same",
        "10 clients, 100 requests of the same two 640x480 images, 256 tokens out",
        pictures_loop("same", 100, 2, 256, fresh=False),
        pictures_loop("same", 10, 2, 32, fresh=False),
        request_rate,
    ),
    Workload(
        "two-images-fresh",
        "10 clients, 100 requests of two fresh 640x480 images each, 256 tokens out",
        pictures_loop("fresh", 100, 2, 256, fresh=True),
        pictures_loop("fresh", 10, 2, 32, fresh=True),
        request_rate,
    ),
    Workload(
        "burst",
        "100 requests at once, one fresh 640x480 image each, 16 tokens out",
        burst("burst", 100),
        burst("burst", 20),
        image_rate(1),
    ),
    Workload(
        "eight-images",
        "10 clients, 25 requests of eight fresh 640x480 images each, 256 tokens out",
        pictures_loop("eight", 25, 8, 256, fresh=True),
        pictures_loop("eight", 10, 8, 16, fresh=True),
        image_rate(8),
    ),
    Workload(
        "stall",
        "8 text streams while 4 bursts of 8 requests arrive, one fresh 1280x960 image each, 0.5 s apart",
        stall("stall", 4),
        stall("stall", 1),
        stalls,
    ),
    Workload(
        "dialogue",
        "20 dialogues of 5 turns, 10 at a time, a fresh 640x480 image in turn 1, 128 tokens out",
        dialogues("dialogue", 20, NUM_CLIENTS, 128),
        dialogues("dialogue", 10, NUM_CLIENTS, 16),
        dialogue_rate,
        shows_caches=True,
    ),
    Workload(
        "dialogue-crowd",
        "60 dialogues of 5 turns, all at once, a fresh 640x480 image in turn 1, 128 tokens out",
        dialogues("crowd", 60, 60, 128),
        dialogues("crowd", 10, 10, 16),
        dialogue_rate,
        shows_caches=True,
    ),
    Workload(
        "sliding-window",
        "30 users at once, 8 requests of 5 640x480 images each: one fresh, the oldest dropped; 64 tokens out",
        sliding_window("window", 30, 8, 64),
        sliding_window("window", 10, 2, 16),
        request_rate,
        shows_caches=True,
    ),
    Workload(
        "clips",
        "10 clients, 30 requests of a fresh clip each, 10 s of 1280x720 at 2 fps, 128 tokens out",
        clips("clips", 30, NUM_CLIENTS, 128),
        clips("clips", 4, 4, 16),
        request_rate,
    ),
    Workload(
        "clips-same",
        "10 clients, 100 requests of one such clip, 128 tokens out",
        clips("clips-same", 100, NUM_CLIENTS, 128, fresh=False),
        clips("clips-same", 4, 4, 16, fresh=False),
        request_rate,
    ),
    Workload(
        "one-clip",
        "one client, 8 requests of a fresh such clip each, 16 tokens out",
        clips("one-clip", 8, 1, 16),
        clips("one-clip", 2, 1, 16),
        request_rate,
    ),
    Workload(
        "one-group",
        "the same with 2 frames of each clip, which are one temporal group",
        clips("one-group", 8, 1, 16, num_frames=2),
        clips("one-group", 2, 1, 16, num_frames=2),
        request_rate,
    ),
)
START = "start"  # the launch itself
NAMES = (START, *(workload.name for workload in WORKLOADS))
