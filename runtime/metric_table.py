"""The table of all metrics: what each is, whose it is and what its labels are.  docs/metrics.md shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

MetricKind = Literal["counter", "gauge", "histogram"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 32768.0)
IMAGE_COUNTS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)
CHOICE_COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0)

EVERY = ("edge", "media", "scheduler", "vit", "llm")


class Metric(NamedTuple):
    kind: MetricKind
    actors: tuple[str, ...]  # kinds of actor that have it
    help: str
    bounds: tuple[float, ...] = ()  # of a histogram
    labels: tuple[str, ...] = ()  # in order of the alphabet; beside `actor`, which every metric has


def _counter(actor: str, help: str, *labels: str) -> Metric:
    return Metric("counter", (actor,), help, (), labels)


def _gauge(actor: str, help: str, *labels: str) -> Metric:
    return Metric("gauge", (actor,), help, (), labels)


def _seconds(actor: str, help: str) -> Metric:
    return Metric("histogram", (actor,), help, SECONDS)


def _counts(actor: str, help: str, bounds: tuple[float, ...] = TOKEN_COUNTS) -> Metric:
    return Metric("histogram", (actor,), help, bounds)


_REQUESTS = {
    "requests_preparing": _gauge("edge", "Requests whose body, media or prompt is not there yet."),
    "requests_waiting": _gauge("scheduler", "Accepted requests that are not running yet."),
    "requests_running": _gauge("scheduler", "Requests in a slot of the running batch."),
    "request_success_total": _counter("edge", "Choices that ended well.", "finished_reason"),
    "request_errors_total": _counter("edge", "Requests that ended with an error, by its code.", "code"),
    "requests_aborted_total": _counter("edge", "Requests given up by their client."),
    "http_requests_total": _counter("edge", "HTTP requests answered, by status.", "code"),
    "prompt_tokens_total": _counter("scheduler", "Prompt tokens of admitted requests."),
    "generation_tokens_total": _counter("scheduler", "Tokens generated and sent."),
    "preemptions_total": _counter("scheduler", "Running requests put back to waiting for want of KV blocks."),
    "recomputations_total": _counter("scheduler", "Requests resumed by recomputation after the LLM group was lost."),
    "request_params_n": _counts("edge", "Choices that a request asks for.", CHOICE_COUNTS),
    "request_params_max_tokens": _counts("edge", "Tokens that a choice may have at most."),
    "request_prompt_tokens": _counts("edge", "Prompt tokens of a request that was answered."),
    "request_generation_tokens": _counts("edge", "Tokens of a choice that ended well."),
    "request_max_num_generation_tokens": _counts("edge", "Tokens of the longest choice of an answered request."),
}

_LATENCIES = {
    "time_to_first_token_seconds": _seconds("edge", "From a request's arrival to its first token."),
    "inter_token_latency_seconds": _seconds("edge", "Between two tokens of one choice."),
    "max_inter_token_gap_seconds": _seconds("edge", "The longest time between two tokens of a request."),
    "request_time_per_output_token_seconds": _seconds("edge", "Between two tokens of one choice, on average over it."),
    "e2e_request_latency_seconds": _seconds("edge", "From a request's arrival to its end."),
    "prompt_seconds": _seconds("edge", "Chat template and tokenizer, for the prompt of a request."),
    "grammar_seconds": _seconds("edge", "Compiling the grammar that an answer has to follow."),
    "request_queue_time_seconds": _seconds(
        "edge", "From the scheduler's hearing of a request to the first step that works for it."
    ),
    "request_prefill_time_seconds": _seconds("edge", "From the first step for a request to its first token."),
    "request_decode_time_seconds": _seconds("edge", "From the first token of a choice to its last."),
}

_MEDIA = {
    "media_fetch_seconds": _seconds("edge", "Getting the bytes of one image or clip."),
    "media_hash_seconds": _seconds("edge", "Hashing an image and reading its header, or looking into a clip."),
    "media_bytes_in_flight": _gauge("edge", "Encoded bytes of bodies and media held for open requests."),
    "decode_wait_seconds": _seconds(
        "edge", "From the scheduler's hearing of a request to the start of its image's decoding."
    ),
    "decode_image_seconds": _seconds("media", "Decoding and resizing one image."),
    "decode_frames_seconds": _seconds("media", "Decoding and resizing one temporal group of a clip."),
    "resize_frames_seconds": _seconds("media", "Of decode_frames_seconds, what resizing took."),
    "encode_wait_seconds": _seconds("edge", "From an image's pixels to its forward in the vision tower."),
    "encode_seconds": _seconds("vit", "One forward of the vision tower."),
    "restore_seconds": _seconds("edge", "Copying the rows of an image back from host memory."),
    "hand_off_seconds": _seconds("edge", "From an image's rows to the step of the language model that reads them."),
    "media_wait_seconds": _seconds(
        "edge", "From the scheduler's hearing of a request to the rows of the last image it waited for."
    ),
    "images_decoded_total": _counter("media", "Images decoded and resized."),
    "images_encoded_total": _counter("vit", "Images, and groups of clips, that went through the vision tower."),
    "vit_batch_images": _counts("vit", "Images in one forward of the vision tower.", IMAGE_COUNTS),
    "pixel_arena_bytes": _gauge("media", "Bytes of the pixel arena in use."),
    "videos_total": _counter("edge", "Clips in the prompts of requests."),
    "video_probes_total": _counter("edge", "Clips that a media worker was asked about, as none knew them."),
    "frames_decoded_total": _counter(
        "media", "Frames of clips decoded and resized, by the library that read them.", "reader"
    ),
}

_CACHES = {
    "kv_cache_usage_ratio": _gauge("scheduler", "Share of the KV blocks that hold data of running requests."),
    "prefix_cache_queries_total": _counter("scheduler", "Prompt tokens looked up in the KV prefix cache."),
    "prefix_cache_hits_total": _counter("scheduler", "Prompt tokens found in the KV prefix cache, in either memory."),
    "prefix_cache_evictions_total": _counter("scheduler", "Blocks evicted from the KV prefix cache."),
    "prefix_cache_bytes": _gauge("scheduler", "Bytes of KV blocks whose content can be found, on all ranks."),
    "prefix_cache_host_hits_total": _counter("scheduler", "Prompt tokens found in the KV prefix cache's host memory."),
    "prefix_cache_host_evictions_total": _counter(
        "scheduler", "Blocks evicted from the KV prefix cache's host memory."
    ),
    "prefix_cache_host_bytes": _gauge("scheduler", "Bytes of KV blocks kept in host memory, by all ranks."),
    "embedding_cache_usage_ratio": _gauge("scheduler", "Share of the embedding pages in use."),
    "embedding_cache_queries_total": _counter("scheduler", "Images looked up in the embedding cache."),
    "embedding_cache_hits_total": _counter("scheduler", "Images found in the embedding cache."),
    "embedding_cache_evictions_total": _counter("scheduler", "Images evicted from the embedding cache."),
    "embedding_cache_bytes": _gauge("scheduler", "Bytes of image rows in the embedding cache."),
    "embedding_cache_host_hits_total": _counter("scheduler", "Images found only in the embedding cache's host memory."),
    "embedding_cache_host_evictions_total": _counter(
        "scheduler", "Images evicted from the embedding cache's host memory."
    ),
    "embedding_cache_host_bytes": _gauge("scheduler", "Bytes of image rows in the embedding cache's host memory."),
    "media_aliases": _gauge("scheduler", "Names under which clients may leave out an image's bytes."),
    "media_lookups_total": _counter("scheduler", "Images looked up by name, without their bytes."),
    "media_lookup_hits_total": _counter("scheduler", "Images found by name."),
}

_ACTORS = {
    "step_seconds": _seconds("llm", "One step of the language model, on each rank."),
    "step_tokens": _counts("llm", "Tokens in one step of the language model, on each rank."),
    "server_info": _gauge("edge", "1; the labels say what is served.", "device", "model", "version"),
    "actor_up": Metric("gauge", EVERY, "1 if the actor is ready, 0 if not."),
    "actor_restarts_total": Metric("counter", EVERY, "Restarts of the actor since the service started."),
    "heartbeat_age_seconds": Metric("gauge", EVERY, "Time since the actor's last heartbeat."),
    "loop_lag_seconds": Metric("gauge", EVERY, "How late the actor's event loop ran its last heartbeat."),
    "process_cpu_seconds_total": Metric("counter", EVERY, "CPU time of the actor's process."),
    "resident_memory_bytes": Metric("gauge", EVERY, "Host memory of the actor's process that is in use."),
    "device_memory_bytes": Metric("gauge", ("vit", "llm"), "Device memory that the actor's process holds."),
    "mailbox_depth": Metric("gauge", EVERY, "Messages waiting in the actor's mailbox."),
    "mailbox_age_seconds": Metric("gauge", EVERY, "How long the next message in the actor's mailbox has waited."),
    "stale_messages_total": Metric("counter", EVERY, "Messages of dead incarnations, dropped."),
    "unsent_messages_total": Metric("counter", EVERY, "Messages not sent because the peer was not up."),
    "bad_frames_total": Metric("counter", EVERY, "Frames that were no message, dropped."),
}

# what the supervisor knows of an actor, and not the actor itself
OF_STATUS = (
    "actor_up",
    "actor_restarts_total",
    "heartbeat_age_seconds",
    "loop_lag_seconds",
)

METRICS: Mapping[str, Metric] = {**_REQUESTS, **_LATENCIES, **_MEDIA, **_CACHES, **_ACTORS}
