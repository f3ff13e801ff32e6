"""A scheduler small enough to read at once: it hands out slots and blocks and drives a Runner by StepPlans."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from vlmrt.actors.llm.grammar import GrammarCompiler
from vlmrt.actors.llm.kv_cache import allocate, block_shape, by_layer
from vlmrt.actors.llm.kv_host_tier import KvHostTier
from vlmrt.actors.llm.runner import PendingStep, Runner
from vlmrt.actors.llm.slots import Slots
from vlmrt.actors.models.config import ModelConfig
from vlmrt.actors.models.layers import TensorParallel
from vlmrt.actors.models.qwen2_vl.language import LanguageModel
from vlmrt.actors.models.rope_index import MediaSpan, rope_delta
from vlmrt.runtime.host_buffer import HostBuffer
from vlmrt.runtime.messages import (
    ActorName,
    BlockCopy,
    EmbedSlice,
    Epoch,
    HostSlabExport,
    MediaItem,
    MmHash,
    NewSequence,
    RequestId,
    Sampling,
    StepPlan,
    StepResult,
    StepRow,
    TokenLogprobs,
)
from vlmrt.runtime.slab import SlabDtype

VIT = ActorName("vit:0")
VIT_EPOCH = Epoch(3)
BLOCK_SIZE = 4
PAGE_ROWS = 3
NUM_SLOTS = 6
NUM_BLOCKS = 160
MAX_MODEL_LEN = 300
GREEDY = Sampling(temperature=0.0)


class RowPages(Protocol):
    """Where a prompt of these tests puts its image rows: pages are taken from the end of free_pages."""

    page_rows: int
    free_pages: list[int]

    def tensor(self) -> Tensor: ...


class FakeSlab:
    """An EmbeddingSlab in plain memory."""

    def __init__(self, num_pages: int, page_rows: int, width: int, device: str = "cpu") -> None:
        self.num_pages = num_pages
        self.page_rows = page_rows
        self.width = width
        self.dtype: SlabDtype = "float32"
        self.closed = False
        self.free_pages = random.Random(0).sample(range(num_pages), num_pages)
        self._rows = torch.full((num_pages * page_rows, width), float("nan"), device=device)

    def tensor(self) -> Tensor:
        return self._rows

    def export(self) -> HostSlabExport:
        return HostSlabExport("fake", self.num_pages, self.page_rows, self.width, self.dtype)

    def close(self) -> None:
        self.closed = True


@dataclass
class Request:
    """A prompt, where the rows of its images lie, and how far it is."""

    token_ids: list[int]
    media: tuple[MediaItem, ...] = ()
    pages: dict[int, tuple[int, ...]] = field(default_factory=dict)  # by index in media
    sampling: Sampling = GREEDY
    merge_size: int = 2
    num_prompt_tokens: int = 0
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_planned: int = 0  # tokens of the sequence, those not known yet included

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def rope_delta(self) -> int:
        spans = [
            MediaSpan(item.start, item.num_tokens, item.grid_thw, item.time_offset, item.continues)
            for item in self.media
        ]
        return rope_delta(self.num_prompt_tokens, spans, self.merge_size)

    def embeds(self, start: int, stop: int) -> tuple[EmbedSlice, ...]:
        """The image rows of the tokens [start, stop)."""
        slices = []
        for index, item in enumerate(self.media):
            first, last = max(start, item.start), min(stop, item.start + item.num_tokens)
            if first < last:
                slices.append(
                    EmbedSlice(VIT, VIT_EPOCH, self.pages[index], first - item.start, last - first, first - start)
                )
        return tuple(slices)


def media_item(name: str, start: int, grid_thw: tuple[int, int, int], merge_size: int = 2) -> MediaItem:
    frames, height, width = grid_thw
    return MediaItem(MmHash(name), start, frames * height * width // merge_size**2, grid_thw)


class Driver:
    """Plans steps for the requests that run, one ahead of what is known if asked to."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.free_slots = list(range(NUM_SLOTS))
        self.free_blocks = list(range(NUM_BLOCKS - 1, -1, -1))
        self.to_release: list[int] = []
        self.to_admit: list[NewSequence] = []
        self.step = 0

    def admit(self, request: Request, shared_blocks: Sequence[int] = ()) -> None:
        """Into a slot; tokens in shared_blocks (full blocks of another request) count as computed."""
        request.slot = self.free_slots.pop(0)
        request.blocks = list(shared_blocks)
        request.num_computed = len(shared_blocks) * BLOCK_SIZE
        request.num_planned = len(request.token_ids)
        self.to_admit.append(
            NewSequence(
                request.slot,
                RequestId(f"request in slot {request.slot}"),
                tuple(request.token_ids),
                request.num_prompt_tokens,
                request.media,
                request.rope_delta,
                request.sampling,
                tuple(shared_blocks),
            )
        )

    def release(self, request: Request, shared_blocks: int = 0) -> None:
        """Out of its slot at the next step; the first shared_blocks stay with others."""
        self.to_release.append(request.slot)
        self.free_slots.append(request.slot)
        self.free_blocks.extend(request.blocks[shared_blocks:])
        request.slot = -1

    def plan(
        self,
        rows: Sequence[tuple[Request, int]],
        saves: tuple[BlockCopy, ...] = (),
        loads: tuple[BlockCopy, ...] = (),
    ) -> StepPlan:
        """A step that runs so many tokens of each; decode rows must come first."""
        step_rows = []
        for request, num_tokens in rows:
            start, stop = request.num_computed, request.num_computed + num_tokens
            new_blocks: list[int] = []
            while (len(request.blocks) + len(new_blocks)) * BLOCK_SIZE < stop:
                new_blocks.append(self.free_blocks.pop())
            request.blocks += new_blocks
            sample = stop == request.num_planned
            embeds = request.embeds(start, stop)
            step_rows.append(StepRow(request.slot, start, num_tokens, tuple(new_blocks), sample, embeds))
            request.num_computed = stop
            request.num_planned += sample
        plan = StepPlan(self.step, tuple(self.to_release), tuple(self.to_admit), tuple(step_rows), saves, loads)
        self.step += 1
        self.to_release, self.to_admit = [], []
        return plan

    def take(self, rows: Sequence[tuple[Request, int]], plan: StepPlan, result: StepResult) -> None:
        """Append what a step sampled; rows that failed have no token."""
        assert result.step == plan.step
        failed = {failure.row for failure in result.failed}
        pairs = [pair for index, pair in enumerate(zip(rows, plan.rows, strict=True)) if index not in failed]
        sampling = [request for (request, _), row in pairs if row.sample]
        assert len(result.logprobs) in (0, len(sampling))
        logprobs = result.logprobs or (None,) * len(sampling)
        for request, token_id, found in zip(sampling, result.token_ids, logprobs, strict=True):
            request.token_ids.append(token_id)
            request.logprobs += [] if found is None else [found]

    def run(
        self,
        rows: Sequence[tuple[Request, int]],
        saves: tuple[BlockCopy, ...] = (),
        loads: tuple[BlockCopy, ...] = (),
    ) -> StepResult:
        plan = self.plan(rows, saves, loads)
        result = self.runner.complete(self.runner.launch(plan))
        self.take(rows, plan, result)
        return result

    def prefill(self, request: Request, chunk: int = 10_000) -> None:
        """The rest of a request's tokens, in chunks; the last one samples."""
        num_tokens = request.num_planned
        while request.num_computed < num_tokens:
            self.run([(request, min(chunk, num_tokens - request.num_computed))])

    def decode(self, requests: Sequence[Request], num_steps: int, one_ahead: bool = True) -> None:
        """Generate num_steps tokens each; one_ahead plans and launches a step before the one before it is complete."""
        running: tuple[list[tuple[Request, int]], StepPlan, PendingStep] | None = None
        for _ in range(num_steps):
            rows = [(request, 1) for request in requests]
            plan = self.plan(rows)
            launched = (rows, plan, self.runner.launch(plan))
            if running is not None:
                self.take(running[0], running[1], self.runner.complete(running[2]))
            running = launched
            if not one_ahead:
                self.take(rows, plan, self.runner.complete(launched[2]))
                running = None
        if running is not None:
            self.take(running[0], running[1], self.runner.complete(running[2]))


def make_runner(
    model: LanguageModel,
    config: ModelConfig,
    tp: TensorParallel,
    slab: FakeSlab | None = None,
    device: str = "cpu",
    num_host_blocks: int = 0,
    compiler: GrammarCompiler | None = None,
) -> Runner:
    on = torch.device(device)
    cache = allocate(NUM_BLOCKS, BLOCK_SIZE, config.text, tp.size, torch.float32, on)
    cache.fill_(float("nan"))  # unwritten slots hold what an earlier request left: it must not matter
    host_tier = None
    if num_host_blocks:
        shape = block_shape(config.text, tp.size, BLOCK_SIZE)
        host = HostBuffer((num_host_blocks, *shape), torch.float32, on, "--kv-host-cache-gib")
        host_tier = KvHostTier(cache, host)
    slots = Slots(NUM_SLOTS, MAX_MODEL_LEN, BLOCK_SIZE)
    merge_size = config.vision.spatial_merge_size
    runner = Runner(
        model, by_layer(cache), slots, merge_size, on, tp_size=tp.size, host_tier=host_tier, compiler=compiler
    )
    if slab is not None:
        runner.attach((VIT, VIT_EPOCH), slab)
    return runner
