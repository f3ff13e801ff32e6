"""What `vlmrt admin` prints for people, as lines.  Pure."""

from __future__ import annotations

from collections.abc import Sequence

from vlmrt.runtime.admin_messages import CachesReply, OpenRequestRow, RequestsReply, StatsReply
from vlmrt.runtime.questions import Tier
from vlmrt.runtime.service_stats import ActorStats, CacheStats, Latencies, ServiceStats
from vlmrt.tools.admin.figures import (
    aligned,
    bytes_text,
    count_text,
    plural,
    seconds_text,
    share_text,
    shortened,
)

LABEL_WIDTH = 36
Columns = tuple[str, ...]


def state_text(stats: ServiceStats) -> str:
    """ready, draining, or which actors are not up."""
    down = [f"{actor.actor} {actor.state}" for actor in stats.actors if actor.state != "ready"]
    if stats.draining:
        return "draining"
    return "ready" if stats.ready else f"not ready ({', '.join(down) or 'starting'})"


def stats_lines(reply: StatsReply) -> list[str]:
    stats = reply.stats
    requests, rates = stats.requests, stats.rates
    head = f"{reply.model} at {reply.url}, vlmrt {reply.version}, pid {reply.pid}, up {seconds_text(stats.uptime_s)}"
    facts = [
        ("state", state_text(stats)),
        (
            "requests",
            f"{requests.running} running, {requests.waiting} waiting; "
            f"{requests.succeeded:,} done, {requests.failed:,} failed, {requests.aborted:,} aborted",
        ),
        (
            f"last {rates.period_s:.0f} s",
            f"{count_text(rates.requests_per_s)} requests/s, {count_text(rates.prompt_tokens_per_s)} prompt tokens/s, "
            f"{count_text(rates.generation_tokens_per_s)} output tokens/s, {count_text(rates.images_per_s)} images/s",
        ),
        ("KV cache", cache_text(stats.prefix_cache, "prompt tokens")),
        ("images", cache_text(stats.embedding_cache, "images")),
    ]
    return [head, *aligned(facts, left=(0, 1)), "", *latency_lines(stats), "", *actor_lines(stats.actors)]


def cache_text(cache: CacheStats, unit: str) -> str:
    parts = [f"{share_text(cache.usage)} in use", f"{bytes_text(cache.num_bytes)} kept"]
    if cache.host_bytes:
        parts.append(f"{bytes_text(cache.host_bytes)} in host memory")
    if cache.queries:
        parts.append(f"{share_text(cache.hit_rate)} of {count_text(cache.queries)} {unit} found")
    return ", ".join(parts)


def latency_lines(stats: ServiceStats) -> list[str]:
    rows: list[Columns] = [("latency", "count", "mean", "p50", "p90", "p99")]
    periods = [(f"last {stats.recent.period_s:.0f} s", stats.recent), ("since the start", stats.total)]
    for name, latencies in periods:
        rows += [(f"{what}, {name}", *cells) for what, cells in latency_cells(latencies)]
    return aligned(rows)


def latency_cells(latencies: Latencies) -> list[tuple[str, Columns]]:
    """(what, (count, mean, p50, p90, p99)) of each."""
    named = [
        ("first token", latencies.time_to_first_token),
        ("between tokens", latencies.inter_token),
        ("whole request", latencies.end_to_end),
    ]
    return [
        (what, (count_text(of.count), *map(seconds_text, (of.mean_s, of.p50_s, of.p90_s, of.p99_s))))
        for what, of in named
    ]


def actor_lines(actors: Sequence[ActorStats]) -> list[str]:
    head = ("actor", "state", "pid", "device", "memory", "GPU memory", "heartbeat", "loop lag", "restarts", "mailbox")
    return aligned([head, *(actor_cells(actor) for actor in actors)], left=(0, 1, 3))


def actor_cells(actor: ActorStats) -> Columns:
    return (
        actor.actor,
        actor.state,
        str(actor.pid or "-"),
        actor.device,
        bytes_text(actor.resident_bytes),
        bytes_text(actor.device_bytes) if actor.device != "cpu" else "-",
        seconds_text(actor.heartbeat_age_s),
        seconds_text(actor.loop_lag_ms / 1000),
        str(actor.restarts),
        str(actor.mailbox_depth),
    )


REQUEST_COLUMNS = ("request", "state", "age", "prompt", "cached", "computed", "output", "images", "rows", "edge")


def requests_lines(reply: RequestsReply) -> list[str]:
    if not reply.rows:
        return ["no request is open"]
    lines = aligned([REQUEST_COLUMNS, *(request_cells(row) for row in reply.rows)], left=(0, 1, 9))
    if reply.num_open > len(reply.rows):
        lines.append(f"... and {reply.num_open - len(reply.rows)} more")
    return lines


def request_cells(row: OpenRequestRow) -> Columns:
    output = f"{row.num_output_tokens}/{row.max_tokens}" if row.max_tokens else "-"
    return (
        shortened(row.label, LABEL_WIDTH),
        row.state,
        seconds_text(row.age_s),
        count_text(row.num_prompt_tokens),
        count_text(row.num_cached_tokens),
        count_text(row.num_computed_tokens),
        output,
        str(row.num_images),
        count_text(row.num_rows),
        row.edge,
    )


def caches_lines(reply: CachesReply) -> list[str]:
    caches = reply.caches
    head = ("cache", "holds", "of", "in use", "size", "entries")
    prefix = aligned([head, *(_tier_cells(tier) for tier in caches.prefix)])
    rows = [_tier_cells(tier) for tier in caches.embedding]
    embedding = aligned([head, *rows]) if rows else ["no ViT is up"]
    names = f"{plural(caches.num_aliases, 'name')} under which clients may leave out an image's bytes"
    return ["prefixes, in blocks of keys and values", *prefix, "", "images, in pages of rows", *embedding, "", names]


def _tier_cells(tier: Tier) -> Columns:
    return (
        tier.name,
        f"{tier.num_cached:,}",
        f"{tier.num_units:,}",
        f"{tier.num_used:,}",
        bytes_text(tier.num_units * tier.unit_bytes),
        f"{tier.num_entries:,}",
    )
