"""What is always true of the scheduler's books: every block, slot, page, loan, reader and pixel is accounted for."""

from __future__ import annotations

from collections import Counter

from vlmrt.actors.scheduler.media_job import Stage
from vlmrt.actors.scheduler.request import Request, Status
from vlmrt.actors.scheduler.state import State
from vlmrt.runtime.messages import ActorName


def check_invariants(state: State) -> None:
    """Raise AssertionError unless all books agree with each other."""
    _check_queues(state)
    _check_blocks(state)
    _check_host_blocks(state)
    for request in state.planner.running:
        _check_running(state, request)
    _check_readers(state)
    _check_holds(state)
    _check_jobs(state)
    _check_slabs(state)


def check_nothing_is_held(state: State) -> None:
    """With no request left everything is free or cached."""
    check_invariants(state)
    assert not state.requests
    pool = state.planner.kv.pool
    assert pool.num_free == pool.num_blocks
    assert not list(state.planner.kv.host.pins())
    assert len(state.planner.slots.free) == state.limits.max_num_seqs
    assert not state.llm.in_flight
    assert not state.media.jobs
    assert not state.media.encoding
    assert not state.embeds.readers
    assert not state.embeds.holds
    assert not state.media.holders
    assert not any(state.lookups._found.values())
    for worker in state.media.workers.values():
        assert (worker.num_decoding, worker.num_bytes) == (0, 0)
    for slab in state.embeds.slabs.values():
        assert slab.books.num_loans == 0
        assert not slab.pinned
        assert slab.books.num_free + sum(len(entry.pages) for entry in slab.idle.values()) == slab.books.num_pages
        assert slab.num_ready_pages == slab.books.num_pages - slab.books.num_free
        assert slab.host.num_copy_pages == slab.host.books.num_pages - slab.host.books.num_free


def _check_queues(state: State) -> None:
    planner = state.planner
    for queue in (planner.waiting, planner.running):
        assert [r.key for r in queue] == sorted(r.key for r in queue)
    assert all(r.status is Status.WAITING for r in planner.waiting)
    assert all(r.status is Status.RUNNING for r in planner.running)
    assert {r.request_id for r in (*planner.waiting, *planner.running)} == set(state.requests)
    assert len(planner.waiting) + len(planner.running) == len(state.requests)
    slots = [*planner.slots.free, *(r.slot for r in planner.running)]
    assert sorted(slots) == list(range(state.limits.max_num_seqs)), "a slot is lost or taken twice"
    assert len(set(planner.slots.to_release)) == len(planner.slots.to_release)
    assert len(state.llm.in_flight) <= 2
    if not state.llm.is_up:
        assert not state.llm.in_flight
        assert not planner.running
    for request in planner.waiting:
        assert (request.num_computed_tokens, request.num_planned_tokens, request.num_pending_samples) == (0, 0, 0)
        assert not request.block_ids
        assert not request.host_block_ids
        assert (request.num_sent_blocks, request.num_found_tokens) == (0, 0)
        if request.awaits_media:
            unready = [h for h in request.wanted_media if state.embeds.ready_entry(h) is None]
            assert unready, f"{request.request_id} waits for media although all of it is there"


def _check_blocks(state: State) -> None:
    kv, running = state.planner.kv, state.planner.running
    references = Counter(block_id for r in running for block_id in r.block_ids)
    for block_id in range(kv.pool.num_blocks):
        assert kv.pool.num_references(block_id) == references[block_id]
        assert kv.pool.is_free(block_id) == (references[block_id] == 0)
    free = list(kv.pool.free_in_eviction_order())
    assert len(free) == len(set(free)) == kv.pool.num_free
    cached = [block_id for _, block_id in kv.items()]
    assert len(cached) == len(set(cached)), "two hashes for one block"
    assert not cached or state.prefix_caching


