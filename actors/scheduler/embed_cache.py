"""The books of the vision embeddings: which rows lie in which ViT's slab, who still has to read them, what goes first.

The ViT owns the memory, this file decides about it.  An entry is an image on its way to a slab or ready in it; readers
are the requests that still have to read an image's rows, whether an entry exists yet or not.  Rows that could not be
had again, since nobody has the image's bytes, may be held as well: they are neither evicted nor displaced.  Rows that
are neither to be read nor held are the cache, evicted least recently used first and only when pages are needed; pages
read by a step in flight are lent, and wait for its end.  The second tier, copies in a ViT's host memory, is written as
rows are encoded and outlives the entry; rows are restored from it to the slab of the same ViT.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from vlmrt.actors.scheduler.host_copies import HostCopies
from vlmrt.actors.scheduler.request import MediaKey
from vlmrt.runtime.messages import ActorName, Epoch, MmHash, RequestId, SlabExport
from vlmrt.runtime.slab import SlabBooks, num_pages_for, slab_bytes


@dataclass(slots=True, eq=False)
class Entry:
    """One image's rows in one incarnation of a ViT."""

    mm_hash: MmHash
    grid_thw: tuple[int, int, int]
    vit: ActorName
    epoch: Epoch
    pages: tuple[int, ...]
    num_rows: int
    host_pages: tuple[int, ...] = ()  # where its encode keeps a copy; () once that is made
    is_ready: bool = False


@dataclass(slots=True, eq=False)
class Slab:
    """The slab of a ViT that is up, and the host memory behind it."""

    vit: ActorName
    epoch: Epoch
    export: SlabExport
    books: SlabBooks
    host: HostCopies
    idle: OrderedDict[MmHash, Entry] = field(default_factory=OrderedDict)  # ready, neither; next to go first
    pinned: dict[MmHash, Entry] = field(default_factory=dict)  # ready, with readers or held
    num_ready_pages: int = 0
    num_encoding_patches: int = 0

    @property
    def page_bytes(self) -> int:
        return slab_bytes(1, self.export.page_rows, self.export.width, self.export.dtype)

    def num_pages_for(self, num_rows: int) -> int:
        return num_pages_for(num_rows, self.export.page_rows)


