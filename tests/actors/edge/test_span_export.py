"""Spans of requests: the tree made of a timeline, whose trace it joins, and that nobody waits for a collector."""

from __future__ import annotations

import asyncio
import gzip
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.actors.edge.running import MODEL, edge_config, http, running_edge
from vlmrt.actors.edge import span_export
from vlmrt.actors.edge.span_export import TimelineExporter, check_endpoint, collector_exporter
from vlmrt.runtime.config import ServerOptions
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.timeline import Span, Timeline

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HELLO = [{"role": "user", "content": "Hello"}]


def timeline(**fields: object) -> Timeline:
    """Of a request that arrived 100 s after the monotonic clock's 0, which was 1,000 s after 1970."""
    spans = (
        Span("prompt", "edge:0", 100.0, 100.25),
        Span("encode", "vit:0", 100.5, 101.0, "abcd"),
        Span("prefill", "llm:0", 101.0, 101.5),
    )
    known: dict[str, object] = {
        "answer_id": "chatcmpl-1",
        "end_s": 103.0,
        "outcome": "stop",
        "first_token_s": 101.5,
        "num_prompt_tokens": 20,
        "num_output_tokens": 7,
        "spans": spans,
    }
    return Timeline("mine", "/v1/chat/completions", 100.0, 1100.0, **{**known, **fields})  # type: ignore[arg-type]


class Exported(NamedTuple):
    exporter: TimelineExporter
    memory: InMemorySpanExporter

    def spans_of(self, timeline: Timeline) -> tuple[ReadableSpan, ...]:
        self.exporter.export(timeline)
        self.exporter._provider.force_flush()
        return self.memory.get_finished_spans()


@pytest.fixture
def exported() -> Iterator[Exported]:
    memory = InMemorySpanExporter()
    exporter = TimelineExporter(memory, model="a-model", version="1.2", actor="edge:0")
    yield Exported(exporter, memory)
    exporter._provider.shutdown()


def test_a_request_is_a_root_with_its_timeline_as_children(exported: Exported) -> None:
    *children, root = exported.spans_of(timeline())
    assert (root.name, root.kind, root.parent) == ("POST /v1/chat/completions", SpanKind.SERVER, None)
    assert (root.start_time, root.end_time) == (1100_000_000_000, 1103_000_000_000)
    assert root.attributes is not None
    assert root.attributes["gen_ai.request.model"] == "a-model"
    assert root.attributes["gen_ai.response.id"] == "chatcmpl-1"
    assert root.attributes["gen_ai.usage.output_tokens"] == 7
    assert root.attributes["vlmrt.request_id"] == "mine"
    assert root.attributes["vlmrt.time_to_first_token_s"] == 1.5
    assert [(event.name, event.timestamp) for event in root.events] == [("first_token", 1101_500_000_000)]
    assert root.resource.attributes["service.version"] == "1.2"
    assert root.resource.attributes["service.instance.id"] == "edge:0"
    assert root.status.status_code is StatusCode.UNSET
    assert [child.name for child in children] == ["prompt", "encode", "prefill"]
    for child in children:
        assert child.parent is not None
        assert child.context is not None
        assert root.context is not None
        assert (child.parent.span_id, child.context.trace_id) == (root.context.span_id, root.context.trace_id)
    encode = children[1]
    assert (encode.start_time, encode.end_time) == (1100_500_000_000, 1101_000_000_000)
    assert encode.attributes == {"vlmrt.actor": "vit:0", "vlmrt.what": "abcd"}


def test_a_request_joins_the_trace_that_its_client_names(exported: Exported) -> None:
    root = exported.spans_of(timeline(traceparent=f"00-{TRACE}-{PARENT}-01"))[-1]
    assert root.parent is not None
    assert root.context is not None
    assert format(root.context.trace_id, "032x") == format(root.parent.trace_id, "032x") == TRACE
    assert format(root.parent.span_id, "016x") == PARENT


def test_a_trace_that_its_client_does_not_sample_has_no_spans(exported: Exported) -> None:
    assert exported.spans_of(timeline(traceparent=f"00-{TRACE}-{PARENT}-00")) == ()


