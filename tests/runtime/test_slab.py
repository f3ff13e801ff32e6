"""Pages of the embedding slab: the books against a simple model, coordinates, and rows seen by another opener."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from tests.support import FakeContext, FakeMemory
from vlmrt.runtime.messages import Epoch, HostSlabExport
from vlmrt.runtime.slab import HostSlab, SlabBooks, SlabDtype, create_slab, num_pages_for, open_slab, row_index

NUM_PAGES = 12


class BooksAgainstModel(RuleBasedStateMachine):
    """The model: who owns and who reads each page, as plain sets."""

    owned = Bundle("owned")

    def __init__(self) -> None:
        super().__init__()
        self.books = SlabBooks(NUM_PAGES)
        self.owners: set[tuple[int, ...]] = set()
        self.readers: dict[tuple[int, ...], set[tuple[int, int]]] = {}

    @rule(target=owned, num_pages=st.integers(1, 5))
    def allocate(self, num_pages: int) -> object:
        in_use = {page for extent in self.owners | set(self.readers) for page in extent}
        pages = self.books.allocate(num_pages)
        if pages is None:
            assert num_pages > NUM_PAGES - len(in_use)
            return multiple()
        assert len(set(pages)) == num_pages
        assert not set(pages) & in_use
        self.owners.add(pages)
        return pages

    @rule(pages=owned, epoch=st.integers(1, 3), step=st.integers(0, 5))
    def lend(self, pages: tuple[int, ...], epoch: int, step: int) -> None:
        self.books.lend(pages, Epoch(epoch), step)
        self.readers.setdefault(pages, set()).add((epoch, step))

    @rule(pages=consumes(owned))
    def free(self, pages: tuple[int, ...]) -> None:
        assert self.books.free(pages) == (pages not in self.readers)
        self.owners.remove(pages)

    @rule(epoch=st.integers(1, 3), step=st.integers(0, 5))
    def give_back(self, epoch: int, step: int) -> None:
        assert self.books.give_back(Epoch(epoch), step) == self._end_loans({(epoch, step)})

    @rule(epoch=st.integers(1, 3))
    def drop_borrower(self, epoch: int) -> None:
        assert self.books.drop_borrower(Epoch(epoch)) == self._end_loans({(epoch, step) for step in range(6)})

    def _end_loans(self, loans: set[tuple[int, int]]) -> int:
        num_freed = 0
        for pages in list(self.readers):
            self.readers[pages] -= loans
            if not self.readers[pages]:
                del self.readers[pages]
                num_freed += len(pages) if pages not in self.owners else 0
        return num_freed

    @invariant()
    def books_agree(self) -> None:
        self.books.check()
        in_use = {page for extent in self.owners | set(self.readers) for page in extent}
        assert self.books.num_free == NUM_PAGES - len(in_use)
        assert self.books.num_loans == sum(map(len, self.readers.values()))


TestBooksAgainstModel = BooksAgainstModel.TestCase
TestBooksAgainstModel.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)


def test_ten_thousand_random_operations_keep_the_books_exact() -> None:
    rng = random.Random(7)
    books = SlabBooks(64)
    owned: list[tuple[int, ...]] = []
    for step in range(10_000):
        match rng.randrange(5):
            case 0 | 1:
                pages = books.allocate(rng.randrange(1, 9))
                owned += [pages] if pages else []
            case 2 if owned:
                books.free(owned.pop(rng.randrange(len(owned))))
            case 3 if owned:
                books.lend(rng.choice(owned), Epoch(1 + step // 2500), step)
            case _:
                books.give_back(Epoch(1 + step // 2500), step - rng.randrange(20))
        books.check()
    for pages in owned:
        books.free(pages)
    for epoch in range(1, 5):
        books.drop_borrower(Epoch(epoch))
    books.check()
    assert books.num_free == 64


def test_pages_dropped_while_on_loan_are_free_when_the_last_loan_ends() -> None:
    books = SlabBooks(2)
    pages = books.allocate(2)
    assert pages is not None
    books.lend(pages, Epoch(1), 5)
    books.lend(pages, Epoch(1), 6)
    assert not books.free(pages)
    assert books.give_back(Epoch(1), 5) == 0
    assert books.allocate(1) is None
    assert books.give_back(Epoch(1), 6) == 2
    assert books.num_free == 2


def test_what_is_not_owned_cannot_be_freed_or_lent() -> None:
    books = SlabBooks(4)
    pages = books.allocate(2)
    assert pages is not None
    books.lend(pages, Epoch(1), 1)
    books.free(pages)
    for wrong in (pages, pages[:1], (), (3,)):
        with pytest.raises(ValueError, match="not allocated"):
            books.free(wrong)
        with pytest.raises(ValueError, match="not allocated"):
            books.lend(wrong, Epoch(1), 2)


@pytest.mark.parametrize(("num_rows", "num_pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_pages_for_rows(num_rows: int, num_pages: int) -> None:
    assert num_pages_for(num_rows, 16) == num_pages


def test_row_index_follows_the_pages() -> None:
    assert row_index((3, 0), 2, 5, 4).tolist() == [14, 15, 0, 1, 2]
    assert row_index((3, 0), 0, 0, 4).tolist() == []
    assert row_index((3,), 0, 4, 4).dtype == np.int64
    for first, count in ((0, 9), (-1, 2), (8, 1)):
        with pytest.raises(ValueError, match="are not in 2 pages"):
            row_index((3, 0), first, count, 4)


@pytest.fixture
def vit(tmp_path: Path) -> Iterator[FakeContext]:
    memory = FakeMemory()
    yield FakeContext("vit:0", tmp_path, memory=memory)
    memory.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_written_by_one_side_are_read_by_the_other(dtype: SlabDtype, vit: FakeContext, tmp_path: Path) -> None:
    slab = create_slab(vit, "cpu", num_pages=4, page_rows=2, width=3, dtype=dtype)
    rank = FakeContext("llm:0", tmp_path, memory=vit.memory)
    opened = open_slab(rank, "cpu", slab.export())
    slab.tensor()[:] = torch.arange(24).view(8, 3)
    assert opened.tensor().shape == (8, 3)
    assert str(opened.tensor().dtype) == f"torch.{dtype}"
    rows = torch.from_numpy(row_index((2, 1), 1, 2, 2))
    assert opened.tensor()[rows].tolist() == [[15, 16, 17], [6, 7, 8]]
    slab.close()
    opened.close()


def test_an_export_larger_than_its_memory_is_refused(vit: FakeContext) -> None:
    slab = HostSlab.create(vit, num_pages=1, page_rows=2, width=3, dtype="float32")
    export = slab.export()
    forged = HostSlabExport(export.memory, 2, export.page_rows, export.width, export.dtype)
    with pytest.raises(ValueError, match="the slab needs 48"):
        HostSlab.open(vit, forged)
    slab.close()