class EmbedCache:
    """Entries by mm_hash, over the slabs of the ViTs that are up.

    With enabled=False rows go with the last reader, and nothing is kept in host memory.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.slabs: dict[ActorName, Slab] = {}
        self.entries: dict[MmHash, Entry] = {}
        self.readers: dict[MmHash, dict[RequestId, MediaKey]] = {}
        self.holds: dict[MmHash, int] = {}  # how many hold the rows, whether an entry exists yet or not
        self.num_evictions = 0
        self.num_host_evictions = 0

    # ------------------------------------------------------------ slabs

    def add_slab(self, vit: ActorName, epoch: Epoch, export: SlabExport, num_host_pages: int) -> None:
        host = HostCopies(num_host_pages if self.enabled else 0)
        self.slabs[vit] = Slab(vit, epoch, export, SlabBooks(export.num_pages), host)

    def drop_slab(self, vit: ActorName) -> list[Entry]:
        """Forget a dead incarnation with both its tiers; returns its entries, for their readers need them anew."""
        slab = self.slabs.pop(vit)
        lost = [entry for entry in self.entries.values() if entry.vit == vit and entry.epoch == slab.epoch]
        for entry in lost:
            del self.entries[entry.mm_hash]
        return lost

    # ------------------------------------------------------------ readers

    def ready_entry(self, mm_hash: MmHash) -> Entry | None:
        entry = self.entries.get(mm_hash)
        return entry if entry is not None and entry.is_ready else None

    def host_slab(self, mm_hash: MmHash) -> Slab | None:
        """The slab of the ViT that has these rows in its host memory."""
        return next((slab for slab in self.slabs.values() if mm_hash in slab.host.pages), None)

    def add_reader(self, mm_hash: MmHash, request_id: RequestId, key: MediaKey) -> None:
        """This request has to read the rows; ready rows are pinned, or else their copy in host memory is."""
        self.readers.setdefault(mm_hash, {})[request_id] = key
        host_slab = self.host_slab(mm_hash)
        if host_slab is not None:
            host_slab.host.touch(mm_hash)
        self._pin(mm_hash)

    def remove_reader(self, mm_hash: MmHash, request_id: RequestId) -> bool:
        """This request need not read them any more.  Returns whether nobody need."""
        readers = self.readers[mm_hash]
        del readers[request_id]
        if readers:
            return False
        del self.readers[mm_hash]
        self._unpin(mm_hash)
        return True

    def first_key(self, mm_hash: MmHash) -> MediaKey:
        """The order of its most urgent reader."""
        return min(self.readers[mm_hash].values())

    def is_known(self, mm_hash: MmHash) -> bool:
        """Whether the rows can be read without the image's bytes."""
        return self.ready_entry(mm_hash) is not None or self.host_slab(mm_hash) is not None

    def hold(self, mm_hash: MmHash) -> None:
        """Keep the rows until let_go; may be called several times."""
        self.holds[mm_hash] = self.holds.get(mm_hash, 0) + 1
        self._pin(mm_hash)

    def let_go(self, mm_hash: MmHash) -> None:
        """Undo one hold."""
        self.holds[mm_hash] -= 1
        if not self.holds[mm_hash]:
            del self.holds[mm_hash]
            self._unpin(mm_hash)

    def _pin(self, mm_hash: MmHash) -> None:
        entry = self.ready_entry(mm_hash)
        if entry is not None:
            slab = self.slabs[entry.vit]
            if slab.idle.pop(mm_hash, None) is not None:
                slab.pinned[mm_hash] = entry

    def _unpin(self, mm_hash: MmHash) -> None:
        """Ready rows are only cached from now on, unless somebody else reads or holds them."""
        entry = self.ready_entry(mm_hash)
        if entry is None or mm_hash in self.readers or mm_hash in self.holds:
            return
        slab = self.slabs[entry.vit]
        del slab.pinned[mm_hash]
        slab.host.touch(mm_hash)
        if self.enabled:
            slab.idle[mm_hash] = entry
        else:
            self.remove(entry)

    # ------------------------------------------------------------ entries

    def begin(
        self,
        mm_hash: MmHash,
        grid_thw: tuple[int, int, int],
        slab: Slab,
        num_rows: int,
        *,
        displace_after: MediaKey | None,
    ) -> tuple[Entry, list[Entry]] | None:
        """Pages for an image about to be encoded or restored; None if they are not to be had now.

        Idle rows are evicted as far as needed.  With displace_after, so are rows that only readers behind that key wait
        for and nobody holds; those are returned, since those readers need them anew.  An image without a copy in host
        memory gets pages for one, if idle copies make room for it.
        """
        num_pages = slab.num_pages_for(num_rows)
        victims = self._victims(slab, num_pages - slab.books.num_free, displace_after)
        if victims is None:
            return None
        for victim in victims:
            self.remove(victim)
        self.num_evictions += len(victims)
        pages = slab.books.allocate(num_pages)
        assert pages is not None, f"{slab.vit}: {num_pages} pages counted as free are not"
        entry = Entry(mm_hash, grid_thw, slab.vit, slab.epoch, pages, num_rows)
        self.entries[mm_hash] = entry
        if mm_hash not in slab.host.pages:
            entry.host_pages = self._allocate_host(slab, num_pages)
        return entry, [victim for victim in victims if victim.mm_hash in self.readers]

    def complete(self, entry: Entry) -> None:
        """Its rows are in the slab, and in host memory where its encode was to keep them."""
        entry.is_ready = True
        slab = self.slabs[entry.vit]
        slab.num_ready_pages += len(entry.pages)
        if entry.host_pages:
            slab.host.add(entry.mm_hash, entry.host_pages)
            entry.host_pages = ()
        if entry.mm_hash in self.readers or entry.mm_hash in self.holds:
            slab.pinned[entry.mm_hash] = entry
        elif self.enabled:
            slab.idle[entry.mm_hash] = entry
        else:
            self.remove(entry)

    def remove(self, entry: Entry) -> None:
        """Forget an entry of a live slab; its pages are free once no step in flight reads them.

        A complete copy in host memory stays.
        """
        slab = self.slabs[entry.vit]
        del self.entries[entry.mm_hash]
        slab.pinned.pop(entry.mm_hash, None)
        slab.idle.pop(entry.mm_hash, None)
        slab.books.free(entry.pages)
        if entry.is_ready:
            slab.num_ready_pages -= len(entry.pages)
        elif entry.host_pages:
            slab.host.books.free(entry.host_pages)

    def forget(self, entry: Entry) -> None:
        """Remove an entry, and its copy in host memory: something is wrong with it."""
        self.remove(entry)
        self.slabs[entry.vit].host.drop(entry.mm_hash)

    def reset(self) -> None:
        """Evict every row that nobody reads or holds, from both tiers."""
        for slab in self.slabs.values():
            for entry in list(slab.idle.values()):
                self.remove(entry)
            for mm_hash in list(slab.host.pages):
                if mm_hash not in self.readers and mm_hash not in self.holds and mm_hash not in self.entries:
                    slab.host.drop(mm_hash)

    def _allocate_host(self, slab: Slab, num_pages: int) -> tuple[int, ...]:
        victims = slab.host.victims(num_pages, self._is_copy_pinned)
        if victims is None:
            return ()
        for mm_hash in victims:
            slab.host.drop(mm_hash)
        self.num_host_evictions += len(victims)
        return slab.host.books.allocate(num_pages) or ()

    def _is_copy_pinned(self, mm_hash: MmHash) -> bool:
        """Whether somebody needs the copy: a restore in flight, or readers or holders whose rows are nowhere else."""
        entry = self.entries.get(mm_hash)
        return (mm_hash in self.readers or mm_hash in self.holds) if entry is None else not entry.is_ready

    def _victims(self, slab: Slab, num_missing: int, displace_after: MediaKey | None) -> list[Entry] | None:
        """What to evict to gain num_missing pages: idle rows, then those wanted last.  None if that is too little."""
        victims: list[Entry] = []
        if num_missing <= 0:
            return victims
        candidates = list(slab.idle.values())
        if displace_after is not None:
            free = [entry for mm_hash, entry in slab.pinned.items() if mm_hash not in self.holds]
            pinned = [(self.first_key(entry.mm_hash), entry) for entry in free]
            pinned = [(key, entry) for key, entry in pinned if key > displace_after]
            candidates += [entry for _, entry in sorted(pinned, key=lambda pair: pair[0], reverse=True)]
        for entry in candidates:
            if not slab.books.is_lent(entry.pages):
                victims.append(entry)
                num_missing -= len(entry.pages)
                if num_missing <= 0:
                    return victims
        return None

    # ------------------------------------------------------------ loans

    def lend(self, epoch: Epoch, step: int, entries: Iterable[Entry]) -> None:
        """That step of that TP group reads the pages of these entries."""
        for entry in entries:
            self.slabs[entry.vit].books.lend(entry.pages, epoch, step)

    def end_step(self, epoch: Epoch, step: int) -> None:
        """The step has copied what it read."""
        for slab in self.slabs.values():
            slab.books.give_back(epoch, step)

    def drop_borrower(self, epoch: Epoch) -> None:
        """That TP group is gone."""
        for slab in self.slabs.values():
            slab.books.drop_borrower(epoch)
