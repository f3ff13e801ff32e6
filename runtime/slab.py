"""EmbeddingSlab: a ViT's rows in one allocation of pages, read in place by LLM ranks; SlabBooks: who has which page.

The memory belongs to one incarnation of a ViT; who may use which page is decided by the scheduler alone (SlabBooks).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from vlmrt.runtime.messages import Epoch, HostSlabExport, SlabExport
from vlmrt.runtime.shared_memory import HostMemory, MemoryAccess, memory_name

if TYPE_CHECKING:
    import torch

SlabDtype = Literal["float32", "bfloat16", "float16"]
DTYPE_BYTES: dict[SlabDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


def num_pages_for(num_rows: int, page_rows: int) -> int:
    """Pages that hold this many rows."""
    return -(-num_rows // page_rows)


def row_index(pages: tuple[int, ...], first_row: int, num_rows: int, page_rows: int) -> npt.NDArray[np.int64]:
    """Rows of the slab that hold rows [first_row, first_row + num_rows) of an image in these pages, int64 [num_rows].

    Raises ValueError if the pages do not hold them.
    """
    if first_row < 0 or num_rows < 0 or first_row + num_rows > len(pages) * page_rows:
        raise ValueError(f"rows {first_row}..{first_row + num_rows} are not in {len(pages)} pages of {page_rows} rows")
    rows = np.arange(first_row, first_row + num_rows, dtype=np.int64)
    return np.asarray(pages, dtype=np.int64)[rows // page_rows] * page_rows + rows % page_rows


class EmbeddingSlab(Protocol):
    """The same on the side that made it and on the sides that opened it."""

    num_pages: int
    page_rows: int
    width: int
    dtype: SlabDtype

    def tensor(self) -> torch.Tensor:
        """A view of the whole slab, [num_pages * page_rows, width]."""
        ...

    def export(self) -> SlabExport:
        """What a reader needs to open it."""
        ...

    def close(self) -> None:
        """Unmap or free it; tensors of it must not be used any more."""
        ...


class HostSlab:
    """In a memfd, for processes of one host without a GPU."""

    def __init__(self, memory: HostMemory, export: HostSlabExport) -> None:
        """Raises ValueError if the memory is smaller than the slab."""
        self.num_pages = export.num_pages
        self.page_rows = export.page_rows
        self.width = export.width
        self.dtype = export.dtype
        self._memory = memory
        self._export = export
        needed = slab_bytes(export.num_pages, export.page_rows, export.width, export.dtype)
        if memory.num_bytes < needed:
            raise ValueError(f"{export.memory} has {memory.num_bytes} bytes, the slab needs {needed}")

    @classmethod
    def create(cls, context: MemoryAccess, *, num_pages: int, page_rows: int, width: int, dtype: SlabDtype) -> HostSlab:
        """This incarnation's slab.  Raises StartupError if the supervisor refuses its size."""
        name = memory_name("slab", context.name, context.epoch)
        num_bytes = slab_bytes(num_pages, page_rows, width, dtype)
        memory = HostMemory.adopt(context.create_memory(name, num_bytes))
        return cls(memory, HostSlabExport(name, num_pages, page_rows, width, dtype))

    @classmethod
    def open(cls, context: MemoryAccess, export: HostSlabExport) -> HostSlab:
        """A peer's slab.  Raises KeyError if that incarnation is gone."""
        return cls(HostMemory.adopt(context.open_memory(export.memory)), export)

    def tensor(self) -> torch.Tensor:
        """A view of the whole slab, [num_pages * page_rows, width]."""
        import torch

        num_rows = self.num_pages * self.page_rows
        dtype: torch.dtype = getattr(torch, self.dtype)
        flat = torch.frombuffer(self._memory.buffer, dtype=dtype, count=num_rows * self.width)
        return flat.view(num_rows, self.width)

    def export(self) -> HostSlabExport:
        return self._export

    def close(self) -> None:
        """Unmap; where tensors still look into it, the mapping goes with the last of them."""
        self._memory.close()


def slab_bytes(num_pages: int, page_rows: int, width: int, dtype: SlabDtype) -> int:
    return num_pages * page_rows * width * DTYPE_BYTES[dtype]


def create_slab(
    context: MemoryAccess, device: str, *, num_pages: int, page_rows: int, width: int, dtype: SlabDtype
) -> EmbeddingSlab:
    """A ViT's slab on its device, "cpu" or "cuda:<ordinal>"."""
    if device == "cpu":
        return HostSlab.create(context, num_pages=num_pages, page_rows=page_rows, width=width, dtype=dtype)
    from vlmrt.runtime.cuda_ipc import CudaSlab

    ordinal = int(device.removeprefix("cuda:"))
    return CudaSlab.create(ordinal, num_pages=num_pages, page_rows=page_rows, width=width, dtype=dtype)


