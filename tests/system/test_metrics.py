"""After a mixed load on a real server every documented metric has moved, or a named test moves it."""

from __future__ import annotations

import ast
import base64
import itertools
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from tests.clips import make_clip
from tests.pictures import encode, noise
from tests.system.server import Server
from vlmrt.runtime.metric_table import METRICS

TESTS = Path(__file__).parents[1]
QUESTION = {"type": "text", "text": "Describe the image."}
HELD_BYTES = 4096  # of a body that does not come to its end

_EMBED_TIERS = "actors/scheduler/test_embed_host_tier.py::test_metrics_tell_the_tiers_apart"
_KV_TIERS = "actors/scheduler/test_kv_host_tier.py::test_the_figures_say_what_both_memories_hold_and_lost"
_TWICE = "actors/scheduler/test_figures.py::test_work_that_is_done_twice_is_counted"
_HEARTBEAT = "runtime/test_actor.py::test_a_heartbeat_tells_what_waits_what_was_not_sent_and_what_the_process_takes"
_STALE = "runtime/test_mailbox.py::test_messages_of_a_dead_incarnation_are_dropped_even_if_they_were_here_before"
_SPANS = "actors/edge/test_timelines.py::test_spans_are_counted_in_the_histograms_that_no_actor_fills_itself"

MOVED_ELSEWHERE = {  # does not happen to a healthy server on a CPU, or passes too fast to be seen in one
    "actor_restarts_total": "runtime/test_metrics.py::test_the_text_is_read_back_by_prometheus_own_parser",
    "bad_frames_total": "runtime/test_actor.py::test_garbage_on_the_control_channel_is_counted_and_dropped",
    "device_memory_bytes": "actors/vit/test_actor.py::test_a_tower_on_a_gpu_tells_how_much_of_it_its_process_holds",
    "embedding_cache_evictions_total": _EMBED_TIERS,
    "embedding_cache_host_bytes": _EMBED_TIERS,
    "embedding_cache_host_evictions_total": _EMBED_TIERS,
    "embedding_cache_host_hits_total": _EMBED_TIERS,
    "mailbox_age_seconds": _HEARTBEAT,
    "mailbox_depth": _HEARTBEAT,
    "pixel_arena_bytes": "actors/media/test_actor.py::test_the_use_of_the_arena_is_shown",
    "preemptions_total": _TWICE,
    "prefix_cache_evictions_total": _KV_TIERS,
    "prefix_cache_host_bytes": _KV_TIERS,
    "prefix_cache_host_evictions_total": _KV_TIERS,
    "prefix_cache_host_hits_total": _KV_TIERS,
    "recomputations_total": _TWICE,
    "requests_waiting": "actors/scheduler/test_figures.py::test_requests_are_counted_where_they_are",
    "restore_seconds": _SPANS,
    "stale_messages_total": _STALE,
    "unsent_messages_total": _HEARTBEAT,
}
NEVER_STILL = ("process_cpu_seconds_total", "http_requests_total")  # reading the metrics is a request too
_numbers = itertools.count()


def series(name: str) -> str:
    """What of a metric moves: of a histogram, how often it was counted in."""
    return f"vlmrt_{name}{'_count' if METRICS[name].kind == 'histogram' else ''}"


def figure(metrics: dict[str, float], name: str) -> float:
    return metrics.get(series(name), 0.0)


def ask_all_kinds(server: Server, look: Callable[[], dict[str, float]]) -> None:
    """Text, an image, the same again, by name, a clip, structured output, two choices, an error, a client that goes."""
    seed = 40_000 + next(_numbers)
    image = {"type": "image_url", "image_url": {"url": encode(noise(120, 90, seed), "PNG", "").url}, "uuid": f"m{seed}"}
    clip = base64.b64encode(make_clip(96, 64, 12, fps=6, seed=seed)).decode()
    film = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{clip}", "fps": 2.0}}
    server.chat(f"What can you do? {seed}", n=2, max_tokens=12)
    for part in (image, image, {"type": "image_url", "uuid": f"m{seed}"}, film):
        server.chat([part, QUESTION], max_tokens=12)
    chosen = server.chat("A colour?", extra_body={"structured_outputs": {"choice": ["red", "blue"]}})
    assert chosen.choices[0].message.content in ("red", "blue")
    with pytest.raises(openai.BadRequestError):
        server.chat("Hello", temperature=-1)
    endless = {"stream": True, "max_tokens": 1000, "extra_body": {"ignore_eos": True}}
    with server.chat("Tell me a story.", **endless) as stream:
        next(iter(stream))
        server.wait_until(lambda: look()["vlmrt_requests_running"] > 0, "a request that runs")


@contextmanager
def half_a_body(server: Server) -> Iterator[None]:
    """A request whose body stops in its middle, and goes on no more."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {HELD_BYTES}\r\n\r\n"
        connection.sendall(head.encode() + b'{"messages": [')
        yield


def test_every_documented_metric_moves_under_a_mixed_load_or_in_a_test_that_is_named(demo_server: Server) -> None:
    before = demo_server.metrics()
    highest: dict[str, float] = {}

    def look() -> dict[str, float]:
        found = demo_server.metrics()
        for name in METRICS:
            highest[name] = max(highest.get(name, 0.0), figure(found, name))
        return found

    with half_a_body(demo_server):
        demo_server.wait_until(lambda: look().get("vlmrt_requests_preparing", 0) > 0, "a request in preparation")
        assert look()["vlmrt_media_bytes_in_flight"] == HELD_BYTES
    ask_all_kinds(demo_server, look)
    demo_server.counted([series(name) for name in METRICS if METRICS[name].kind != "gauge" and name not in NEVER_STILL])
    assert unmoved(before, look(), highest) == []


def unmoved(before: dict[str, float], after: dict[str, float], highest: dict[str, float]) -> list[str]:
    """Counters and histograms that did not grow, gauges that were never above zero; of those that should."""
    still = []
    for name, metric in METRICS.items():
        base = 0.0 if metric.kind == "gauge" else figure(before, name)
        top = highest.get(name, 0.0) if metric.kind == "gauge" else figure(after, name)
        if top <= base and name not in MOVED_ELSEWHERE:
            still.append(name)
    return still


@pytest.mark.parametrize("name", sorted(MOVED_ELSEWHERE))
def test_the_test_that_moves_a_metric_exists_and_names_it(name: str) -> None:
    assert name in METRICS
    path, _, function = MOVED_ELSEWHERE[name].partition("::")
    source = (TESTS / path).read_text()
    found = [
        ast.get_source_segment(source, node) or ""
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == function
    ]
    assert len(found) == 1, f"no {function} in {path}"
    assert name in found[0]