@pytest.mark.parametrize(("outcome", "status"), [("out_of_memory", "ERROR"), ("aborted", "UNSET"), ("length", "UNSET")])
def test_errors_and_nothing_else_are_errors(outcome: str, status: str, exported: Exported) -> None:
    root = exported.spans_of(timeline(outcome=outcome, first_token_s=None))[-1]
    assert root.status.status_code.name == status
    assert root.events == ()


# ---------------------------------------------------------------- on the way to a collector


class Collector:
    """What a collector does with POST /v1/traces: takes spans, or lets them wait."""

    def __init__(self) -> None:
        self.spans: asyncio.Queue[dict[str, str]] = asyncio.Queue()  # name -> trace id, of each request
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.url = ""

    async def post(self, request: web.Request) -> web.Response:
        self.asked.set()
        await self.may_answer.wait()
        body = await request.read()
        if request.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        sent = ExportTraceServiceRequest.FromString(body)
        spans = [span for by in sent.resource_spans for scope in by.scope_spans for span in scope.spans]
        self.spans.put_nowait({span.name: span.trace_id.hex() for span in spans})
        return web.Response(body=b"", content_type="application/x-protobuf")


@asynccontextmanager
async def collector() -> AsyncIterator[Collector]:
    found = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", found.post)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield found
    finally:
        found.may_answer.set()
        await runner.cleanup()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans go out as they come."""
    monkeypatch.setattr(span_export, "SEND_INTERVAL_S", 0.01)


@pytest.mark.usefixtures("at_once")
async def test_a_running_edge_sends_its_requests_to_the_collector(checkpoint: Path, tmp_path: Path) -> None:
    async with collector() as found:
        config = edge_config(checkpoint, server=ServerOptions(otlp_endpoint=found.url))
        async with running_edge(config, tmp_path) as edge, edge.answering("Hi"), http() as session:
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            url, body = f"{edge.url}/v1/chat/completions", {"messages": HELLO, "model": MODEL}
            async with session.post(url, json=body, headers=headers) as response:
                assert response.status == 200
            async with asyncio.timeout(20):
                names: dict[str, str] = {}
                while "POST /v1/chat/completions" not in names:
                    names |= await found.spans.get()
    assert {"receive", "prompt"} <= names.keys()
    assert set(names.values()) == {TRACE}


@pytest.mark.usefixtures("at_once")
async def test_requests_go_on_while_the_collector_does_not_answer(checkpoint: Path, tmp_path: Path) -> None:
    async with collector() as found:
        found.may_answer.clear()
        config = edge_config(checkpoint, server=ServerOptions(otlp_endpoint=found.url))
        async with running_edge(config, tmp_path) as edge, edge.answering("Hi"), http() as session:
            for number in range(3):
                async with session.post(f"{edge.url}/v1/chat/completions", json={"messages": HELLO}) as response:
                    assert response.status == 200
                if not number:
                    async with asyncio.timeout(20):
                        await found.asked.wait()  # from here on the sender is stuck
            found.may_answer.set()


async def test_a_shutdown_sends_what_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_export, "SEND_INTERVAL_S", 3600.0)
    async with collector() as found:
        exporter = TimelineExporter(collector_exporter(found.url), model="m", version="1", actor="edge:0")
        exporter.export(timeline())
        await exporter.close(20.0)
        assert "prefill" in found.spans.get_nowait()


async def test_a_shutdown_waits_no_longer_than_it_may() -> None:
    async with collector() as found:
        found.may_answer.clear()
        exporter = TimelineExporter(collector_exporter(found.url), model="m", version="1", actor="edge:0")
        exporter.export(timeline())
        await exporter.close(0.01)
        assert found.spans.empty()
        found.may_answer.set()
        async with asyncio.timeout(20):
            assert "prefill" in await found.spans.get()  # the thread ends before the collector does


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "ftp://host", "http://", "http://host:0", "http://host:x"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(StartupError, match=r"is no http or https URL; one is http://127.0.0.1:4318"):
        check_endpoint(endpoint)


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(StartupError) as refused:
        check_endpoint("http://127.0.0.1:4318")
    assert "pip install 'vlmrt[otel]'" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_collectors_url_may_name_the_path_of_traces() -> None:
    for url in ("http://host:4318", "http://host:4318/", "http://host:4318/v1/traces"):
        exporter = collector_exporter(url)
        assert getattr(exporter, "_endpoint") == "http://host:4318/v1/traces"  # noqa: B009  it is not public
        exporter.shutdown()
