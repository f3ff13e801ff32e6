"""KV blocks that were evicted to host memory: saved before they are overwritten, loaded instead of computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tests.actors.scheduler.driver import BLOCK_BYTES, Driver, image, needs
from tests.actors.scheduler.invariants import check_nothing_is_held
from vlmrt.runtime.messages import BlockCopy, MediaItem, StepPlan

FILLER = range(1000, 2000)


def evicted(
    tokens: Sequence[int] | int, media: tuple[MediaItem, ...] = (), *, num_blocks: int = 12, **options: Any
) -> Driver:
    """A driver whose host memory has the blocks of that prompt, and whose KV cache has none of them."""
    driver = Driver(num_blocks=num_blocks, num_host_blocks=3 * num_blocks, **options)
    driver.submit("first", tokens, media, max_tokens=1)
    for item in media:
        driver.make_ready(item.mm_hash)
    driver.run()
    block_size = driver.state.limits.block_size
    for filler in (FILLER[: num_blocks * block_size - 1], [2000]):
        driver.submit("filler", filler, max_tokens=1)
        driver.run()
    assert driver.state.counters.block_evictions == (tokens if isinstance(tokens, int) else len(tokens)) // block_size
    return driver


def limit_loads(driver: Driver, max_loads: int) -> None:
    driver.state.planner.limits = dataclasses.replace(driver.state.limits, max_loads=max_loads)


def pins(driver: Driver) -> int:
    return len(list(driver.state.planner.kv.host.pins()))


def spans(plan: StepPlan) -> list[tuple[int, int]]:
    return [(row.start, row.num_tokens) for row in plan.rows]


def test_a_block_is_saved_by_the_plan_that_gives_it_away() -> None:
    driver = Driver(num_blocks=12, num_host_blocks=20, max_num_batched_tokens=32)
    driver.submit("first", 20, max_tokens=1)
    (plan,) = driver.advance()
    held = plan.rows[0].new_block_ids
    driver.run()
    driver.submit("filler", FILLER[:45], max_tokens=1)
    first, second = driver.advance()
    for plan in (first, second):
        saved = {save.block_id for save in plan.saves}
        assert saved == set(held) & set(plan.rows[0].new_block_ids)
    assert len(first.saves) == 1  # 7 blocks were never used
    assert len(second.saves) == 4
    assert (first.loads, second.loads) == ((), ())


def test_without_host_memory_nothing_is_saved() -> None:
    driver = Driver(num_blocks=12)
    driver.submit("first", 20, max_tokens=1)
    driver.run()
    driver.submit("filler", FILLER[:45], max_tokens=1)
    assert [plan.saves for plan in driver.advance()] == [()]


def test_what_host_memory_has_is_loaded_and_only_the_rest_is_computed() -> None:
    driver = evicted(20)
    driver.submit("again", 20, max_tokens=1)
    (plan,) = driver.advance()
    (row,) = plan.rows
    assert (row.start, row.num_tokens, row.sample) == (16, 4, True)
    assert plan.admit[0].block_ids == ()
    assert len(plan.loads) == 4
    assert row.new_block_ids[:4] == tuple(load.block_id for load in plan.loads)
    assert len(set(row.new_block_ids)) == 5
    usage = driver.run()["again"][-1].usage
    assert usage.num_cached_tokens == 16
    assert driver.state.counters.prompt_tokens_cached == 16
    assert driver.state.counters.prompt_tokens_host_cached == 16
    check_nothing_is_held(driver.state)


def test_a_chain_may_begin_in_the_kv_cache_and_go_on_in_host_memory() -> None:
    driver = Driver(num_blocks=12, num_host_blocks=20)
    driver.submit("first", 20, max_tokens=1)
    driver.run()
    driver.submit("filler", FILLER[:37], max_tokens=1)  # 10 blocks, 3 of the prompt's
    driver.run()
    driver.submit("again", 20, max_tokens=1)
    (plan,) = driver.advance()
    assert len(plan.admit[0].block_ids) == 2
    assert len(plan.loads) == 2
    assert spans(plan) == [(16, 4)]
    assert driver.run()["again"][-1].usage.num_cached_tokens == 16


def test_a_loaded_block_is_found_in_the_kv_cache_once_its_step_has_ended() -> None:
    driver = evicted(20)
    driver.submit("again", 20, max_tokens=1)
    (plan,) = driver.advance()
    assert len(plan.loads) == 4
    driver.submit("same", 20, max_tokens=1)
    driver.result()
    (plan,) = driver.advance()
    assert plan.loads == ()
    assert len(plan.admit[0].block_ids) == 4
    driver.run()
    check_nothing_is_held(driver.state)


def long_chain(**options: Any) -> Driver:
    return evicted(150, num_blocks=190, block_size=1, **options)


def test_a_long_chain_is_loaded_by_several_plans_and_the_last_computes_as_well() -> None:
    driver = long_chain()
    driver.submit("again", 150, max_tokens=1)
    first, second = driver.advance()
    assert [(len(plan.loads), spans(plan)) for plan in (first, second)] == [(64, []), (64, [])]
    driver.result()
    (third,) = driver.advance()
    assert (len(third.loads), spans(third)) == (21, [(149, 1)])
    loaded = tuple(load.block_id for plan in (first, second, third) for load in plan.loads)
    assert third.rows[0].new_block_ids[:149] == loaded
    assert driver.run()["again"][-1].usage.num_cached_tokens == 149
    check_nothing_is_held(driver.state)


def test_decode_rows_run_beside_loads_and_two_requests_share_what_a_plan_may_load() -> None:
    driver = evicted(20, num_blocks=30)
    driver.submit("decoding", [5, 6], max_tokens=20)
    driver.advance()
    driver.result()
    driver.result()
    limit_loads(driver, 5)
    driver.submit("again", 20, max_tokens=1)
    driver.submit("behind", [*range(100, 116), 1, 2], max_tokens=1)
    plan, *_ = driver.advance()
    assert plan.rows[0].num_tokens == 1
    assert spans(plan)[1:] == [(16, 4)]
    assert len(plan.loads) == 5
    assert [new.request_id for new in plan.admit] == ["again", "behind"]
    driver.result()
    outputs = driver.run()
    assert outputs["behind"][-1].usage.num_cached_tokens == 16
    check_nothing_is_held(driver.state)


def test_an_image_in_loaded_blocks_is_neither_decoded_nor_encoded() -> None:
    media = (image("a", 2, 6), image("b", 9, 5))
    driver = evicted(20, media)
    driver.state.reset_embedding_cache(0.0)
    limit_loads(driver, 1)
    assert needs(driver.submit("again", 20, media, max_tokens=1)) == []
    assert driver.run()["again"][-1].usage.num_cached_tokens == 16
    assert driver.state.counters.encodes == 2


def test_an_image_whose_middle_is_where_the_match_ends_is_wanted_and_read_from_there() -> None:
    media = (image("a", 2, 6), image("b", 10, 9))
    driver = evicted(20, media)
    driver.state.reset_embedding_cache(0.0)
    limit_loads(driver, 3)
    assert needs(driver.submit("again", 20, media, max_tokens=1)) == [("again", "b", "media:0")]
    assert driver.advance() == []
    driver.make_ready("b")
    first, second = driver.advance()
    assert (len(first.loads), spans(first)) == (3, [])
    assert (len(second.loads), spans(second)) == (1, [(16, 4)])
    (embeds,) = second.rows[0].embeds
    assert (embeds.first_row, embeds.num_rows, embeds.offset) == (6, 3, 0)
    assert driver.run()["again"][-1].usage.num_cached_tokens == 16
    check_nothing_is_held(driver.state)


def test_an_image_whose_blocks_went_before_its_request_was_admitted_is_wanted_after_all() -> None:
    media = (image("a", 2, 6),)
    driver = evicted(20, media)
    driver.state.reset_embedding_cache(0.0)
    assert needs(driver.submit("again", 20, media, max_tokens=1)) == []
    driver.state.reset_prefix_cache(0.0)
    assert needs(driver.state.advance(0.0)) == [("again", "a", "media:0")]
    driver.make_ready("a")
    assert driver.run()["again"][-1].usage.num_cached_tokens == 0


def test_a_request_preempted_while_it_loads_lets_go_of_host_memory_and_loads_again() -> None:
    driver = evicted(20, num_blocks=34, block_size=1)
    driver.submit("old", [*range(2000, 2010)], max_tokens=22)
    driver.advance()
    driver.result()
    driver.result()
    limit_loads(driver, 1)
    driver.submit("loading", 20, max_tokens=3)
    num_pins = 0
    while driver.state.counters.preemptions == 0:
        num_pins = max(num_pins, pins(driver))
        driver.advance()
        driver.result()
    assert num_pins == 18  # the first is loaded by the plan that admits it
    assert pins(driver) <= 1  # of the load in flight
    outputs = driver.run()
    assert outputs["old"][-1].finish_reason == "length"
    assert [output.token_ids for output in outputs["loading"]] == [(7,)] * 3
    assert outputs["loading"][-1].usage.num_cached_tokens == 19
    check_nothing_is_held(driver.state)


def test_host_memory_is_gone_with_the_group_and_what_it_loaded_is_computed() -> None:
    media = (image("a", 2, 6),)
    driver = evicted(20, media)
    driver.state.reset_embedding_cache(0.0)
    limit_loads(driver, 1)
    driver.submit("again", 20, media, max_tokens=2)
    driver.advance()
    driver.result()
    assert needs(driver.down("llm:0")) == [("again", "a", "media:0")]
    assert (pins(driver), len(driver.state.planner.kv.host)) == (0, 0)
    driver.llm_up(epoch=2)
    driver.make_ready("a")
    plan = driver.advance()[0]
    assert (plan.loads, plan.saves, spans(plan)) == ((), (), [(0, 20)])
    assert driver.run()["again"][-1].usage.num_cached_tokens == 16  # as it was found at first
    check_nothing_is_held(driver.state)


def test_an_abort_while_loading_leaves_pinned_only_what_steps_in_flight_read() -> None:
    driver = evicted(20)
    limit_loads(driver, 1)
    driver.submit("again", 20)
    driver.advance()
    assert pins(driver) == 4
    driver.abort("again")
    assert pins(driver) == 2
    driver.result()
    driver.result()
    check_nothing_is_held(driver.state)
    driver.submit("once more", 20, max_tokens=1)
    assert driver.run()["once more"][-1].usage.num_cached_tokens == 16


def test_blocks_of_a_load_that_nobody_waits_for_any_more_are_not_found() -> None:
    driver = evicted(20)
    driver.submit("again", 20)
    driver.advance()
    num_known = len(driver.state.planner.kv)
    driver.abort("again")
    driver.result()
    assert len(driver.state.planner.kv) == num_known


def test_a_reset_forgets_host_memory_but_not_what_a_request_is_loading() -> None:
    driver = evicted(20)
    limit_loads(driver, 1)
    driver.submit("again", 20, max_tokens=1)
    driver.advance()
    driver.state.reset_prefix_cache(0.0)
    assert len(driver.state.planner.kv.host) == 0
    assert pins(driver) == 4
    assert driver.run()["again"][-1].usage.num_cached_tokens == 16
    check_nothing_is_held(driver.state)
    driver.submit("filler again", FILLER[:45], max_tokens=1)
    (plan,) = driver.advance()
    assert (plan.loads, spans(plan)) == ((), [(0, 45)])


def test_a_content_evicted_again_is_not_copied_again() -> None:
    driver = evicted(20)
    driver.submit("again", 20, max_tokens=1)
    driver.run()
    num_known = len(driver.state.planner.kv)
    driver.submit("more", [*range(3000, 3045)], max_tokens=1)
    (plan,) = driver.advance()
    assert len(driver.state.planner.kv) == 0
    assert len(plan.saves) == num_known - 5  # the prompt's blocks, loaded and computed, are there


def test_loads_are_no_prefill_and_teach_pacing_nothing() -> None:
    driver = long_chain(itl_target_ms=10)
    pacing = driver.state.planner.pacing
    before = (pacing.base_ms, pacing.token_ms)
    driver.submit("again", 150, max_tokens=1)
    driver.advance()
    assert [step.num_prefill_tokens for step in driver.state.llm.in_flight] == [0, 0]
    driver.result(duration_ms=1e6)
    driver.advance()
    assert [step.num_prefill_tokens for step in driver.state.llm.in_flight] == [0, 1]
    driver.result(duration_ms=1e6)
    driver.result(duration_ms=1e6)
    assert (pacing.base_ms, pacing.token_ms) == before


def test_the_figures_say_what_both_memories_hold_and_lost() -> None:
    driver = evicted(20, tp=2)
    driver.submit("again", 20, max_tokens=1)
    driver.run()
    gauges, totals = driver.state.gauges(), driver.state.totals()
    assert gauges["prefix_cache_bytes"] == len(driver.state.planner.kv) * 2 * BLOCK_BYTES
    assert gauges["prefix_cache_host_bytes"] == len(driver.state.planner.kv.host) * 2 * BLOCK_BYTES
    assert totals["prefix_cache_host_hits_total"] == totals["prefix_cache_hits_total"] == 16
    assert totals["prefix_cache_evictions_total"] == 5 + 4
    assert totals["prefix_cache_host_evictions_total"] == 0
    driver.down("llm:0", "llm:1")
    assert driver.state.gauges()["prefix_cache_host_bytes"] == 0
    assert driver.state.totals() == totals


def test_a_save_and_a_load_of_one_plan_name_what_the_books_say() -> None:
    driver = evicted(20)
    kv = driver.state.planner.kv
    host_of = dict(kv.host.items())
    driver.submit("again", 20, max_tokens=1)
    block_hashes = driver.state.planner.waiting[0].block_hashes
    (plan,) = driver.advance()
    assert plan.loads == tuple(
        BlockCopy(load.block_id, host_of[block_hash])
        for load, block_hash in zip(plan.loads, block_hashes, strict=False)
    )
    assert not {save.host_block_id for save in plan.saves} & {load.host_block_id for load in plan.loads}
