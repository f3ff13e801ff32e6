"""Arrival times of tokens -> the figures of a table."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vlmrt.tools.bench.replies import Reply

Figures = dict[str, float]


class Window(NamedTuple):
    """A stretch of time, in seconds of time.monotonic."""

    start_s: float
    end_s: float


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest values; nan of none."""
    return float(np.percentile(values, percent)) if len(values) else float("nan")


def token_gaps(replies: Iterable[Reply], window: Window | None = None) -> list[float]:
    """Seconds between neighbouring tokens: a gap whose end brought k tokens counts as k gaps of its k-th part.

    Of a window: all gaps that have a part in it, each at its whole length.
    """
    gaps = []
    for reply in replies:
        for start_s, end_s, num_tokens in _arrivals(reply):
            if window is None or (end_s > window.start_s and start_s < window.end_s):
                gaps += [(end_s - start_s) / num_tokens] * num_tokens
    return gaps


def longest_gap(replies: Iterable[Reply], window: Window) -> float:
    """The longest time without news of one answer that has a part in the window, however many tokens ended it."""
    return max(
        (
            end_s - start_s
            for reply in replies
            for start_s, end_s, _ in _arrivals(reply)
            if end_s > window.start_s and start_s < window.end_s
        ),
        default=float("nan"),
    )


def _arrivals(reply: Reply) -> Iterable[tuple[float, float, int]]:
    """(earlier arrival, later arrival, tokens that the later one brought)."""
    both = zip(reply.times_s, reply.num_tokens, strict=True)
    for (start_s, before), (end_s, after) in itertools.pairwise(both):
        yield start_s, end_s, after - before


def first_token_times(replies: Iterable[Reply]) -> list[float]:
    """Seconds from sending to the first token."""
    return [reply.times_s[0] - reply.sent_s for reply in replies if reply.times_s]


def span_s(replies: Iterable[Reply]) -> float:
    """From the first request's start to the last one's last token."""
    answered = [reply for reply in replies if reply.times_s]
    return max(reply.times_s[-1] for reply in answered) - min(reply.sent_s for reply in answered)


def itl_figures(replies: Sequence[Reply]) -> Figures:
    gaps = token_gaps(replies)
    return {"itl_p50_ms": 1e3 * percentile(gaps, 50), "itl_p99_ms": 1e3 * percentile(gaps, 99)}


def ttft_figures(replies: Sequence[Reply]) -> Figures:
    firsts = first_token_times(replies)
    return {"ttft_p50_ms": 1e3 * percentile(firsts, 50), "ttft_p99_ms": 1e3 * percentile(firsts, 99)}


def turn_figures(replies: Sequence[Reply]) -> Figures:
    """Of dialogues: first tokens of turn 1, and of the turns after it."""
    first = first_token_times(reply for reply in replies if reply.turn == 1)
    later = first_token_times(reply for reply in replies if reply.turn > 1)
    return {
        "ttft_first_p50_ms": 1e3 * percentile(first, 50),
        "ttft_later_p50_ms": 1e3 * percentile(later, 50),
        "ttft_later_p99_ms": 1e3 * percentile(later, 99),
    }


def stall_figures(streams: Sequence[Reply], images: Sequence[Reply]) -> Figures:
    """What the text streams feel from the first image's arrival to the last image's first token.

    Quiet is the time before it in which all streams already had tokens.
    """
    window = Window(min(reply.sent_s for reply in images), max(reply.times_s[0] for reply in images))
    quiet = Window(max(reply.times_s[0] for reply in streams), window.start_s)
    firsts = first_token_times(images)
    quiet_s, busy_s = percentile(token_gaps(streams, quiet), 50), percentile(token_gaps(streams, window), 50)
    return {
        "quiet_itl_p50_ms": 1e3 * quiet_s,
        "itl_p50_ms": 1e3 * busy_s,
        "itl_p50_times_quiet": busy_s / quiet_s,
        "itl_max_ms": 1e3 * longest_gap(streams, window),
        "image_ttft_p50_ms": 1e3 * percentile(firsts, 50),
        "image_ttft_p99_ms": 1e3 * percentile(firsts, 99),
        "last_image_s": window.end_s - window.start_s,
    }
