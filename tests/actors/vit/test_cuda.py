"""The same tower on a GPU, its slab in device memory."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from tests.actors.vit.conftest import Checkpoint
from tests.actors.vit.test_actor import PAGE_ROWS, SCHEDULER, SIZES, picture
from tests.support import FakeContext, FakeMemory, make_config, peer_up
from vlmrt.actors.vit.actor import VitActor
from vlmrt.actors.vit.loading import load_encoder
from vlmrt.runtime.actor import ActorContext
from vlmrt.runtime.config import MemoryOptions, ParallelOptions
from vlmrt.runtime.control_messages import SchedulerReady
from vlmrt.runtime.messages import CudaSlabExport, EmbedsReady, Encode, MmHash, Restore
from vlmrt.runtime.shared_memory import PixelArena
from vlmrt.runtime.slab import num_pages_for, row_index

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


async def test_rows_in_device_memory_equal_the_reference_and_come_back_from_host_memory(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config = make_config(
        checkpoint.directory,
        memory=MemoryOptions(embedding_cache_gib=1 / 64, embedding_host_cache_gib=1 / 64, page_rows=PAGE_ROWS),
        parallel=ParallelOptions(device="cuda", max_patches_per_batch=100),
    )
    memory = FakeMemory()
    async with FakeContext("vit:0", tmp_path, config, device="cuda:0", memory=memory) as context:
        encoder = load_encoder(cast(ActorContext, context))
        actor = VitActor(cast(ActorContext, context), lambda _: encoder)
        ready = await actor.start()
        assert isinstance(ready.slab, CudaSlabExport)
        await actor.peer_up(peer_up("scheduler:0", SchedulerReady()))
        arena = PixelArena.create(FakeContext("media:0", tmp_path, config, memory=memory), 1 << 22)
        messages, first_page = [], 5
        for number, size in enumerate(SIZES):
            each = picture(number, size)
            ref = arena.write(each.pixels)
            assert ref is not None
            num_pages = num_pages_for(each.num_rows, PAGE_ROWS)
            pages = tuple(reversed(range(first_page, first_page + num_pages)))
            first_page += num_pages
            height, width = each.pixels.shape[1:3]
            kept = tuple(page + 7 for page in pages)
            messages.append(Encode(number, MmHash("h"), each.grid_thw, ref, (1, height, width, 3), pages, kept))
            await actor.handle(messages[-1], SCHEDULER)
        for _ in messages:
            answer = (await context.outbox.next(60.0)).message
            assert isinstance(answer, EmbedsReady), answer
        for number, (message, size) in enumerate(zip(messages, SIZES, strict=True)):
            expected = picture(number, size).rows(checkpoint)
            index = torch.from_numpy(row_index(message.pages, 0, len(expected), PAGE_ROWS)).cuda()
            rows = encoder.slab.tensor()[index].cpu()
            assert (rows - expected).abs().max() <= 1e-4 * expected.abs().max()
        encoded = encoder.slab.tensor().clone()
        for message, size in zip(messages, SIZES, strict=True):
            num_rows = size[0] * size[1] // 4
            moved = tuple(page + first_page for page in message.pages)
            await actor.handle(Restore(message.encode_id, MmHash("h"), num_rows, message.host_pages, moved), SCHEDULER)
            restored = (await context.outbox.next(60.0)).message
            assert isinstance(restored, EmbedsReady)
            assert restored.num_rows == num_rows
            before, after = (torch.from_numpy(row_index(p, 0, num_rows, PAGE_ROWS)) for p in (message.pages, moved))
            assert torch.equal(encoder.slab.tensor()[after.cuda()], encoded[before.cuda()])
        await actor.stop(5.0)
        arena.close()
