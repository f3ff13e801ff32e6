"""The scheduler's books as whoever operates the service sees them.  Reads State and changes nothing."""

from __future__ import annotations

from itertools import chain, islice

from vlmrt.actors.scheduler.embed_cache import Slab
from vlmrt.actors.scheduler.request import Request, Status
from vlmrt.actors.scheduler.state import State
from vlmrt.runtime.questions import MAX_ROWS, CachesShown, RequestRow, RequestsOpen, Tier


def requests_open(state: State) -> RequestsOpen:
    """Running requests, then waiting ones, each in the order in which they run."""
    in_order = chain(state.planner.running, state.planner.waiting)
    return RequestsOpen(tuple(_row(request) for request in islice(in_order, MAX_ROWS)), len(state.requests))


def caches_shown(state: State) -> CachesShown:
    kv, block_bytes = state.planner.kv, state.llm.block_bytes
    pool, host = kv.pool, kv.host
    prefix = [Tier("kv", pool.num_blocks, pool.num_blocks - pool.num_free, len(kv), block_bytes, len(kv))]
    if host.num_blocks:
        num_pinned = sum(1 for _ in host.pins())
        prefix.append(Tier("kv host", host.num_blocks, num_pinned, len(host), block_bytes, len(host)))
    embedding = [tier for slab in state.embeds.slabs.values() for tier in _tiers(slab, state)]
    return CachesShown(tuple(prefix), tuple(embedding), len(state.aliases))


def _tiers(slab: Slab, state: State) -> list[Tier]:
    entries = [entry for entry in state.embeds.entries.values() if entry.vit == slab.vit and entry.is_ready]
    num_idle_pages = sum(len(entry.pages) for entry in slab.idle.values())
    tiers = [
        Tier(
            name=slab.vit,
            num_units=slab.books.num_pages,
            num_used=slab.books.num_pages - slab.books.num_free - num_idle_pages,
            num_cached=slab.num_ready_pages,
            unit_bytes=slab.page_bytes,
            num_entries=len(entries),
        )
    ]
    host = slab.host
    if host.books.num_pages:
        num_making = host.books.num_pages - host.books.num_free - host.num_copy_pages
        tiers.append(
            Tier(
                name=f"{slab.vit} host",
                num_units=host.books.num_pages,
                num_used=num_making,
                num_cached=host.num_copy_pages,
                unit_bytes=slab.page_bytes,
                num_entries=len(host.pages),
            )
        )
    return tiers


def _row(request: Request) -> RequestRow:
    return RequestRow(
        request_id=request.request_id,
        status="running" if request.status is Status.RUNNING else "waiting",
        num_prompt_tokens=request.num_prompt_tokens,
        num_computed_tokens=request.num_computed_tokens,
        num_cached_tokens=request.num_cached_tokens or 0,
        num_output_tokens=request.num_output_tokens,
        max_tokens=request.max_tokens,
        num_images=len(request.media),
        num_rows=sum(item.num_tokens for item in request.media),
        num_wanted=len(request.wanted_media),
        priority=request.key[0],
    )
