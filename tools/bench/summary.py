"""Replies -> what a run says of itself, under the names that `vllm bench serve` gives to it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlmrt.tools.bench.figures import percentile, stall_figures, token_gaps, turn_figures
from vlmrt.tools.bench.replies import Replies, Reply

Result = dict[str, Any]  # JSON

SHOWN_ERRORS = 10
COUNTED = {
    "usage": "tokens, as the server counts them in every chunk",
    "tokenizer": "tokens, by the tokenizer",
    "chunks": "chunks with text",
}


def ttft_s(reply: Reply) -> float:
    return reply.times_s[0] - reply.sent_s


def e2el_s(reply: Reply) -> float:
    """From sending to the last token."""
    return reply.times_s[-1] - reply.sent_s


def tpot_s(reply: Reply) -> float:
    """Time per token after the first; 0 of an answer that has no second one."""
    more = reply.output_tokens - 1
    return (reply.times_s[-1] - reply.times_s[0]) / more if more > 0 else 0.0


def silence_s(reply: Reply) -> float:
    """The longest time between two arrivals, however many tokens ended it."""
    return max((later - earlier for earlier, later in itertools.pairwise(reply.times_s)), default=0.0)


def queued_s(reply: Reply) -> float:
    """How long the request waited in the client after it was due."""
    return max(0.0, reply.sent_s - reply.due_s) if reply.due_s is not None else 0.0


def answered(replies: Sequence[Reply]) -> list[Reply]:
    return [reply for reply in replies if reply.error is None and reply.times_s]


# in seconds; each is told in milliseconds as mean_NAME_ms, median_NAME_ms, std_NAME_ms and pP_NAME_ms
SAMPLES: Mapping[str, Callable[[Sequence[Reply]], list[float]]] = {
    "ttft": lambda replies: [ttft_s(reply) for reply in replies],
    "tpot": lambda replies: [tpot_s(reply) for reply in replies if reply.output_tokens > 1],
    "itl": token_gaps,
    "e2el": lambda replies: [e2el_s(reply) for reply in replies],
    "silence": lambda replies: [silence_s(reply) for reply in replies if len(reply.times_s) > 1],
    "client_queue_time": lambda replies: [queued_s(reply) for reply in replies],
}
HEADINGS = {
    "ttft": "time to first token (TTFT)",
    "tpot": "time per output token after the first (TPOT)",
    "itl": "inter-token latency (ITL)",
    "e2el": "time to the last token (E2EL)",
    "silence": "longest time without news of an answer",
    "client_queue_time": "time in the client's queue",
}
OBJECTIVES: Mapping[str, Callable[[Reply], float]] = {"ttft": ttft_s, "tpot": tpot_s, "e2el": e2el_s}


def summary(replies: Replies, objectives_ms: Mapping[str, float], percentiles: Sequence[float]) -> Result:
    """All figures of one run. Rates are over the time from the first request to the end of the last."""
    clients = sorted(replies.clients, key=lambda reply: reply.sent_s)
    good = answered(clients)
    duration_s = max(1e-9, max(reply.end_s for reply in clients) - clients[0].sent_s)
    num_input = sum(reply.prompt_tokens or 0 for reply in good)
    num_output = sum(reply.output_tokens for reply in good)
    num_images, num_videos = (sum(getattr(reply, name) for reply in good) for name in ("num_images", "num_videos"))
    result: Result = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(clients) - len(good),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "total_images": num_images,
        "total_videos": num_videos,
        "request_throughput": len(good) / duration_s,
        "request_goodput": num_within(good, objectives_ms) / duration_s if objectives_ms else None,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "image_throughput": num_images / duration_s,
        "video_throughput": num_videos / duration_s,
        "max_output_tokens_per_s": max(tokens_by_second(good), default=0.0),
        "max_concurrent_requests": most_at_once(clients),
    }
    for name, samples in SAMPLES.items():
        result |= distribution(name, samples(good), percentiles)
    if good and len(answered(replies.streams)) == len(replies.streams) > 0:
        stalls = stall_figures(replies.streams, good)
        result |= {f"stall_{name}": value for name, value in stalls.items() if math.isfinite(value)}
    if any(reply.turn > 1 for reply in good):
        turns = turn_figures(good)
        result |= {f"dialogue_{name}": value for name, value in turns.items() if math.isfinite(value)}
    return result | what_is_wrong(replies) | {"itl_of": itl_of(good), "client_cpu": replies.client_cpu}


def num_within(replies: Sequence[Reply], objectives_ms: Mapping[str, float]) -> int:
    """Requests that meet every objective."""
    return sum(
        all(1e3 * OBJECTIVES[name](reply) <= limit for name, limit in objectives_ms.items()) for reply in replies
    )


def distribution(name: str, samples_s: Sequence[float], percentiles: Sequence[float]) -> Result:
    """In ms; None of no samples."""
    values = np.asarray(samples_s) * 1e3
    empty = not len(values)
    found: Result = {
        f"mean_{name}_ms": None if empty else float(values.mean()),
        f"median_{name}_ms": None if empty else float(np.median(values)),
        f"std_{name}_ms": None if empty else float(values.std()),
    }
    for percent in percentiles:
        found[f"p{percent:g}_{name}_ms"] = None if empty else percentile(values.tolist(), percent)
    return found


def what_is_wrong(replies: Replies) -> Result:
    """Failures by kind, with the words of the first ones; answers of another length than was asked for."""
    failed = [reply for reply in (*replies.clients, *replies.streams) if reply.error is not None]
    firsts: dict[str, str] = {}
    for reply in failed:
        firsts.setdefault(reply.error_kind, reply.error or "")
    good = answered(replies.clients)
    return {
        "errors_by_kind": dict(Counter(reply.error_kind for reply in failed).most_common()),
        "first_errors": firsts,
        "failed_streams": sum(reply.error is not None for reply in replies.streams),
        "short_answers": sum((reply.asked_tokens or 0) > reply.output_tokens for reply in good),
    }


def itl_of(replies: Sequence[Reply]) -> str:
    """What two neighbours of an ITL are."""
    ways = Counter(reply.counted_by for reply in replies)
    parts = []
    for way, count in ways.most_common():
        part = COUNTED[way]
        if way == "chunks":
            some = [reply for reply in replies if reply.counted_by == way]
            num_chunks, num_tokens = (
                sum(reply.num_tokens[-1] for reply in some),
                sum(reply.answer_tokens or 0 for reply in some),
            )
            told = f"{num_tokens} tokens by the server" if num_tokens else "whose tokens nobody counted"
            part += f" ({num_chunks} of them, {told})"
        parts.append(part if len(ways) == 1 else f"{part} in {count} answers")
    return "; ".join(parts) or "nothing"


def tokens_by_second(replies: Sequence[Reply]) -> list[float]:
    """Tokens that came in each second after the first request was sent."""
    if not replies:
        return []
    start_s = min(reply.sent_s for reply in replies)
    seconds: Counter[int] = Counter()
    for reply in replies:
        before = 0
        for time_s, count in zip(reply.times_s, reply.num_tokens, strict=True):
            seconds[int(time_s - start_s)] += count - before
            before = count
    return [float(seconds[second]) for second in range(max(seconds, default=-1) + 1)]


def most_at_once(replies: Sequence[Reply]) -> int:
    """The most requests that were open at one time."""
    return max((count for _, count in open_requests(replies)), default=0)


def open_requests(replies: Sequence[Reply]) -> list[tuple[float, int]]:
    """(time, requests open from then on) wherever that number changes."""
    changes = sorted([(reply.sent_s, 1) for reply in replies] + [(reply.end_s, -1) for reply in replies])
    counts = itertools.accumulate(change for _, change in changes)
    return [(time_s, count) for (time_s, _), count in zip(changes, counts, strict=True)]


def per_request(replies: Replies) -> Result:
    """The lists that `--save-detailed` adds, in the order of sending; 0 and [] where there is nothing."""
    clients = sorted(replies.clients, key=lambda reply: reply.sent_s)
    return {
        "input_lens": [reply.prompt_tokens or 0 for reply in clients],
        "output_lens": [reply.output_tokens if reply.error is None else 0 for reply in clients],
        "start_times": [reply.sent_s for reply in clients],
        "ttfts": [ttft_s(reply) if reply.times_s else 0.0 for reply in clients],
        "itls": [token_gaps([reply]) for reply in clients],
        "latencies": [e2el_s(reply) if reply.times_s else 0.0 for reply in clients],
        "queue_times": [queued_s(reply) for reply in clients],
        "errors": [reply.error or "" for reply in clients],
    }
