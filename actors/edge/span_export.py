"""Ended timelines as OpenTelemetry spans: one tree per request, sent to a collector by a thread of its own.

Needs the extra `otel`.  What the queue has no room for, because the collector is slow or gone, is dropped: no request
waits for it.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.timeline import Span, Timeline

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

MAX_QUEUED_SPANS = 4096
MAX_BATCH_SPANS = 512
SEND_INTERVAL_S = 1.0
SEND_TIMEOUT_S = 5.0
TRACES_PATH = "/v1/traces"
GOOD_OUTCOMES = ("stop", "length", "tool_calls", "aborted")  # whoever gave up its request did not meet an error


def check_endpoint(endpoint: str) -> None:
    """Raises: StartupError where it is no URL of a collector, or the packages are missing."""
    try:
        parts = urlsplit(endpoint)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise StartupError(f"--otlp-endpoint {endpoint!r} is no http or https URL; one is http://127.0.0.1:4318")
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        raise StartupError(f"--otlp-endpoint needs the extra otel (pip install 'vlmrt[otel]'): {error}") from None


def collector_exporter(endpoint: str) -> SpanExporter:
    """What posts spans to a collector's base URL, by OTLP over HTTP.  OTEL_EXPORTER_OTLP_HEADERS may hold its key."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    url = endpoint.rstrip("/")
    if not url.endswith(TRACES_PATH):
        url += TRACES_PATH
    return OTLPSpanExporter(endpoint=url, timeout=SEND_TIMEOUT_S)


class TimelineExporter:
    """Makes spans of timelines and has them sent by `exporter`."""

    def __init__(self, exporter: SpanExporter, *, model: str, version: str, actor: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased

        self._model = model
        resource = Resource.create({"service.name": "vlmrt", "service.version": version, "service.instance.id": actor})
        self._provider: TracerProvider = TracerProvider(
            sampler=ParentBased(ALWAYS_ON),  # a client that does not sample its trace gets no spans here either
            resource=resource,
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=MAX_QUEUED_SPANS,
                schedule_delay_millis=SEND_INTERVAL_S * 1e3,
                max_export_batch_size=MAX_BATCH_SPANS,
                export_timeout_millis=SEND_TIMEOUT_S * 1e3,
            )
        )
        self._tracer = self._provider.get_tracer("vlmrt", version)

    def export(self, timeline: Timeline) -> None:
        """Queue the spans of a timeline that has ended."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        assert timeline.end_s is not None, "an open timeline"
        root = self._tracer.start_span(
            f"POST {timeline.path}",
            context=_parent(timeline.traceparent),
            kind=SpanKind.SERVER,
            attributes=_attributes(timeline, self._model),
            start_time=_unix_ns(timeline, timeline.arrived_s),
        )
        if root.is_recording():
            if timeline.first_token_s is not None:
                root.add_event("first_token", timestamp=_unix_ns(timeline, timeline.first_token_s))
            if timeline.outcome not in GOOD_OUTCOMES:
                root.set_status(Status(StatusCode.ERROR, timeline.outcome))
            context = set_span_in_context(root)
            for span in timeline.spans:
                child = self._tracer.start_span(
                    span.name, context, attributes=_of_span(span), start_time=_unix_ns(timeline, span.begin_s)
                )
                child.end(_unix_ns(timeline, span.end_s))
        root.end(_unix_ns(timeline, timeline.end_s))

    async def close(self, timeout_s: float) -> None:
        """Send what is queued, within timeout_s; what is left then is lost."""
        sending = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        sending.start()
        await asyncio.to_thread(sending.join, timeout_s)


def _parent(traceparent: str) -> Any:
    """The context of a W3C header; an empty one where there is none."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if not traceparent:
        return Context()
    return TraceContextTextMapPropagator().extract({"traceparent": traceparent}, Context())


def _unix_ns(timeline: Timeline, at_s: float) -> int:
    """A moment of the monotonic clock as nanoseconds since 1970."""
    return int((timeline.arrived_at_s + (at_s - timeline.arrived_s)) * 1e9)


def _attributes(timeline: Timeline, model: str) -> dict[str, str | int | float]:
    """The names are those of OpenTelemetry's conventions where it has any."""
    attributes: dict[str, str | int | float] = {
        "http.request.method": "POST",
        "http.route": timeline.path,
        "gen_ai.request.model": model,
        "gen_ai.usage.input_tokens": timeline.num_prompt_tokens,
        "gen_ai.usage.output_tokens": timeline.num_output_tokens,
        "vlmrt.request_id": timeline.label,
        "vlmrt.outcome": timeline.outcome,
        "vlmrt.cached_tokens": timeline.num_cached_tokens,
        "vlmrt.media": timeline.num_media,
        "vlmrt.max_inter_token_gap_s": timeline.max_gap_s,
    }
    if timeline.answer_id:
        attributes["gen_ai.response.id"] = timeline.answer_id
    if timeline.first_token_s is not None:
        attributes["vlmrt.time_to_first_token_s"] = timeline.first_token_s - timeline.arrived_s
    if timeline.num_lost_spans:
        attributes["vlmrt.lost_spans"] = timeline.num_lost_spans
    return attributes


def _of_span(span: Span) -> dict[str, str]:
    attributes = {"vlmrt.actor": span.actor}
    return {**attributes, "vlmrt.what": span.what} if span.what else attributes
