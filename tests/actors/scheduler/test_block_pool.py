from __future__ import annotations

from vlmrt.actors.scheduler.block_pool import BlockPool


def test_the_block_released_longest_ago_is_handed_out_first() -> None:
    pool = BlockPool(3)
    assert pool.allocate(3) == [0, 1, 2]
    for block_id in (1, 0, 2):
        pool.release(block_id, worthless=False)
    assert pool.allocate(2) == [1, 0]


def test_worthless_blocks_are_handed_out_before_those_with_known_content() -> None:
    pool = BlockPool(3)
    pool.allocate(3)
    pool.release(0, worthless=False)
    pool.release(1, worthless=True)
    pool.release(2, worthless=False)
    assert pool.allocate(3) == [1, 0, 2]


def test_a_shared_block_is_free_only_after_its_last_release() -> None:
    pool = BlockPool(1)
    pool.allocate(1)
    pool.acquire([0])
    pool.release(0, worthless=False)
    assert pool.allocate(1) is None
    pool.release(0, worthless=False)
    assert pool.num_free == 1


def test_a_free_block_whose_content_is_wanted_is_not_handed_out() -> None:
    pool = BlockPool(2)
    pool.acquire([0])
    assert pool.allocate(2) is None
    assert pool.allocate(1) == [1]


def test_touched_blocks_are_evicted_last() -> None:
    pool = BlockPool(3)
    pool.touch([0])
    assert pool.allocate(3) == [1, 2, 0]


def test_an_allocation_that_does_not_fit_takes_nothing() -> None:
    pool = BlockPool(2)
    assert pool.allocate(3) is None
    assert pool.num_free == 2
