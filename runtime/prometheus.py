"""Metrics of all actors as the text that Prometheus reads, under our own names and, if asked for, under vLLM's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from vlmrt.runtime.control_messages import ActorStatus, Histogram, ServiceStatus
from vlmrt.runtime.metric_table import METRICS
from vlmrt.runtime.metrics import add_histograms, parse_series_key

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric as Family

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Compat(NamedTuple):
    """A metric of vLLM's: the sum of ours, over all actors."""

    sources: tuple[str, ...]
    help: str
    actor: str = ""  # of this one only


VLLM_METRICS: Mapping[str, Compat] = {  # without the prefix vllm:
    "num_requests_running": Compat(("requests_running",), "Requests in the running batch."),
    "num_requests_waiting": Compat(("requests_waiting",), "Requests that wait to be run."),
    "kv_cache_usage_perc": Compat(("kv_cache_usage_ratio",), "Share of the KV blocks in use, from 0 to 1."),
    "gpu_cache_usage_perc": Compat(("kv_cache_usage_ratio",), "As kv_cache_usage_perc, by its older name."),
    "prefix_cache_queries_total": Compat(("prefix_cache_queries_total",), "Prompt tokens looked up."),
    "prefix_cache_hits_total": Compat(("prefix_cache_hits_total",), "Prompt tokens found."),
    "gpu_prefix_cache_queries_total": Compat(("prefix_cache_queries_total",), "By its older name."),
    "gpu_prefix_cache_hits_total": Compat(("prefix_cache_hits_total",), "By its older name."),
    "mm_cache_queries_total": Compat(("embedding_cache_queries_total",), "Images looked up."),
    "mm_cache_hits_total": Compat(
        ("embedding_cache_hits_total", "embedding_cache_host_hits_total"), "Images found, in either memory."
    ),
    "num_preemptions_total": Compat(("preemptions_total",), "Requests preempted."),
    "prompt_tokens_total": Compat(("prompt_tokens_total",), "Prompt tokens of admitted requests."),
    "generation_tokens_total": Compat(("generation_tokens_total",), "Tokens generated."),
    "request_success_total": Compat(
        ("request_success_total", "requests_aborted_total"), "Choices that ended, by finished_reason: also abort."
    ),
    "iteration_tokens_total": Compat(("step_tokens",), "Tokens of one step.", "llm:0"),
    "request_params_n": Compat(("request_params_n",), "Choices asked for."),
    "request_params_max_tokens": Compat(("request_params_max_tokens",), "Tokens a choice may have."),
    "request_prompt_tokens": Compat(("request_prompt_tokens",), "Prompt tokens of a request."),
    "request_generation_tokens": Compat(("request_generation_tokens",), "Tokens of a choice."),
    "request_max_num_generation_tokens": Compat(
        ("request_max_num_generation_tokens",), "Tokens of a request's longest choice."
    ),
    "time_to_first_token_seconds": Compat(("time_to_first_token_seconds",), "From arrival to the first token."),
    "inter_token_latency_seconds": Compat(("inter_token_latency_seconds",), "Between two tokens."),
    "time_per_output_token_seconds": Compat(("inter_token_latency_seconds",), "As inter_token_latency, older name."),
    "request_time_per_output_token_seconds": Compat(
        ("request_time_per_output_token_seconds",), "Between two tokens, on average over a choice."
    ),
    "e2e_request_latency_seconds": Compat(("e2e_request_latency_seconds",), "From arrival to the end."),
    "request_queue_time_seconds": Compat(("request_queue_time_seconds",), "Until the first step."),
    "request_prefill_time_seconds": Compat(("request_prefill_time_seconds",), "From there to the first token."),
    "request_decode_time_seconds": Compat(("request_decode_time_seconds",), "From the first token to the last."),
}
_FINISHED = {"tool_calls": "stop"}  # reasons that vLLM's metric does not have


class _Sample(NamedTuple):
    actor: str
    name: str  # in METRICS
    labels: dict[str, str]
    value: float | Histogram


