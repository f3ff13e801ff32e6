from __future__ import annotations

import random
from collections import Counter

from vlmrt.actors.scheduler.counters import Counters
from vlmrt.actors.scheduler.host_blocks import HostBlocks

NUM_OPERATIONS = 20_000


def kept(num_blocks: int, *block_hashes: bytes) -> tuple[HostBlocks, list[int]]:
    host = HostBlocks(num_blocks, Counters())
    host_block_ids = [host.keep(block_hash) for block_hash in block_hashes]
    return host, [block for block in host_block_ids if block is not None]


def test_what_was_kept_longest_ago_makes_room() -> None:
    host, (first, second) = kept(2, b"1", b"2")
    assert host.keep(b"3") == first
    assert host.match([b"1"]) == []
    assert host.match([b"2", b"3"]) == [second, first]


def test_a_match_begins_where_it_is_told_to_and_ends_at_a_gap() -> None:
    host, blocks = kept(4, b"1", b"2", b"4")
    assert host.match([b"0", b"1", b"2", b"3", b"4"], first=1) == blocks[:2]


def test_content_that_is_there_needs_no_copy_and_counts_as_used() -> None:
    host, (_, second) = kept(2, b"1", b"2")
    assert host.keep(b"1") is None
    assert host.keep(b"3") == second


def test_pinned_content_stays_until_its_last_unpin() -> None:
    host, blocks = kept(1, b"1")
    host.pin(blocks)
    host.pin(blocks)
    host.unpin(blocks)
    assert host.keep(b"2") is None
    assert host.match([b"1"]) == blocks
    host.unpin(blocks)
    assert host.keep(b"2") == blocks[0]


def test_the_end_of_what_was_touched_or_unpinned_goes_before_its_beginning() -> None:
    host, blocks = kept(3, b"1", b"2", b"3")
    host.touch(blocks[:2])
    assert list(host.idle_in_eviction_order()) == [blocks[2], blocks[1], blocks[0]]
    host.pin(blocks)
    host.unpin(blocks)
    assert list(host.idle_in_eviction_order()) == [blocks[2], blocks[1], blocks[0]]


def test_a_reset_leaves_pinned_blocks_to_those_that_pinned_them() -> None:
    host, blocks = kept(2, b"1", b"2")
    host.pin(blocks[:1])
    host.reset()
    assert (len(host), host.match([b"1"])) == (0, [])
    assert host.keep(b"3") == blocks[1]
    assert host.keep(b"1") == blocks[1]  # not into the pinned block
    host.unpin(blocks[:1])
    assert host.keep(b"4") == blocks[0]


def test_without_host_memory_nothing_is_kept() -> None:
    host, blocks = kept(0, b"1")
    assert blocks == []
    assert host.match([b"1"]) == []


class Model:
    """The same books, as a list in eviction order and the blocks that each pin was given."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.contents: dict[int, bytes] = {}  # as the ranks would find it
        self.known: list[bytes] = []  # next to go first; pinned ones wherever they are
        self.pins: list[list[int]] = []
        self.num_evictions = 0

    def block_of(self, block_hash: bytes) -> int:
        (block,) = [block for block, content in self.contents.items() if content == block_hash]
        return block

    def pinned(self) -> Counter[int]:
        return Counter(block for pin in self.pins for block in pin)

    def idle(self) -> list[int]:
        pinned = self.pinned()
        return [block for block in map(self.block_of, self.known) if block not in pinned]

    def free(self) -> set[int]:
        return set(range(self.num_blocks)) - set(self.contents)

    def use(self, block_hash: bytes) -> None:
        self.known.remove(block_hash)
        self.known.append(block_hash)

    def forget(self, block: int) -> None:
        self.known.remove(self.contents.pop(block))


def check_same(host: HostBlocks, model: Model) -> None:
    pinned = model.pinned()
    assert dict(host.pins()) == pinned
    assert list(host.idle_in_eviction_order()) == model.idle()
    assert len(host.free()) == len(set(host.free()))
    assert set(host.free()) == model.free() - set(pinned)
    assert dict(host.items()) == {block_hash: model.block_of(block_hash) for block_hash in model.known}
    assert len(host) == len(model.known)
    assert host._counters.host_block_evictions == model.num_evictions


def test_twenty_thousand_random_operations_leave_the_books_as_a_simple_model_has_them() -> None:
    for seed, num_blocks in enumerate((1, 3, 8, 20)):
        rng = random.Random(seed)
        host, model = HostBlocks(num_blocks, Counters()), Model(num_blocks)
        hashes = [bytes([index]) for index in range(2 * num_blocks + 2)]
        seen: Counter[str] = Counter()
        for _ in range(NUM_OPERATIONS // 4):
            first = rng.randrange(len(hashes))
            chain = hashes[first : first + rng.randrange(1, 5)]
            match rng.choices(("keep", "touch", "pin", "unpin", "reset"), (40, 15, 20, 24, 1))[0]:
                case "keep":
                    idle, free = model.idle(), model.free() - set(model.pinned())
                    block = host.keep(chain[0])
                    if chain[0] in model.known:
                        seen["known"] += 1
                        assert block is None
                        if model.block_of(chain[0]) in idle:
                            model.use(chain[0])
                    elif not free and not idle:
                        seen["full"] += 1
                        assert block is None
                    else:
                        assert block is not None
                        if not free:
                            seen["evicted"] += 1
                            assert block == idle[0]
                            model.forget(block)
                            model.num_evictions += 1
                        else:
                            assert block in free
                        model.contents[block] = chain[0]
                        model.known.append(chain[0])
                case "touch":
                    found = host.match(chain)
                    host.touch(found)
                    idle = model.idle()
                    for block in reversed(found):
                        if block in idle:
                            model.use(model.contents[block])
                case "pin":
                    found = host.match(chain)
                    num_known = next((i for i, h in enumerate(chain) if h not in model.known), len(chain))
                    assert found == [model.block_of(block_hash) for block_hash in chain[:num_known]]
                    host.pin(found)
                    model.pins.append(found)
                case "unpin" if model.pins:
                    pin = model.pins.pop(rng.randrange(len(model.pins)))
                    host.unpin(pin)
                    pinned = model.pinned()
                    for block in reversed(pin):
                        if block not in pinned and block in model.contents:
                            model.use(model.contents[block])
                case "reset":
                    seen["reset"] += bool(model.pins)
                    host.reset()
                    model.contents.clear()
                    model.known.clear()
            check_same(host, model)
        assert min(seen[name] for name in ("known", "full", "evicted", "reset")) > 0 or num_blocks == 20, seen
        for pin in model.pins:
            host.unpin(pin)
        assert not list(host.pins())
