"""Who holds a GPU's memory, said in one line."""

from __future__ import annotations

import asyncio

import pytest
import torch
from torch import nn

from vlmrt.actors.llm import kv_cache
from vlmrt.actors.models import gpu_memory
from vlmrt.actors.models.gpu_memory import parameter_bytes, usage_text
from vlmrt.runtime.errors import StartupError

GIB = 1 << 30


def test_every_holder_is_named_with_its_size_and_the_option_to_lower() -> None:
    text = usage_text(
        "the KV cache",
        "cuda:0",
        {"the weights of the LLM": 14 * GIB},
        ("--kv-cache-gib", "--embedding-cache-gib"),
        {"embeddings": 2 * GIB},
        allocated=15 * GIB,
        reserved=18 * GIB,
        free=GIB // 2,
        total=79 * GIB,
    )
    assert text == (
        "cuda:0 has no room for the KV cache: of its 79.00 GiB, the weights of the LLM 14.00, embeddings 2.00, "
        "other tensors of this process 1.00, kept by torch for reuse 3.00, other processes and CUDA contexts 58.50, "
        "free 0.50; lower --kv-cache-gib or --embedding-cache-gib"
    )


def test_what_is_small_or_counted_twice_is_left_out() -> None:
    text = usage_text(
        "x", "cuda:0", {"weights": 2 * GIB}, ("--o",), {}, allocated=GIB, reserved=GIB, free=7 * GIB, total=8 * GIB
    )
    assert text == "cuda:0 has no room for x: of its 8.00 GiB, weights 2.00, free 7.00; lower --o"


def test_a_shared_parameter_is_counted_once() -> None:
    first, second = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
    assert parameter_bytes(nn.ModuleList([first, second])) == 2 * 8 * 4 * 4
    second.weight = first.weight
    assert parameter_bytes(nn.ModuleList([first, second])) == 8 * 4 * 4


def test_a_rank_that_runs_out_of_memory_says_who_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 15 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 16 * GIB)
    assert gpu_memory.out_of_memory_text("x", torch.device("cuda:1"), {}, ("--y",)).startswith("cuda:1 has no room")
    for what in kv_cache.TO_LOWER:
        with (
            pytest.raises(StartupError, match=f"no room for {what}: .*the weights of the LLM 14.00.*63.00.*lower --"),
            kv_cache.room_for(what, torch.device("cuda:0"), {kv_cache.WEIGHTS: 14 * GIB}),
        ):
            raise torch.OutOfMemoryError("CUDA out of memory")


async def test_what_a_process_holds_is_told_for_as_long_as_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: {"cuda:1": 3 * GIB}[device])
    told: asyncio.Queue[int] = asyncio.Queue()
    monkeypatch.setattr(gpu_memory, "_WATCH_S", 0.0)
    watching = asyncio.create_task(gpu_memory.watch_held_memory("cuda:1", GIB, told.put_nowait))
    for _ in range(2):
        assert await asyncio.wait_for(told.get(), 20) == 4 * GIB
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
