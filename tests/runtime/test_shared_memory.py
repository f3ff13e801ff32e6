"""The arena never hands out a byte twice, loses none, and readers stay within it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import FakeContext, FakeMemory
from vlmrt.runtime.messages import ActorName, ArenaRef, Epoch
from vlmrt.runtime.shared_memory import ALIGNMENT, ArenaAllocator, ArenaReader, HostMemory, PixelArena

SIZE = 64 * ALIGNMENT


@pytest.fixture
def context(tmp_path: Path) -> Iterator[FakeContext]:
    memory = FakeMemory()
    yield FakeContext("media:0", tmp_path, memory=memory)
    memory.close()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, SIZE // 4)), min_size=50, max_size=150))
def test_blocks_never_overlap_and_all_space_comes_back(operations: list[tuple[int, int]]) -> None:
    allocator = ArenaAllocator(SIZE)
    owner = np.full(SIZE, -1)
    live: dict[int, int] = {}
    for action, number in operations:
        if action == 0 and live:
            offset = sorted(live)[number % len(live)]
            owner[offset : offset + live.pop(offset)] = -1
            allocator.free(offset)
        else:
            new = allocator.allocate(number)
            if new is None:
                length = -(-number // ALIGNMENT) * ALIGNMENT
                free_runs = "".join("f" if free else "u" for free in (owner[::ALIGNMENT] == -1)).split("u")
                assert max(map(len, free_runs)) * ALIGNMENT < length, "refused although a gap fits"
                continue
            assert new % ALIGNMENT == 0
            length = -(-number // ALIGNMENT) * ALIGNMENT
            assert (owner[new : new + length] == -1).all(), "handed out twice"
            owner[new : new + length] = new
            live[new] = length
        allocator.check()
        assert allocator.used_bytes == sum(live.values()) == int((owner >= 0).sum())
    for offset in live:
        allocator.free(offset)
    allocator.check()
    assert allocator.allocate(SIZE) == 0


def test_freeing_twice_or_elsewhere_raises() -> None:
    allocator = ArenaAllocator(SIZE)
    offset = allocator.allocate(100)
    assert offset == 0
    allocator.free(offset)
    with pytest.raises(ValueError, match="twice"):
        allocator.free(offset)
    allocator.allocate(200)
    with pytest.raises(ValueError, match="no block at offset 64"):
        allocator.free(64)
    with pytest.raises(ValueError, match="num_bytes is 0"):
        allocator.allocate(0)


def test_pixels_are_read_in_place_by_their_ref(context: FakeContext) -> None:
    arena = PixelArena.create(context, SIZE)
    reader = ArenaReader(context.open_memory)
    pixels = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    ref = arena.write(pixels)
    assert ref is not None
    seen = reader.view(ref, pixels.shape)
    np.testing.assert_array_equal(seen, pixels)
    assert not seen.flags.writeable
    assert arena.used_bytes == 128
    arena.free(ref)
    assert arena.used_bytes == 0
    reader.close()
    arena.close()
    np.testing.assert_array_equal(seen, pixels)  # the mapping goes with the last view


def test_a_place_can_be_filled_in_place_and_a_full_arena_says_none(context: FakeContext) -> None:
    arena = PixelArena.create(context, SIZE)
    reader = ArenaReader(context.open_memory)
    place = arena.allocate((1, SIZE // 3, 1, 3))
    assert place is not None
    ref, target = place
    target[...] = 7
    assert reader.view(ref, target.shape).min() == 7
    assert arena.write(np.zeros((1, SIZE, 1, 3), np.uint8)) is None
    assert arena.allocate((1, SIZE // 3, 1, 3)) is None
    reader.close()
    arena.close()


def test_a_place_of_another_incarnation_is_not_freed(context: FakeContext) -> None:
    arena = PixelArena.create(context, SIZE)
    ref = arena.write(np.zeros((1, 1, 1, 3), np.uint8))
    assert ref is not None
    with pytest.raises(ValueError, match="epoch 1"):
        arena.free(ArenaRef(ref.arena, Epoch(2), ref.offset, ref.num_bytes))
    arena.close()


@pytest.mark.parametrize(
    ("offset", "num_bytes", "shape"),
    [
        (0, 12, (1, 2, 2, 4)),
        (0, 12, (1, -2, -2, 3)),
        (-64, 12, (1, 2, 2, 3)),
        (SIZE - 8, 12, (1, 2, 2, 3)),
        (0, SIZE + 64, (1, SIZE + 64, 1, 1)),
        (0, 0, (0, 2, 2, 3)),
        (1 << 62, 12, (1, 2, 2, 3)),
    ],
)
def test_a_forged_ref_is_refused_before_a_byte_is_read(
    offset: int, num_bytes: int, shape: tuple[int, ...], context: FakeContext
) -> None:
    arena = PixelArena.create(context, SIZE)
    reader = ArenaReader(context.open_memory)
    with pytest.raises(ValueError, match=r"bytes"):
        reader.view(ArenaRef(ActorName("media:0"), Epoch(1), offset, num_bytes), shape)
    reader.close()
    arena.close()


def test_the_arena_of_a_dead_incarnation_is_closed_and_not_opened_again(context: FakeContext) -> None:
    arena = PixelArena.create(context, SIZE)
    reader = ArenaReader(context.open_memory)
    ref = arena.write(np.ones((1, 1, 1, 3), np.uint8))
    assert ref is not None
    reader.view(ref, (1, 1, 1, 3))
    context.memory.drop("arena/media:0/1")
    reader.drop(ActorName("media:0"), Epoch(1))
    with pytest.raises(KeyError):
        reader.view(ref, (1, 1, 1, 3))
    arena.close()


def test_host_memory_is_unmapped_when_nobody_looks_at_it(context: FakeContext) -> None:
    memory = HostMemory.adopt(context.create_memory("arena/media:0/1", 4096))
    view = np.frombuffer(memory.buffer, np.uint8)
    memory.close()
    memory.close()
    assert view[0] == 0