def open_slab(context: MemoryAccess, device: str, export: SlabExport) -> EmbeddingSlab:
    """A ViT's slab as a reader on this device sees it.  Raises KeyError if that incarnation is gone."""
    if isinstance(export, HostSlabExport):
        return HostSlab.open(context, export)
    from vlmrt.runtime.cuda_ipc import CudaSlab

    return CudaSlab.open(int(device.removeprefix("cuda:")), export)


# ---------------------------------------------------------------- the books

Loan = tuple[Epoch, int]  # borrower's epoch, step


@dataclass
class _Extent:
    """Pages handed out together."""

    pages: tuple[int, ...]
    loans: set[Loan] = field(default_factory=set)
    dropped: bool = False  # nobody owns it any more; free when the last loan ends


class SlabBooks:
    """Pages of one ViT incarnation: who has them, who reads them.  Pure.

    An extent is what one `allocate` returned and is named by that tuple.  A loan is a step of an LLM incarnation that
    reads the extent.  Freed while on loan, an extent keeps its pages until its last loan ends.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # the end is handed out next
        self._extents: dict[int, _Extent] = {}  # by first page
        self._loans: dict[Loan, set[int]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_loans(self) -> int:
        """Pairs of an extent and a step that reads it."""
        return sum(len(firsts) for firsts in self._loans.values())

    def allocate(self, num_pages: int) -> tuple[int, ...] | None:
        """Pages, not necessarily neighbours, or None if fewer are free.  Raises ValueError if num_pages < 1."""
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}, must be at least 1")
        if num_pages > len(self._free):
            return None
        pages = tuple(self._free.pop() for _ in range(num_pages))
        self._extents[pages[0]] = _Extent(pages)
        return pages

    def free(self, pages: tuple[int, ...]) -> bool:
        """The owner lets go.  True if the pages are free now, False if they wait for loans to end.

        Raises ValueError if these pages are no extent, or were freed before.
        """
        extent = self._owned(pages)
        extent.dropped = True
        return self._release_if_unused(extent)

    def lend(self, pages: tuple[int, ...], epoch: Epoch, step: int) -> None:
        """This step of this LLM incarnation reads the extent; twice is once.  Raises ValueError if it is not owned."""
        extent = self._owned(pages)
        extent.loans.add((epoch, step))
        self._loans.setdefault((epoch, step), set()).add(pages[0])

    def is_lent(self, pages: tuple[int, ...]) -> bool:
        return bool(self._owned(pages).loans)

    def give_back(self, epoch: Epoch, step: int) -> int:
        """That step has copied what it read.  Returns the number of pages that became free; unknown steps free none."""
        num_freed = 0
        for first in self._loans.pop((epoch, step), ()):
            extent = self._extents[first]
            extent.loans.discard((epoch, step))
            if self._release_if_unused(extent):
                num_freed += len(extent.pages)
        return num_freed

    def drop_borrower(self, epoch: Epoch) -> int:
        """That LLM incarnation is gone and reads nothing any more.  Returns the number of pages that became free."""
        return sum(self.give_back(*loan) for loan in [loan for loan in self._loans if loan[0] == epoch])

    def check(self) -> None:
        """Raise AssertionError unless every page is in exactly one place and both views of the loans agree."""
        pages = [*self._free, *(page for extent in self._extents.values() for page in extent.pages)]
        assert sorted(pages) == list(range(self.num_pages)), "a page is lost or in two places"
        for first, extent in self._extents.items():
            assert extent.pages[0] == first
            assert extent.loans or not extent.dropped, f"dropped extent {extent.pages} has no loan but is not free"
            assert all(first in self._loans[loan] for loan in extent.loans)
        for loan, firsts in self._loans.items():
            assert firsts, f"loan {loan} of nothing"
            assert all(loan in self._extents[first].loans for first in firsts)

    def _owned(self, pages: tuple[int, ...]) -> _Extent:
        extent = self._extents.get(pages[0]) if pages else None
        if extent is None or extent.pages != pages or extent.dropped:
            raise ValueError(f"pages {pages} are not allocated")
        return extent

    def _release_if_unused(self, extent: _Extent) -> bool:
        if extent.loans or not extent.dropped:
            return False
        del self._extents[extent.pages[0]]
        self._free.extend(reversed(extent.pages))
        return True
