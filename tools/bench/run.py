"""One run: warm up, measure, sum up."""

from __future__ import annotations

import itertools
import os
import platform
from contextlib import nullcontext
from datetime import datetime
from typing import NamedTuple

import msgspec
from rich.console import Console

from vlmrt import __version__
from vlmrt.tools.bench.caches import caches_between
from vlmrt.tools.bench.pool import ClientPool
from vlmrt.tools.bench.progress import LoadProgress
from vlmrt.tools.bench.recounted import Tokenizer
from vlmrt.tools.bench.replies import Load, Replies
from vlmrt.tools.bench.settings import Settings
from vlmrt.tools.bench.summary import Result, per_request, summary
from vlmrt.tools.bench.trace import Trace

BUSY_CLIENT = 0.7  # share of a core from which on a client process delays what it times


class Run(NamedTuple):
    """What came of it."""

    result: Result  # without the lists of per_request
    replies: Replies

    @property
    def failed(self) -> bool:
        return bool(self.result["failed"] or self.result["failed_streams"] or self.result["warm_up_errors"])


def measured(
    pool: ClientPool,
    settings: Settings,
    tokenizer: Tokenizer | None,
    console: Console,
    *,
    shown: bool,
    label: str = "",
    trace: Trace | None = None,
) -> Run:
    """`trace`: reads the server's metrics before and after what is measured.

    Raises: Unplayable, ValueError or OSError of a file of requests or of the metrics.
    """
    load = settings.load(tokenizer)
    warm_up_errors: list[str] = []
    if settings.warm_ups:
        warm_up = settings.warm_up(tokenizer)
        with LoadProgress(console, f"{label}warming up", _count(warm_up), shown=shown) as progress:
            warm_up_errors = pool.play(warm_up, progress.watch).errors
    with trace or nullcontext(), LoadProgress(console, f"{label}measuring", _count(load), shown=shown) as progress:
        replies = pool.play(load, progress.watch)
    result = said_of(settings, load) | summary(replies, settings.objectives_ms, settings.percentiles)
    result |= {"warm_up_errors": len(warm_up_errors), "first_warm_up_error": next(iter(warm_up_errors), None)}
    return Run(result | (_traced(trace, load, result["duration"]) if trace is not None else {}), replies)


def _traced(trace: Trace, load: Load, wall_s: float) -> Result:
    """What the server's counters say of the load."""
    asks = itertools.chain(load.streams, *load.clients)
    num_distinct = len({media for ask in asks for media in ask.media})
    caches = caches_between(trace.before, trace.after, num_distinct)
    return {"caches": caches._asdict(), "trace": [*caches.lines, *trace.lines(wall_s)]}


def _count(load: Load) -> int:
    return sum(map(len, load.clients))


def said_of(settings: Settings, load: Load) -> Result:
    """The fields that say what was run, under the names of `vllm bench serve` where it has them."""
    target, arrivals = settings.target, settings.arrivals
    said: Result = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat" if target.is_chat else "openai",
        "backend": "openai-chat" if target.is_chat else "openai",
        "label": None,
        "model_id": target.model,
        "tokenizer_id": target.tokenizer,
        "num_prompts": _count(load),
        "request_rate": arrivals.rate if arrivals.rate != float("inf") else "inf",
        "burstiness": arrivals.burstiness,
        "max_concurrency": settings.max_concurrency,
        "server": target.url,
        "dataset": settings.dataset,
        "wanted": msgspec.to_builtins(settings.wanted),
        "ignore_eos": target.ignore_eos,
        "num_warmups": settings.warm_ups,
        "goodput_ms": settings.objectives_ms,
        "client": {
            "vlmrt": __version__,
            "python": platform.python_version(),
            "machine": platform.platform(),
            "cores": len(os.sched_getaffinity(0)),
            "processes": settings.client_processes,
        },
    }
    if arrivals.ramp is not None:
        said["ramp_up_strategy"] = arrivals.ramp
        said["ramp_up_start_rps"], said["ramp_up_end_rps"] = arrivals.start_rate, arrivals.end_rate
    return said


def warnings_of(result: Result) -> list[str]:
    """What a reader of the figures must know."""
    found = []
    if result["short_answers"]:
        found.append(f"{result['short_answers']} answers are shorter than was asked for: the model ended them")
    if result["client_cpu"] > BUSY_CLIENT:
        busy = f"{result['client_cpu']:.0%}"
        found.append(f"a client process was busy for {busy} of the time and may limit: more --client-processes")
    return found


def detailed(run: Run) -> Result:
    return {**run.result, **per_request(run.replies)}
