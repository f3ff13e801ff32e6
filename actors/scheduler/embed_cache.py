"""The books of the vision embeddings: which rows lie in which ViT's slab, who still has to read them, what goes first.

The ViT owns the memory, this file decides about it.  An entry is an image being encoded or ready; readers are the
requests that still have to read an image's rows, whether an entry exists yet or not.  Rows that could not be had again,
since nobody has the image's bytes, may be held as well: they are neither evicted nor displaced.  Rows that are neither
to be read nor held are the cache, evicted least recently used first and only when pages are needed; pages read by a
step in flight are lent, and wait for its end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from vlmrt.actors.scheduler.request import MediaKey
from vlmrt.runtime.messages import ActorName, Epoch, MmHash, RequestId, SlabExport
from vlmrt.runtime.slab import SlabBooks, num_pages_for


@dataclass(slots=True, eq=False)
class Entry:
    """One image's rows in one incarnation of a ViT."""

    mm_hash: MmHash
    grid_thw: tuple[int, int, int]
    vit: ActorName
    epoch: Epoch
    pages: tuple[int, ...]
    num_rows: int
    is_ready: bool = False


@dataclass(slots=True, eq=False)
class Slab:
    """The slab of a ViT that is up."""

    vit: ActorName
    epoch: Epoch
    export: SlabExport
    books: SlabBooks
    idle: OrderedDict[MmHash, Entry] = field(default_factory=OrderedDict)  # ready, neither; next to go first
    pinned: dict[MmHash, Entry] = field(default_factory=dict)  # ready, with readers or held
    num_encoding_patches: int = 0

    def num_pages_for(self, num_rows: int) -> int:
        return num_pages_for(num_rows, self.export.page_rows)


class EmbedCache:
    """Entries by mm_hash, over the slabs of the ViTs that are up.  With enabled=False rows go with the last reader."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.slabs: dict[ActorName, Slab] = {}
        self.entries: dict[MmHash, Entry] = {}
        self.readers: dict[MmHash, dict[RequestId, MediaKey]] = {}
        self.holds: dict[MmHash, int] = {}  # how many hold the rows, whether an entry exists yet or not
        self.num_evictions = 0

    # ------------------------------------------------------------ slabs

    def add_slab(self, vit: ActorName, epoch: Epoch, export: SlabExport) -> None:
        self.slabs[vit] = Slab(vit, epoch, export, SlabBooks(export.num_pages))

    def drop_slab(self, vit: ActorName) -> list[Entry]:
        """Forget a dead incarnation; returns what it held, for its readers need it anew."""
        slab = self.slabs.pop(vit)
        lost = [entry for entry in self.entries.values() if entry.vit == vit and entry.epoch == slab.epoch]
        for entry in lost:
            del self.entries[entry.mm_hash]
        return lost

    # ------------------------------------------------------------ readers

    def ready_entry(self, mm_hash: MmHash) -> Entry | None:
        entry = self.entries.get(mm_hash)
        return entry if entry is not None and entry.is_ready else None

    def add_reader(self, mm_hash: MmHash, request_id: RequestId, key: MediaKey) -> None:
        """This request has to read the rows; ready rows are pinned."""
        self.readers.setdefault(mm_hash, {})[request_id] = key
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
        return self.ready_entry(mm_hash) is not None

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
        """Pages for an image about to be encoded; None if they are not to be had now.

        Idle rows are evicted as far as needed.  With displace_after, so are rows that only readers behind that key wait
        for and nobody holds; those are returned, since those readers need them anew.
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
        return entry, [victim for victim in victims if victim.mm_hash in self.readers]

    def complete(self, entry: Entry) -> None:
        """Its rows are in the slab."""
        entry.is_ready = True
        slab = self.slabs[entry.vit]
        if entry.mm_hash in self.readers or entry.mm_hash in self.holds:
            slab.pinned[entry.mm_hash] = entry
        elif self.enabled:
            slab.idle[entry.mm_hash] = entry
        else:
            self.remove(entry)

    def remove(self, entry: Entry) -> None:
        """Forget an entry of a live slab; its pages are free once no step in flight reads them."""
        slab = self.slabs[entry.vit]
        del self.entries[entry.mm_hash]
        slab.pinned.pop(entry.mm_hash, None)
        slab.idle.pop(entry.mm_hash, None)
        slab.books.free(entry.pages)

    def reset(self) -> None:
        """Evict every row that nobody reads."""
        for slab in self.slabs.values():
            for entry in list(slab.idle.values()):
                self.remove(entry)

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
