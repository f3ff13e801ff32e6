"""What `vlmrt admin` prints: figures, requests, caches, a trace, the configuration."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from tests.support import make_config
from vlmrt.runtime.admin_messages import CachesReply, OpenRequestRow, RequestsReply, StatsReply, TraceReply
from vlmrt.runtime.config_shown import config_values
from vlmrt.runtime.control_messages import ActorStatus, ServiceStatus
from vlmrt.runtime.messages import ActorName, Epoch
from vlmrt.runtime.metrics import Metrics
from vlmrt.runtime.questions import CachesShown, Tier
from vlmrt.runtime.service_stats import service_stats
from vlmrt.runtime.timeline import Span, SpanName, Timeline
from vlmrt.tools.admin.config_view import BUILT_IN, OPTIONS, config_lines, config_rows
from vlmrt.tools.admin.text_views import caches_lines, requests_lines, stats_lines
from vlmrt.tools.admin.trace_view import named_timeline, trace_lines
from vlmrt.tools.launch_command import add_arguments


def stats_reply(draining: bool = False, ready: bool = True) -> StatsReply:
    edge, scheduler = Metrics(), Metrics()
    for _ in range(120):
        edge.observe("e2e_request_latency_seconds", 1.0)
    edge.add("request_errors_total", 2, code="cancelled")
    edge.set("resident_memory_bytes", 80 << 20)
    for _ in range(10):
        edge.observe("time_to_first_token_seconds", 0.04)
    scheduler.set("requests_running", 3)
    scheduler.set("kv_cache_usage_ratio", 0.4)
    scheduler.set("prefix_cache_bytes", 3 << 20)
    scheduler.add("prefix_cache_queries_total", 1000)
    scheduler.add("prefix_cache_hits_total", 440)
    actors = (
        ActorStatus(ActorName("edge:0"), Epoch(1), 11, "ready", 0, 0.25, 1.5),
        ActorStatus(ActorName("vit:0"), Epoch(3), 0, "ready" if ready else "restarting", 2, 9.0, 0.0, "cuda:1"),
    )
    metrics = {"edge:0": edge.snapshot(), "scheduler:0": scheduler.snapshot()}
    status = ServiceStatus(ready, actors, metrics, at_s=500.0, uptime_s=400.0, draining=draining)
    return StatsReply(service_stats(status), "test-model", "http://127.0.0.1:1", 99, "0.1.0")


def test_the_figures_of_a_service() -> None:
    lines = stats_lines(stats_reply())
    assert lines[0] == "test-model at http://127.0.0.1:1, vlmrt 0.1.0, pid 99, up 6 min 40 s"
    assert lines[1] == "state     ready"
    assert lines[2] == "requests  3 running, 0 waiting; 120 done, 2 failed, 0 aborted"
    assert "KV cache  40 % in use, 3.0 MiB kept, 44 % of 1,000 prompt tokens found" in lines
    latency = next(line for line in lines if line.startswith("first token, since the start"))
    assert latency.split() == [*"first token, since the start 10 40 ms 38 ms 48 ms 50 ms".split()]
    unknown = next(line for line in lines if line.startswith("between tokens, since the start"))
    assert unknown.split()[-5:] == ["0", "-", "-", "-", "-"]
    assert [line.split()[:4] for line in lines[-2:]] == [
        ["edge:0", "ready", "11", "cpu"],
        ["vit:0", "ready", "-", "cuda:1"],
    ]


def test_a_service_that_is_not_ready_names_who_is_down_and_one_that_drains_says_so() -> None:
    assert stats_lines(stats_reply(ready=False))[1] == "state     not ready (vit:0 restarting)"
    assert stats_lines(stats_reply(draining=True))[1] == "state     draining"


def row(label: str, **fields: Any) -> OpenRequestRow:
    values: dict[str, Any] = {"answer_id": "a", "path": "/v1/x", "age_s": 1.5, "streams": True, "state": "decode"}
    return OpenRequestRow("edge:0", label, **{**values, **fields})


def test_requests_are_a_table_and_none_is_said_in_words() -> None:
    assert requests_lines(RequestsReply((), 0)) == ["no request is open"]
    rows = (row("x" * 50, num_prompt_tokens=21, num_output_tokens=5, max_tokens=64), row("b", state="preparing"))
    lines = requests_lines(RequestsReply(rows, 7))
    assert lines[0].split()[:7] == ["request", "state", "age", "prompt", "cached", "computed", "output"]
    assert lines[1].split()[:5] == ["x" * 35 + "…", "decode", "1.50", "s", "21"]
    assert "5/64" in lines[1]
    assert lines[-1] == "... and 5 more"


def test_caches_say_what_they_hold_of_what_they_could() -> None:
    caches = CachesShown((Tier("kv", 100, 12, 40, 4096, 40),), (Tier("vit:0", 64, 3, 8, 1024, 2),), 1)
    lines = caches_lines(CachesReply(caches))
    assert [line.split() for line in lines if line.startswith(("kv", "vit:0"))] == [
        ["kv", "40", "100", "12", "400", "KiB", "40"],
        ["vit:0", "8", "64", "3", "64", "KiB", "2"],
    ]
    assert lines[-1].startswith("1 name under which")
    assert "no ViT is up" in caches_lines(CachesReply(CachesShown((), (), 0)))


# ---------------------------------------------------------------- a trace


def span(name: SpanName, actor: str, begin_s: float, end_s: float, what: str = "") -> Span:
    return Span(name, actor, 100.0 + begin_s, 100.0 + end_s, what)


TIMELINE = Timeline(
    "mine",
    "/v1/chat/completions",
    100.0,
    1.7e9,
    answer_id="chatcmpl-1",
    end_s=101.0,
    outcome="stop",
    first_token_s=100.5,
    num_prompt_tokens=43,
    num_output_tokens=3,
    num_media=1,
    max_gap_s=0.034,
    spans=(
        span("receive", "edge:0", 0.0, 0.0001),
        span("encode", "vit:0", 0.1, 0.3, "2002c9b7"),
        span("prefill", "llm:0", 0.3, 0.5),
        span("decode", "llm:0", 0.5, 1.0),
    ),
)


def test_a_trace_has_a_bar_for_each_span_where_and_as_long_as_it_was() -> None:
    lines = trace_lines(TraceReply(TIMELINE, "edge:0", 200.0), 100, bar="#")
    assert lines[:2] == ["request      mine", "answer       chatcmpl-1"]
    assert lines[3] == "outcome      stop after 1.00 s"
    assert lines[5] == "first token  after 500 ms; longest gap 34 ms"
    bars = [(line.split()[0], line.index("#"), line.count("#")) for line in lines if "#" in line]
    begin = bars[0][1]
    room = 100 - begin
    assert [name for name, _, _ in bars] == ["receive", "encode", "prefill", "decode"]
    assert bars[0][2] == 1
    for (_, at, length), (first, last) in zip(bars[1:], ((0.1, 0.3), (0.3, 0.5), (0.5, 1.0)), strict=True):
        assert abs(at - begin - first * room) <= 1
        assert abs(length - (last - first) * room) <= 1
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("width", [20, 80, 300])
def test_bars_stay_within_their_room_whatever_the_times(width: int) -> None:
    spans = (span("queue", "scheduler:0", -1.0, 5.0), span("stream", "edge:0", 0.99999, 3.0))
    late = Timeline("x", "/v1/x", 100.0, 0.0, end_s=101.0, spans=spans, num_lost_spans=2)
    lines = trace_lines(TraceReply(late, "edge:0", 200.0), width, bar="#")
    assert max(line.count("#") for line in lines) <= 80
    assert lines[-1] == "... and 2 more that were not kept"


def test_a_request_that_is_open_is_traced_up_to_now() -> None:
    open_one = Timeline("x", "/v1/x", 100.0, 0.0)
    lines = trace_lines(TraceReply(open_one, "edge:0", 103.0), 80)
    assert "outcome  still open after 3.00 s" in lines
    assert "answer   none yet" in lines
    assert lines[-1] == "nothing of it is known yet"


def test_a_trace_as_json_counts_from_the_arrival() -> None:
    whole = named_timeline(TraceReply(TIMELINE, "edge:0", 200.0))
    assert whole["label"] == "mine"
    assert whole["spans"][1] == {
        "name": "encode",
        "actor": "vit:0",
        "what": "2002c9b7",
        "begin_s": pytest.approx(0.1),
        "end_s": pytest.approx(0.3),
    }


# ---------------------------------------------------------------- the configuration

# what no option of a launch sets; a value that is not here has an option, and so an origin
NO_OPTION = {
    "server.private_socket",
    "server.max_media_mib",
    "server.media_fetch_timeout_s",
    "server.max_fetch_mib",
    "video.fetch_timeout_s",
    "video.max_file_frames",
    "video.max_frame_pixels",
    "video.max_total_pixels",
    "video.group_timeout_s",
    "video.open_mib",
    "scheduling.block_size",
    "memory.page_rows",
    "parallel.num_edges",
    "parallel.max_patches_per_batch",
    "supervision.heartbeat_s",
    "supervision.heartbeat_timeout_s",
    "supervision.step_timeout_s",
    "supervision.max_restarts",
    "supervision.restart_period_s",
}


def launch_options() -> set[str]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return {option.removeprefix("--") for action in parser._actions for option in action.option_strings}


def test_every_value_with_an_option_has_its_origin() -> None:
    options = launch_options()
    assert set(OPTIONS.values()) <= options
    rows = config_rows(config_values(make_config()), dict.fromkeys(options, "default"))
    assert set(OPTIONS) <= {row.name for row in rows}
    without = {row.name for row in rows if row.origin == BUILT_IN}
    assert without == NO_OPTION


def test_values_are_shown_with_where_they_come_from() -> None:
    origins = {"max-num-seqs": "environment VLMRT_MAX_NUM_SEQS", "port": "flag", "api-key-file": "file /etc/v.toml"}
    rows = config_rows(config_values(make_config()), origins)
    by_name = {row.name: row for row in rows}
    assert by_name["scheduling.max_num_seqs"].origin == "environment VLMRT_MAX_NUM_SEQS"
    assert by_name["server.port"].origin == "flag"
    assert by_name["server.api_keys"].origin == "file /etc/v.toml"
    lines = config_lines(rows)
    assert lines[0].split() == ["name", "value", "origin"]
    shown = {line.split()[0]: line.split()[1] for line in lines}
    assert (shown["scheduling.prefix_caching"], shown["memory.kv_cache_gib"]) == ("on", "none")
