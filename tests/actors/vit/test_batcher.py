"""Batches: oldest first, within the patch budget, nobody starved."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vlmrt.actors.vit.batcher import EncodeQueue
from vlmrt.runtime.messages import ActorName, ArenaRef, Encode, Epoch, MmHash


def encode(encode_id: int, num_patches: int) -> Encode:
    ref = ArenaRef(ActorName("media:0"), Epoch(1), 0, 1)
    return Encode(encode_id, MmHash(str(encode_id)), (1, 2, num_patches // 2), ref, (1, 1, 1, 3), (0,))


def filled(*sizes: int, max_patches: int = 100, max_queued: int = 1000) -> EncodeQueue:
    queue = EncodeQueue(max_patches, max_queued)
    for encode_id, size in enumerate(sizes):
        assert queue.put(encode(encode_id, size))
    return queue


def taken(queue: EncodeQueue) -> list[int]:
    return [each.encode_id for each in queue.take()]


def test_a_batch_is_the_oldest_images_that_fit_together() -> None:
    queue = filled(40, 60, 2, 98)
    assert [taken(queue), taken(queue), taken(queue)] == [[0, 1], [2, 3], []]


def test_a_larger_image_is_not_passed_over_by_smaller_ones() -> None:
    queue = filled(60, 90, 10, 10)
    assert [taken(queue), taken(queue)] == [[0], [1, 2]]


def test_an_image_above_the_budget_goes_alone() -> None:
    queue = filled(10, 500, 10)
    assert [taken(queue), taken(queue), taken(queue)] == [[0], [1], [2]]


def test_a_cancelled_image_is_not_taken() -> None:
    queue = filled(10, 10, 10)
    assert queue.cancel(1)
    assert not queue.cancel(1)
    assert not queue.cancel(7)
    assert taken(queue) == [0, 2]
    assert not queue.cancel(0)


def test_a_full_queue_refuses() -> None:
    queue = filled(10, 10, max_queued=2)
    assert not queue.put(encode(2, 10))
    queue.clear()
    assert queue.put(encode(2, 10))
    assert len(queue) == 1


@given(st.lists(st.integers(1, 300).map(lambda half: 2 * half), max_size=40))
def test_every_image_is_taken_once_in_order_and_within_the_budget(sizes: list[int]) -> None:
    queue = filled(*sizes)
    order: list[int] = []
    while batch := queue.take():
        patches = [sizes[each.encode_id] for each in batch]
        assert sum(patches) <= 100 or len(batch) == 1
        following = len(order) + len(batch)
        if following < len(sizes):
            assert sum(patches) + sizes[following] > 100  # no smaller than it had to be
        order += [each.encode_id for each in batch]
    assert order == list(range(len(sizes)))
