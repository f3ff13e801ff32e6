"""Random lives of a whole service: every request ends once, with the tokens it would have got alone."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.actors.scheduler.fakes import IMAGE_TOKEN, stop_rule
from tests.actors.scheduler.world import Sizes, World, clip_items, run_world
from vlmrt.runtime.messages import ActorName, RequestId, Sampling, Submit

NUM_WORLDS = 40
NUM_WORLDS_SOAK = 2000

any_sizes = st.builds(
    Sizes,
    num_blocks=st.sampled_from((12, 18, 24, 60)),
    num_host_blocks=st.sampled_from((0, 1, 3, 8, 40)),
    max_loads=st.sampled_from((1, 2, 64)),
    block_size=st.sampled_from((1, 3, 4)),
    num_pages=st.sampled_from((5, 7, 8, 16)),
    num_host_pages=st.sampled_from((0, 2, 6, 12, 40)),
    arena_bytes=st.sampled_from((6_000, 12_000, 30_000, 100_000)),
    max_num_seqs=st.sampled_from((1, 2, 4, 8)),
    max_waiting=st.sampled_from((0, 5, 20)),
    max_num_batched_tokens=st.sampled_from((4, 8, 12, 40)),
    itl_target_ms=st.sampled_from((None, 0.5, 3.0)),
    tp=st.sampled_from((1, 2)),
    num_vits=st.sampled_from((1, 2)),
    num_media=st.sampled_from((1, 2)),
    num_edges=st.sampled_from((1, 2)),
    prefix_caching=st.booleans(),
    embedding_caching=st.booleans(),
    by_name=st.sampled_from((0.0, 0.2, 0.7)),
    clips=st.sampled_from((0.0, 0.5)),
    no_memory=st.sampled_from((0.0, 0.01, 0.1)),
    no_restore=st.sampled_from((0.0, 0.1)),
)
seeds = st.integers(0, 2**32)
unhurried = {"deadline": None, "suppress_health_check": (HealthCheck.too_slow,), "database": None}


@settings(max_examples=NUM_WORLDS, **unhurried)  # type: ignore[arg-type]
@given(any_sizes, seeds, st.booleans(), st.booleans())
def test_every_request_ends_once_with_the_tokens_it_would_have_got_alone(
    sizes: Sizes, seed: int, deaths: bool, aborts: bool
) -> None:
    run_world(sizes, seed, 40, deaths=deaths, aborts=aborts)


host_memory_sizes = st.builds(
    Sizes,
    num_blocks=st.sampled_from((20, 30, 40)),
    num_host_blocks=st.sampled_from((6, 25, 200)),
    max_loads=st.sampled_from((1, 2)),
    block_size=st.sampled_from((1, 2)),
    num_pages=st.sampled_from((8, 16)),
    max_num_seqs=st.sampled_from((2, 4)),
    max_num_batched_tokens=st.sampled_from((12, 40)),
    max_model_len=st.just(40),
    tp=st.sampled_from((1, 2)),
)


@settings(max_examples=NUM_WORLDS // 2, **unhurried)  # type: ignore[arg-type]
@given(host_memory_sizes, seeds, st.booleans())
def test_requests_that_mostly_load_from_host_memory_get_the_tokens_they_would_have_got_alone(
    sizes: Sizes, seed: int, disturbed: bool
) -> None:
    run_world(sizes, seed, 60, deaths=disturbed, aborts=disturbed)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@settings(max_examples=NUM_WORLDS_SOAK, **unhurried)  # type: ignore[arg-type]
@given(any_sizes, seeds, st.booleans(), st.booleans())
def test_every_request_of_thousands_of_services_ends_once_with_its_tokens(
    sizes: Sizes, seed: int, deaths: bool, aborts: bool
) -> None:
    run_world(sizes, seed, 80, deaths=deaths, aborts=aborts)


def test_caches_do_not_change_what_is_generated() -> None:
    sizes = Sizes(max_waiting=100, num_blocks=60)
    variants = [
        dataclasses.replace(sizes, prefix_caching=prefix, embedding_caching=embedding, num_host_pages=num_host_pages)
        for prefix in (False, True)
        for embedding, num_host_pages in ((False, 0), (True, 0), (True, 30))
    ]
    with_host_memory = dataclasses.replace(sizes, num_blocks=24, num_host_blocks=200)
    worlds = [run_world(sizes, 7, 60, deaths=False, aborts=False) for sizes in (with_host_memory, *variants)]
    ends = [{name: (c.token_ids, c.finish_reason, c.error) for name, c in w.clients.items()} for w in worlds]
    assert all(end == ends[0] for end in ends)
    assert len(ends[0]) == 60
    with_host, without, with_slab, with_copies = worlds[:4]
    with_both = worlds[5]
    assert num_encoded(with_copies) < num_encoded(with_slab) < num_encoded(without)
    assert num_encoded(with_both) < num_encoded(without)
    assert without.state.counters.prompt_tokens_cached == 0
    assert with_both.state.counters.prompt_tokens_cached > 100
    assert with_host.state.counters.prompt_tokens_host_cached > 100


def test_images_left_out_and_named_do_not_change_what_is_generated() -> None:
    sizes = Sizes(max_waiting=100, num_blocks=60, num_pages=16)
    worlds = [
        run_world(dataclasses.replace(sizes, by_name=by_name), 7, 60, deaths=False, aborts=False)
        for by_name in (0.0, 0.7)
    ]
    with_bytes, by_name = ({name: (c.token_ids, c.error) for name, c in w.clients.items()} for w in worlds)
    assert (worlds[0].num_named, worlds[1].num_named > 10) == (0, True)
    lost = {name for name, (_, error) in by_name.items() if error == "media_not_cached"}
    assert len(lost) < 6
    for name in with_bytes.keys() - lost:
        assert by_name[name] == with_bytes[name]


@pytest.mark.parametrize("seed", range(5))
def test_a_clip_is_prefilled_as_its_groups_arrive(seed: int) -> None:
    """A step runs before the last group is decoded, and all groups are decoded by one of two workers."""
    num_groups = 20
    world = World(Sizes(num_pages=64, max_num_batched_tokens=40, arena_bytes=100_000), seed)
    items = clip_items("clip", 2, num_groups)
    num_media_tokens = sum(item.num_tokens for item in items)
    token_ids = (3, 4, *[IMAGE_TOKEN] * num_media_tokens, 5)
    world.submit(Submit(RequestId("r"), token_ids, tuple(items), 0, Sampling(), stop_rule(3)), ActorName("edge:0"))
    decoded_at_first_step = None
    while world.clients[RequestId("r")].is_open:
        assert world.step()
        if decoded_at_first_step is None and world.state.counters.steps:
            decoded_at_first_step = sum(len(media.clips) for media in world.medias.values())
    world.drain()
    assert world.clients[RequestId("r")].error is None
    assert decoded_at_first_step is not None
    assert 0 < decoded_at_first_step < num_groups
    assert sorted(len(media.clips) for media in world.medias.values()) == [0, num_groups]


def num_encoded(world: World) -> int:
    return sum(vit.num_encoded for vit in world.vits.values())


def test_the_random_services_do_what_they_are_meant_to_try() -> None:
    """Preemptions, displaced rows, dropped pixels, discarded tokens, recoveries, host memory: all of them happen."""
    tight = Sizes(
        num_blocks=18,
        num_host_blocks=12,
        max_loads=2,
        num_pages=7,
        num_host_pages=9,
        by_name=0.2,
        arena_bytes=12_000,
        max_num_batched_tokens=8,
        no_memory=0.01,
        no_restore=0.1,
    )
    worlds = [run_world(tight, seed, 80) for seed in range(6)]
    assert any(client.error == "out_of_memory" for world in worlds for client in world.clients.values())
    assert sum(world.state.embeds.num_host_evictions for world in worlds) > 0
    assert sum(vit.num_restored for world in worlds for vit in world.vits.values()) > 0
    for name in (
        "preemptions",
        "embed_displacements",
        "discarded_tokens",
        "recoveries",
        "unwanted_pixels",
        "embed_hits",
        "embed_host_hits",
        "media_lookup_hits",
        "prompt_tokens_cached",
        "prompt_tokens_host_cached",
        "block_evictions",
        "host_block_evictions",
        "requests_aborted",
        "requests_stopped",
        "requests_cut",
        "requests_failed",
        "requests_refused",
    ):
        assert sum(getattr(world.state.counters, name) for world in worlds) > 0, name