def prometheus_text(status: ServiceStatus, vllm_model: str | None = None) -> bytes:
    """Every actor's totals in the Prometheus text format, names prefixed `vlmrt_`, with a label `actor`.

    Args: vllm_model: the same figures follow under vLLM's names, with this `model_name`.
    """
    from prometheus_client.exposition import generate_latest

    samples = [sample for sample in _samples(status) if sample.name in METRICS]  # valid whatever an actor sent
    families = list(_families(samples))
    if vllm_model is not None:
        families += _vllm_families(samples, vllm_model)
    return bytes(generate_latest(_Collected(families)))


class _Collected:
    """What prometheus_client calls a registry."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        return self._families


def _families(samples: Iterable[_Sample]) -> Iterable[Family]:
    families: dict[str, Family] = {}
    for sample in samples:
        metric = METRICS[sample.name]
        name = f"vlmrt_{sample.name}"
        family = families.get(name)
        if family is None:
            family = families[name] = _family(name, metric.help, metric.kind)
        _fill(family, name, {"actor": sample.actor, **sample.labels}, sample.value)
    return families.values()


def _vllm_families(samples: Iterable[_Sample], model: str) -> Iterator[Family]:
    for name, compat in VLLM_METRICS.items():
        values: dict[tuple[tuple[str, str], ...], float | Histogram] = {}
        for sample in samples:
            if sample.name in compat.sources and compat.actor in ("", sample.actor):
                labels = tuple(_vllm_labels(sample).items())
                values[labels] = _add(values.get(labels), sample.value)
        family = _family(f"vllm:{name}", compat.help, METRICS[compat.sources[0]].kind)
        for labels, value in values.items():
            _fill(family, f"vllm:{name}", {"model_name": model, "engine": "0", **dict(labels)}, value)
        yield family


def _vllm_labels(sample: _Sample) -> dict[str, str]:
    if sample.name == "requests_aborted_total":
        return {"finished_reason": "abort"}
    return {name: _FINISHED.get(value, value) for name, value in sample.labels.items()}


def _add(before: float | Histogram | None, value: float | Histogram) -> float | Histogram:
    if isinstance(value, Histogram):
        assert before is None or isinstance(before, Histogram)
        return add_histograms(before, value)
    assert before is None or not isinstance(before, Histogram)
    return value + (before or 0.0)


def _family(name: str, help: str, kind: str) -> Family:
    from prometheus_client.metrics_core import Metric as Family

    return Family(name.removesuffix("_total") if kind == "counter" else name, help, kind)


def _fill(family: Family, name: str, labels: dict[str, str], value: float | Histogram) -> None:
    if isinstance(value, Histogram):
        for bound, count in _cumulative(value):
            family.add_sample(f"{name}_bucket", {**labels, "le": bound}, count)
        family.add_sample(f"{name}_sum", labels, value.total)
        family.add_sample(f"{name}_count", labels, sum(value.counts))
    else:
        family.add_sample(name, labels, value)


def _samples(status: ServiceStatus) -> Iterator[_Sample]:
    for actor in status.actors:
        for name, value in _actor_samples(actor):
            yield _Sample(actor.actor, name, {}, value)
    for actor_name, snapshot in status.metrics.items():
        series: dict[str, float | Histogram] = {**snapshot.counters, **snapshot.gauges, **snapshot.histograms}
        for key, figure in series.items():
            yield _Sample(actor_name, *parse_series_key(key), figure)


def _actor_samples(actor: ActorStatus) -> Iterator[tuple[str, float]]:
    yield "actor_up", float(actor.state == "ready")
    yield "actor_restarts_total", float(actor.num_restarts)
    yield "heartbeat_age_seconds", actor.heartbeat_age_s
    yield "loop_lag_seconds", actor.loop_lag_ms / 1e3


def _cumulative(histogram: Histogram) -> Iterator[tuple[str, float]]:
    running = 0
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        running += count
        yield ("+Inf" if bound == float("inf") else repr(float(bound))), running
