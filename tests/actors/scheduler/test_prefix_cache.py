from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.actors.scheduler.driver import image
from vlmrt.actors.scheduler.block_pool import BlockPool
from vlmrt.actors.scheduler.counters import Counters
from vlmrt.actors.scheduler.host_blocks import HostBlocks
from vlmrt.actors.scheduler.prefix_cache import Match, PrefixCache, extend_block_hashes
from vlmrt.runtime.messages import MediaItem

BLOCK_SIZE = 4


def hashes(token_ids: list[int], media: tuple[MediaItem, ...] = (), salt: str = "") -> list[bytes]:
    block_hashes: list[bytes] = []
    extend_block_hashes(block_hashes, token_ids, media, salt, BLOCK_SIZE)
    return block_hashes


@given(st.lists(st.integers(0, 9), max_size=40), st.lists(st.integers(0, 40), max_size=4))
def test_hashing_as_tokens_arrive_equals_hashing_all_at_once(token_ids: list[int], cuts: list[int]) -> None:
    media = (image("a", 2, 7), image("b", 9, 3))
    block_hashes: list[bytes] = []
    for cut in sorted(cuts):
        extend_block_hashes(block_hashes, token_ids[:cut], media, "", BLOCK_SIZE)
    extend_block_hashes(block_hashes, token_ids, media, "", BLOCK_SIZE)
    assert block_hashes == hashes(token_ids, media)
    assert len(block_hashes) == len(token_ids) // BLOCK_SIZE


def test_a_hash_covers_all_tokens_before_it() -> None:
    assert hashes([1, 2, 3, 4, 5, 6, 7, 8])[1] != hashes([9, 2, 3, 4, 5, 6, 7, 8])[1]


def test_another_image_in_the_same_place_is_another_block() -> None:
    tokens = [1, 0, 0, 0, 0, 0, 0, 2]
    first, second = hashes(tokens, (image("a", 1, 6),)), hashes(tokens, (image("b", 1, 6),))
    assert first[0] != second[0]
    assert first[1] != second[1]


def test_two_images_side_by_side_differ_from_one_of_their_length() -> None:
    tokens = [0] * 8
    assert hashes(tokens, (image("a", 0, 4), image("a", 4, 4)))[1] != hashes(tokens, (image("a", 0, 8),))[1]


def test_another_position_in_a_clip_is_another_block() -> None:
    tokens = [0] * 8
    first, second = image("a", 0, 4), image("b", 4, 4)
    groups = [msgspec.structs.replace(second, time_offset=offset, continues=True) for offset in (1, 2)]
    blocks = [hashes(tokens, (first, last)) for last in (second, *groups)]
    assert len({block[0] for block in blocks}) == 1
    assert len({block[1] for block in blocks}) == 3


def test_tenants_with_different_salts_share_nothing() -> None:
    assert hashes([1, 2, 3, 4], salt="x") != hashes([1, 2, 3, 4], salt="y")


def test_a_token_id_out_of_range_is_refused() -> None:
    with pytest.raises(OverflowError):
        hashes([1, 2, 3, -4])


def cached(
    num_tokens: int, *, num_host_blocks: int = 0, counters: Counters | None = None, enabled: bool = True
) -> tuple[PrefixCache, list[bytes]]:
    """A cache of 8 blocks that holds, unreferenced, all full blocks of a sequence."""
    counters = counters or Counters()
    kv = PrefixCache(BlockPool(8), HostBlocks(num_host_blocks, counters), counters, enabled=enabled)
    block_hashes = hashes(list(range(num_tokens)))
    block_ids = kv.allocate(len(block_hashes))
    assert block_ids is not None
    for block_hash, block_id in zip(block_hashes, block_ids, strict=True):
        kv.insert(block_hash, block_id)
    kv.release(block_ids)
    return kv, block_hashes


def test_the_last_token_is_never_covered() -> None:
    kv, block_hashes = cached(12)
    assert len(kv.match(block_hashes, 12, BLOCK_SIZE).block_ids) == 2
    assert len(kv.match(block_hashes, 13, BLOCK_SIZE).block_ids) == 3


def test_a_match_ends_at_the_first_unknown_block() -> None:
    kv, block_hashes = cached(12)
    assert len(kv.match([block_hashes[0], b"?", block_hashes[2]], 13, BLOCK_SIZE).block_ids) == 1


def test_the_end_of_a_sequence_is_evicted_before_its_beginning() -> None:
    counters = Counters()
    kv, block_hashes = cached(12, counters=counters)
    assert kv.allocate(6) is not None  # 5 never used, 1 cached
    assert len(kv.match(block_hashes, 13, BLOCK_SIZE).block_ids) == 2
    assert counters.block_evictions == 1
    assert kv.take_saves() == ()


def test_content_known_already_keeps_its_first_block() -> None:
    kv, block_hashes = cached(4)
    again = kv.allocate(1)
    assert again is not None
    kv.insert(block_hashes[0], again[0])
    assert kv.match(block_hashes, 5, BLOCK_SIZE).block_ids != again


def test_after_a_reset_nothing_is_found() -> None:
    kv, block_hashes = cached(12)
    kv.reset()
    assert kv.match(block_hashes, 13, BLOCK_SIZE) == Match([], [])
    assert kv.pool.num_free == 8


def test_switched_off_nothing_is_found() -> None:
    kv, block_hashes = cached(12, enabled=False)
    assert kv.match(block_hashes, 13, BLOCK_SIZE) == Match([], [])


def test_what_is_evicted_is_saved_and_continues_the_match() -> None:
    kv, block_hashes = cached(12, num_host_blocks=8)
    taken = kv.allocate(7)  # 5 never used, then the end of the sequence
    assert taken is not None
    saves = kv.take_saves()
    assert [save.block_id for save in saves] == taken[5:]
    assert kv.take_saves() == ()
    match = kv.match(block_hashes, 13, BLOCK_SIZE)
    assert (len(match.block_ids), match.num_blocks) == (1, 3)
    assert match.host_block_ids == [save.host_block_id for save in reversed(saves)]
    assert len(kv.match(block_hashes, 12, BLOCK_SIZE).host_block_ids) == 1


def test_one_host_block_is_saved_to_once_and_keeps_what_was_evicted_last() -> None:
    counters = Counters()
    kv, block_hashes = cached(12, num_host_blocks=2, counters=counters)
    taken = kv.allocate(8)
    assert taken is not None
    saves = kv.take_saves()
    assert sorted(save.block_id for save in saves) == sorted(taken[6:])
    assert len({save.host_block_id for save in saves}) == 2
    assert len(kv.match(block_hashes, 13, BLOCK_SIZE).host_block_ids) == 2
    assert (counters.block_evictions, counters.host_block_evictions) == (3, 1)


def test_content_that_host_memory_has_is_not_saved_again() -> None:
    kv, block_hashes = cached(12, num_host_blocks=8)
    taken = kv.allocate(8)
    assert taken is not None
    assert len(kv.take_saves()) == 3
    for block_hash, block_id in zip(block_hashes, taken, strict=False):
        kv.insert(block_hash, block_id)
    kv.release(taken)
    assert kv.allocate(8) is not None
    assert kv.take_saves() == ()


def test_of_a_match_that_is_touched_the_end_is_evicted_before_the_beginning() -> None:
    kv, block_hashes = cached(12)
    kv.touch(kv.match(block_hashes, 13, BLOCK_SIZE))
    assert kv.allocate(7) is not None
    assert len(kv.match(block_hashes, 13, BLOCK_SIZE).block_ids) == 1