def _check_host_blocks(state: State) -> None:
    """Each in one place; pinned by the requests about to load it and the loads in flight, once by each."""
    host = state.planner.kv.host
    pins = Counter(host_block_id for request in state.planner.running for host_block_id in request.host_block_ids)
    pins.update(block for step in state.llm.in_flight for load in step.loads for block in load.host_block_ids)
    assert dict(host.pins()) == pins
    free, idle = list(host.free()), list(host.idle_in_eviction_order())
    assert sorted([*free, *idle, *pins]) == list(range(host.num_blocks)), "a host block is lost or in two places"
    kept = [host_block_id for _, host_block_id in host.items()]
    assert len(kept) == len(set(kept)) == len(host), "two hashes for one host block"
    assert set(idle) <= set(kept) <= {*idle, *pins}
    assert {block: block_hash for block_hash, block in host.items()} == host._hash_of
    assert not kept or state.prefix_caching
    assert not state.planner.kv._saves, "a save that waits for a plan although its block was given away"


def _check_running(state: State, request: Request) -> None:
    block_size = state.limits.block_size
    rows = [row for step in state.llm.in_flight for row in step.rows if row.request is request and row.is_current]
    loads = [load for step in state.llm.in_flight for load in step.loads if load.request is request]
    num_loading = sum(len(load.host_block_ids) for load in loads if load.is_current) * block_size
    num_in_rows = sum(row.num_tokens for row in rows)
    assert request.num_planned_tokens - request.num_computed_tokens == num_in_rows + num_loading
    num_to_load = len(request.host_block_ids) * block_size
    assert not num_to_load or request.num_planned_tokens + num_to_load == request.num_found_tokens
    assert request.num_found_tokens < len(request.token_ids)
    assert request.num_sent_blocks <= len(request.block_ids)
    assert request.num_sent_blocks == len(request.block_ids) or request.num_planned_tokens <= request.num_found_tokens
    assert request.num_pending_samples == sum(row.sample for row in rows)
    assert 0 <= request.num_computed_tokens <= request.num_planned_tokens
    assert request.num_planned_tokens <= len(request.token_ids) + request.num_pending_samples
    assert request.num_output_tokens + request.num_pending_samples <= request.max_tokens
    assert len(request.token_ids) + request.num_pending_samples <= state.limits.max_model_len
    assert len(set(request.block_ids)) == len(request.block_ids)
    assert len(request.block_ids) == -(-request.num_planned_tokens // block_size)
    assert request.num_inserted_blocks == request.num_computed_tokens // block_size
    behind = {item.mm_hash for item in request.media if item.start + item.num_tokens > request.num_covered_tokens}
    assert set(request.wanted_media) == behind


def _check_readers(state: State) -> None:
    readers = {
        (mm_hash, request_id): key
        for mm_hash, by_request in state.embeds.readers.items()
        for request_id, key in by_request.items()
    }
    wanted = {
        (mm_hash, request.request_id): key
        for request in state.requests.values()
        for mm_hash, key in request.wanted_media.items()
    }
    assert readers == wanted
    for mm_hash in state.embeds.readers:
        is_ready = state.embeds.ready_entry(mm_hash) is not None
        assert is_ready != (mm_hash in state.media.jobs), (
            f"{mm_hash} is wanted and neither ready nor on its way, or both"
        )


def _check_holds(state: State) -> None:
    by_lookups = [h for found in state.lookups._found.values() for mm_hashes in found.values() for h in mm_hashes]
    by_requests = [mm_hash for request in state.media.holders.values() for mm_hash in request.named_media]
    assert Counter(state.embeds.holds) == Counter([*by_lookups, *by_requests])
    assert set(state.lookups._found) <= set(state.edges)
    for request_id, request in state.media.holders.items():
        assert state.requests[request_id] is request


def _check_jobs(state: State) -> None:
    media = state.media
    num_decoding: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    for mm_hash, job in media.jobs.items():
        assert mm_hash == job.mm_hash
        is_held = mm_hash in state.embeds.holds
        assert mm_hash in state.embeds.readers or (job.is_at_vit and (job.is_cancelled or is_held))
        if job.stage in (Stage.NEEDED, Stage.DECODING):
            readers = [state.requests[request_id] for request_id in state.embeds.readers[mm_hash]]
            assert any(mm_hash not in request.named_media for request in readers), f"nobody can bring {mm_hash}"
        assert (mm_hash in media.decoding) == (job.stage is Stage.DECODING)
        assert (mm_hash in media.decoded) == (job.stage is Stage.DECODED)
        assert (mm_hash in media.kept) == (job.stage is Stage.KEPT)
        assert (media.encoding.get(job.encode_id) is job) == job.is_at_vit
        has_copy = state.embeds.host_slab(mm_hash) is not None
        assert has_copy == (job.stage in (Stage.KEPT, Stage.RESTORING)), f"{mm_hash} is {job.stage.value}"
        if job.stage is Stage.DECODING:
            assert job.asked in state.embeds.readers[mm_hash]
            assert mm_hash not in state.requests[job.asked].named_media
            assert job.worker is not None
            num_decoding[job.worker] += 1
        if job.stage is Stage.DECODED:
            assert job.pixels is not None
        if job.worker is not None:
            num_bytes[job.worker] += job.num_bytes
    assert set(media.retry_at_s) <= set(media.jobs)
    assert not media.failures
    for name, worker in media.workers.items():
        assert worker.num_decoding == num_decoding[name]
        assert worker.num_bytes == num_bytes[name]
    assert set(num_bytes) <= set(media.workers)


def _check_slabs(state: State) -> None:
    embeds = state.embeds
    for mm_hash, entry in embeds.entries.items():
        slab = embeds.slabs[entry.vit]
        assert (entry.mm_hash, entry.epoch) == (mm_hash, slab.epoch)
        if entry.is_ready:
            is_wanted = mm_hash in embeds.readers or mm_hash in embeds.holds
            assert (mm_hash in slab.pinned) == is_wanted
            assert (mm_hash in slab.idle) != is_wanted
        else:
            job = state.media.jobs[mm_hash]
            assert (job.is_at_vit, job.vit) == (True, entry.vit)
    in_flight = {(state.llm.epoch, step.plan.step) for step in state.llm.in_flight}
    for name, slab in embeds.slabs.items():
        slab.books.check()
        ours = [entry for entry in embeds.entries.values() if entry.vit == name]
        owned = {extent.pages for extent in slab.books._extents.values() if not extent.dropped}
        assert owned == {entry.pages for entry in ours}
        assert set(slab.books._loans) <= in_flight
        assert len(slab.pinned) + len(slab.idle) == sum(entry.is_ready for entry in ours)
        assert embeds.enabled or not slab.idle
        at_vit = [job for job in state.media.encoding.values() if job.vit == name]
        assert slab.num_encoding_patches == sum(job.num_patches for job in at_vit if job.stage is Stage.ENCODING)
        assert slab.num_ready_pages == sum(len(entry.pages) for entry in ours if entry.is_ready)
        _check_host_copies(state, name)


def _check_host_copies(state: State, vit: ActorName) -> None:
    embeds = state.embeds
    host = embeds.slabs[vit].host
    host.books.check()
    copies = list(host.pages.values())
    being_made = [entry.host_pages for entry in embeds.entries.values() if entry.vit == vit and entry.host_pages]
    assert sorted(extent.pages for extent in host.books._extents.values()) == sorted(copies + being_made)
    assert host.num_copy_pages == sum(len(pages) for pages in copies)
    assert embeds.enabled or not host.books.num_pages
    for mm_hash in host.pages:
        assert embeds.host_slab(mm_hash) is embeds.slabs[vit], f"{mm_hash} is kept twice"
        entry = embeds.entries.get(mm_hash)
        assert entry is None or (entry.vit, entry.host_pages) == (vit, ())
