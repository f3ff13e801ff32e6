"""The books of both tiers against a simple model, and memory that shows whose rows a page really holds."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from vlmrt.actors.scheduler.embed_cache import EmbedCache, Entry, Slab
from vlmrt.actors.scheduler.request import MediaKey
from vlmrt.runtime.messages import ActorName, Epoch, HostSlabExport, MmHash, RequestId

PAGE_ROWS, WIDTH = 2, 8
PAGE_BYTES = PAGE_ROWS * WIDTH * 4
NUM_OPERATIONS = 20_000
NUM_ROWS = (1, 2, 3, 4, 5, 7, 8)  # by image number
NUM_IMAGES = 24
VITS = (ActorName("vit:0"), ActorName("vit:1"))
LLM_EPOCH = Epoch(1)


@dataclass
class Memory:
    """One incarnation of a ViT: what its pages hold."""

    epoch: Epoch
    slab: list[MmHash | None]
    host: list[MmHash | None]


@dataclass
class Model:
    """What must be true, by image: who reads it, where it is on its way to, where it is."""

    readers: dict[MmHash, set[RequestId]] = field(default_factory=dict)
    coming: dict[MmHash, Entry] = field(default_factory=dict)
    restoring: set[MmHash] = field(default_factory=set)
    loans: dict[int, list[Entry]] = field(default_factory=dict)  # by step


class Bench:
    def __init__(self, seed: int, *, num_pages: int, num_host_pages: int, enabled: bool = True) -> None:
        self.rng = random.Random(seed)
        self.num_pages, self.num_host_pages, self.enabled = num_pages, num_host_pages, enabled
        self.cache = EmbedCache(enabled=enabled)
        self.memories: dict[ActorName, Memory] = {}
        self.model = Model()
        self.num_steps = 0
        self.num_requests = 0
        self.seen: dict[str, int] = {}
        for vit in VITS:
            self.start(vit, Epoch(1))

    def start(self, vit: ActorName, epoch: Epoch) -> None:
        export = HostSlabExport(f"slab/{vit}", self.num_pages, PAGE_ROWS, WIDTH, "float32")
        self.cache.add_slab(vit, epoch, export, self.num_host_pages)
        self.memories[vit] = Memory(epoch, [None] * self.num_pages, [None] * self.num_host_pages)

    def happened(self, what: str) -> None:
        self.seen[what] = self.seen.get(what, 0) + 1

    # ------------------------------------------------------------ operations

    def insert_or_hit(self) -> None:
        """A request wants an image: it is there, or comes from host memory, or is encoded."""
        mm_hash = self.draw_image()
        self.pin(mm_hash)
        if self.cache.ready_entry(mm_hash) is not None:
            self.happened("hit")
        elif mm_hash not in self.model.coming:
            self.bring(mm_hash)

    def bring(self, mm_hash: MmHash) -> None:
        home = self.cache.host_slab(mm_hash)
        slab = home if home is not None else self.cache.slabs[self.rng.choice(VITS)]
        pinned = self.pinned()
        displace_after = self.rng.choice((None, None, self.cache.first_key(mm_hash)))
        begun = self.cache.begin(mm_hash, (1, 1, 1), slab, num_rows(mm_hash), displace_after=displace_after)
        if begun is None:
            self.happened("no room")
            return
        entry, displaced = begun
        gone = {each for each in pinned if self.cache.ready_entry(each) is None}
        assert gone == {each.mm_hash for each in displaced}, "pinned rows were evicted"
        if displaced:
            assert displace_after is not None
            assert all(self.cache.first_key(each.mm_hash) > displace_after for each in displaced)
            self.happened("displaced")
        self.model.coming[mm_hash] = entry
        if home is not None:
            self.model.restoring.add(mm_hash)

    def finish(self) -> None:
        """What is on its way has come: pages are written as the message says."""
        if not self.model.coming:
            return
        mm_hash = self.rng.choice(sorted(self.model.coming))
        entry = self.model.coming.pop(mm_hash)
        memory = self.memories[entry.vit]
        content = [mm_hash] * len(entry.pages)
        if mm_hash in self.model.restoring:
            self.model.restoring.remove(mm_hash)
            pages = self.cache.slabs[entry.vit].host.pages[mm_hash]  # pinned: it is there
            content = [memory.host[page] or MmHash("nothing") for page in pages]
            assert content == [mm_hash] * len(entry.pages), "the copy holds other rows"
            self.happened("restored")
        for index, page in enumerate(entry.host_pages):
            memory.host[page] = content[index]
        for index, page in enumerate(entry.pages):
            memory.slab[page] = content[index]
        self.cache.complete(entry)

    def cancel(self) -> None:
        """What is on its way does not come, or (seldom) comes wrong."""
        if not self.model.coming:
            return
        mm_hash = self.rng.choice(sorted(self.model.coming))
        entry = self.model.coming.pop(mm_hash)
        self.model.restoring.discard(mm_hash)
        if self.rng.random() < 0.2:
            self.cache.forget(entry)
            assert self.cache.host_slab(mm_hash) is None
            self.happened("forgotten")
        else:
            had_copy = self.cache.host_slab(mm_hash) is not None
            self.cache.remove(entry)
            assert (self.cache.host_slab(mm_hash) is not None) == had_copy
            self.happened("cancelled")

    def pin(self, mm_hash: MmHash) -> None:
        self.num_requests += 1
        request_id = RequestId(f"r{self.num_requests}")
        self.model.readers.setdefault(mm_hash, set()).add(request_id)
        key: MediaKey = (self.rng.randrange(3), self.num_requests, 0)
        self.cache.add_reader(mm_hash, request_id, key)

    def unpin(self) -> None:
        if not self.model.readers:
            return
        mm_hash = self.rng.choice(sorted(self.model.readers))
        readers = self.model.readers[mm_hash]
        request_id = self.rng.choice(sorted(readers))
        readers.remove(request_id)
        if not readers:
            del self.model.readers[mm_hash]
        assert self.cache.remove_reader(mm_hash, request_id) == (not readers)

    def read(self) -> None:
        """A step reads pinned rows; another ends."""
        for step in [step for step in self.model.loans if self.rng.random() < 0.5]:
            for entry in self.model.loans.pop(step):
                self.check_rows(entry)  # whatever happened to the entry meanwhile
            self.cache.end_step(LLM_EPOCH, step)
        ready = [self.cache.ready_entry(mm_hash) for mm_hash in sorted(self.model.readers)]
        entries = [entry for entry in ready if entry is not None and self.rng.random() < 0.5]
        self.num_steps += 1
        self.cache.lend(LLM_EPOCH, self.num_steps, entries)
        self.model.loans[self.num_steps] = entries

    def restart(self) -> None:
        vit = self.rng.choice(VITS)
        epoch = self.memories[vit].epoch
        lost = self.cache.drop_slab(vit)
        assert all((entry.vit, entry.epoch) == (vit, epoch) for entry in lost)
        for step, entries in self.model.loans.items():
            self.model.loans[step] = [entry for entry in entries if entry.vit != vit]
        for mm_hash in [mm_hash for mm_hash, entry in self.model.coming.items() if entry.vit == vit]:
            del self.model.coming[mm_hash]
            self.model.restoring.discard(mm_hash)
        self.start(vit, Epoch(epoch + 1))
        assert all(entry.vit != vit for entry in self.cache.entries.values())
        assert not self.cache.slabs[vit].host.pages
        self.happened("restarted")

    def reset(self) -> None:
        pinned = self.pinned()
        self.cache.reset()
        assert pinned <= self.pinned()
        assert all(not slab.idle for slab in self.cache.slabs.values())
        kept = {mm_hash for slab in self.cache.slabs.values() for mm_hash in slab.host.pages}
        assert kept <= self.model.readers.keys() | self.model.restoring

    def operate(self) -> None:
        weights = {
            self.insert_or_hit: 30,
            self.finish: 28,
            self.unpin: 28,
            self.read: 8,
            self.cancel: 3,
            self.restart: 0.3,
            self.reset: 0.1,
        }
        (operation,) = self.rng.choices(list(weights), list(weights.values()))
        operation()

    # ------------------------------------------------------------ what must be true

    def draw_image(self) -> MmHash:
        return MmHash(f"image{int(NUM_IMAGES * self.rng.random() ** 2)}")

    def pinned(self) -> set[MmHash]:
        return {mm_hash for mm_hash in self.model.readers if self.cache.ready_entry(mm_hash) is not None}

    def check_rows(self, entry: Entry) -> None:
        memory = self.memories[entry.vit]
        assert memory.epoch == entry.epoch
        assert [memory.slab[page] for page in entry.pages] == [entry.mm_hash] * len(entry.pages), "wrong rows"

    def check(self) -> None:
        cache, model = self.cache, self.model
        assert {mm_hash: set(by_request) for mm_hash, by_request in cache.readers.items()} == model.readers
        assert {mm_hash for mm_hash, entry in cache.entries.items() if not entry.is_ready} == model.coming.keys()
        for vit, slab in cache.slabs.items():
            self.check_vit(vit, slab)
        for mm_hash in model.restoring:
            assert cache.host_slab(mm_hash) is not None, "a copy was dropped under its restore"

    def check_vit(self, vit: ActorName, slab: Slab) -> None:
        memory = self.memories[vit]
        slab.books.check()
        slab.host.books.check()
        entries = [entry for entry in self.cache.entries.values() if entry.vit == vit]
        ready = [entry for entry in entries if entry.is_ready]
        for entry in ready:
            self.check_rows(entry)
        loans = [(step, id(entry)) for step, lent in self.model.loans.items() for entry in lent if entry.vit == vit]
        assert slab.books.num_loans == len(loans)
        lent_pages = {
            page for lent in self.model.loans.values() for each in lent if each.vit == vit for page in each.pages
        }
        owned_pages = [page for entry in entries for page in entry.pages]
        assert slab.num_ready_pages * slab.page_bytes == PAGE_BYTES * sum(pages_of(entry.mm_hash) for entry in ready)
        assert slab.books.num_pages - slab.books.num_free == len({*owned_pages, *lent_pages})
        assert len(owned_pages) == len(set(owned_pages))
        assert set(slab.pinned) == {entry.mm_hash for entry in ready if entry.mm_hash in self.model.readers}
        assert set(slab.idle) == {entry.mm_hash for entry in ready if entry.mm_hash not in self.model.readers}
        assert self.enabled or not slab.idle
        for mm_hash, pages in slab.host.pages.items():
            assert [memory.host[page] for page in pages] == [mm_hash] * pages_of(mm_hash), "wrong rows in host memory"
        kept_pages = sum(pages_of(mm_hash) for mm_hash in slab.host.pages)
        assert slab.host.num_copy_pages == kept_pages
        being_made = sum(len(entry.host_pages) for entry in entries)
        assert slab.host.books.num_pages - slab.host.books.num_free == kept_pages + being_made


def num_rows(mm_hash: MmHash) -> int:
    return NUM_ROWS[int(mm_hash.removeprefix("image")) % len(NUM_ROWS)]


def pages_of(mm_hash: MmHash) -> int:
    return -(-num_rows(mm_hash) // PAGE_ROWS)


def test_books_agree_with_a_simple_model_through_thousands_of_operations() -> None:
    bench = Bench(0, num_pages=12, num_host_pages=25)
    for _ in range(NUM_OPERATIONS):
        copies = {mm_hash for slab in bench.cache.slabs.values() for mm_hash in slab.host.pages}
        needed = {mm_hash for mm_hash in copies & bench.model.readers.keys() if mm_hash not in bench.cache.entries}
        restarted = bench.seen.get("restarted", 0)
        bench.operate()
        bench.check()
        if bench.seen.get("restarted", 0) == restarted:
            lost = {mm_hash for mm_hash in needed if bench.cache.host_slab(mm_hash) is None}
            assert not lost, f"copies that readers wait for were dropped: {lost}"
    assert bench.cache.num_evictions > 500
    assert bench.cache.num_host_evictions > 100
    for what in ("hit", "restored", "cancelled", "forgotten", "restarted", "displaced", "no room"):
        assert bench.seen[what] >= 10, (what, bench.seen)


def test_without_caching_nothing_is_kept_in_either_tier() -> None:
    bench = Bench(1, num_pages=12, num_host_pages=25, enabled=False)
    for _ in range(2000):
        bench.operate()
        bench.check()
    assert "restored" not in bench.seen
    assert all(slab.host.books.num_pages == 0 for slab in bench.cache.slabs.values())


def single(num_pages: int, num_host_pages: int) -> tuple[EmbedCache, Slab]:
    cache = EmbedCache(enabled=True)
    cache.add_slab(VITS[0], Epoch(1), HostSlabExport("slab", num_pages, PAGE_ROWS, WIDTH, "float32"), num_host_pages)
    return cache, cache.slabs[VITS[0]]


def encode(cache: EmbedCache, slab: Slab, name: str, rows: int = 4) -> Entry:
    """Wanted, encoded, read, and wanted no more."""
    mm_hash, request_id = MmHash(name), RequestId("r")
    cache.add_reader(mm_hash, request_id, (0, 0, 0))
    entry = cache.ready_entry(mm_hash)
    if entry is None:
        begun = cache.begin(mm_hash, (1, 1, rows), slab, rows, displace_after=None)
        assert begun is not None
        entry = begun[0]
        cache.complete(entry)
    cache.remove_reader(mm_hash, request_id)
    return entry


def test_rows_evicted_from_the_slab_stay_in_host_memory() -> None:
    cache, slab = single(num_pages=4, num_host_pages=6)
    for name in ("a", "b", "c"):
        encode(cache, slab, name)
    assert list(cache.entries) == ["b", "c"]
    assert list(slab.host.pages) == ["a", "b", "c"]
    assert cache.host_slab(MmHash("a")) is slab


def test_the_copy_used_longest_ago_goes_first_whichever_tier_the_use_was_in() -> None:
    cache, slab = single(num_pages=6, num_host_pages=6)
    for name in ("a", "b", "c", "a", "d"):
        encode(cache, slab, name)
    assert list(slab.host.pages) == ["c", "a", "d"]
    assert cache.num_host_evictions == 1


def test_an_image_larger_than_the_host_memory_is_encoded_without_a_copy_and_evicts_none() -> None:
    cache, slab = single(num_pages=8, num_host_pages=4)
    encode(cache, slab, "a")
    encode(cache, slab, "large", rows=10)
    assert list(slab.host.pages) == ["a"]
    assert cache.num_host_evictions == 0


def test_copies_that_readers_wait_for_are_not_dropped_for_new_ones() -> None:
    cache, slab = single(num_pages=2, num_host_pages=2)
    encode(cache, slab, "a")
    cache.remove(cache.entries[MmHash("a")])
    cache.add_reader(MmHash("a"), RequestId("r1"), (0, 0, 0))
    encode(cache, slab, "b")
    assert list(slab.host.pages) == ["a"]
    cache.remove_reader(MmHash("a"), RequestId("r1"))
    encode(cache, slab, "c")
    assert list(slab.host.pages) == ["c"]
