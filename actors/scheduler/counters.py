"""What the scheduler counts; the actor copies it into its metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Cumulative since the start of this incarnation."""

    requests: int = 0
    requests_refused: int = 0
    requests_stopped: int = 0  # finish_reason "stop"
    requests_cut: int = 0  # finish_reason "length"
    requests_failed: int = 0
    requests_aborted: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    prompt_tokens_cached: int = 0  # not computed at the first admission
    prompt_tokens_host_cached: int = 0  # those of them that came from host memory
    block_evictions: int = 0
    host_block_evictions: int = 0
    output_tokens: int = 0
    discarded_tokens: int = 0  # of steps planned past an end, or before a preemption
    preemptions: int = 0
    recoveries: int = 0  # requests begun again on a new TP group
    embed_hits: int = 0
    embed_host_hits: int = 0  # not in a slab, but in a ViT's host memory
    embed_misses: int = 0  # in neither
    media_lookups: int = 0
    media_lookup_hits: int = 0
    embed_displacements: int = 0  # rows taken from a request by a more urgent one
    encodes: int = 0
    unwanted_pixels: int = 0
    dropped_pixels: int = 0
    ignored_messages: int = 0
