"""Rows between the slab and host memory, in whatever pages; the same on a GPU."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.support import FakeContext
from vlmrt.actors.vit.host_rows import HostRows
from vlmrt.runtime.messages import MmHash, Restore
from vlmrt.runtime.slab import create_slab, num_pages_for, row_index

NUM_PAGES, HOST_PAGES, PAGE_ROWS, WIDTH = 24, 32, 4, 64
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def draw_pages(rng: random.Random, num_pages: int, limit: int) -> tuple[int, ...]:
    """Neighbours here and there, as a free list in use gives them out."""
    pages = list(range(limit))
    for _ in range(rng.randrange(4)):
        cut = rng.randrange(limit)
        pages = pages[cut:] + pages[:cut][:: rng.choice((1, -1))]
    return tuple(pages[:num_pages])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=[pytest.mark.gpu, needs_gpu])])
def test_rows_go_to_host_memory_and_back_bit_for_bit(device: str, tmp_path: Path) -> None:
    slab = create_slab(
        FakeContext("vit:0", tmp_path, device=device),
        device,
        num_pages=NUM_PAGES,
        page_rows=PAGE_ROWS,
        width=WIDTH,
        dtype="bfloat16",
    )
    host = HostRows(slab, HOST_PAGES)
    target = slab.tensor()
    rng = random.Random(0)
    for number in range(50):
        num_rows = rng.randrange(1, NUM_PAGES * PAGE_ROWS + 1)
        num_pages = num_pages_for(num_rows, PAGE_ROWS)
        host_pages, pages = (draw_pages(rng, num_pages, limit) for limit in (HOST_PAGES, NUM_PAGES))
        rows = torch.randn(num_rows, WIDTH, device=target.device).bfloat16()
        host.save(rows, host_pages)
        if target.is_cuda:
            torch.cuda.synchronize()
        target.fill_(-1)
        if target.is_cuda:
            torch.cuda.synchronize()
        host.restore([Restore(number, MmHash("h"), num_rows, host_pages, pages)])
        index = torch.from_numpy(row_index(pages, 0, num_rows, PAGE_ROWS)).to(target.device)
        assert torch.equal(target[index], rows)
        assert int((target != -1).any(dim=1).sum()) == num_rows
    slab.close()
