"""The shell of a rank: order, epochs of the scheduler, failures, stuck steps."""

from __future__ import annotations

import asyncio
import gzip
import threading
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch

from tests.actors.llm.conftest import Checkpoint
from tests.support import FakeContext, make_config, peer_down, peer_up
from vlmrt.actors.llm.actor import LlmActor, StepStuck
from vlmrt.actors.llm.kv_cache import block_bytes
from vlmrt.actors.llm.step_thread import OpenedSlab, Rank
from vlmrt.runtime.actor import ActorContext
from vlmrt.runtime.config import MemoryOptions, SchedulingOptions, SupervisionOptions
from vlmrt.runtime.control_messages import LlmReady, SchedulerReady
from vlmrt.runtime.errors import ChannelFull, StartupError
from vlmrt.runtime.messages import (
    ActorName,
    AttachSlab,
    DetachSlab,
    EmbedSlice,
    Epoch,
    NewSequence,
    RequestId,
    Sampling,
    StepPlan,
    StepResult,
    StepRow,
)
from vlmrt.runtime.questions import ListRequests, Profiling, StartProfile, StopProfile, Unable
from vlmrt.runtime.slab import HostSlab

SCHEDULER = ActorName("scheduler:0")
UP = peer_up("scheduler:0", SchedulerReady())


class FakeRank:
    """Notes what it is made to do; a step waits while `open` is cleared."""

    def __init__(self) -> None:
        self.ready = LlmReady(7, 5, 1024)
        self.log: list[str] = []
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Event()
        self.fail = False

    def attach(self, opened: OpenedSlab) -> None:
        self.log.append(f"attach {opened.epoch}")

    def detach(self, message: DetachSlab) -> None:
        self.log.append(f"detach {message.epoch}")

    def clear(self) -> None:
        self.log.append("clear")

    def agrees(self, key: int) -> bool:
        return True

    def launch(self, plan: StepPlan) -> int:
        self.reached.set()
        assert self.open.wait(30)
        if self.fail:
            raise RuntimeError("a step failed")
        self.log.append(f"step {plan.step}")
        return plan.step

    def is_done(self, pending: int) -> bool:
        return True

    def complete(self, pending: int) -> StepResult:
        return StepResult(pending, (pending + 100,), 1.0)

    def close(self) -> None:
        self.log.append("close")


def plan(step: int) -> StepPlan:
    return StepPlan(step, (), (), ())


def attach_slab(context: FakeContext) -> AttachSlab:
    """Word of a slab that vit:0 has just made."""
    vit = FakeContext("vit:0", context.run_dir, memory=context.memory)
    slab = HostSlab.create(vit, num_pages=1, page_rows=1, width=1, dtype="float32")
    slab.close()
    return AttachSlab(vit.name, vit.epoch, slab.export())


def make_actor(context: FakeContext, rank: Any) -> LlmActor:
    def load(context: ActorContext) -> Rank[Any]:
        fake: Rank[Any] = rank
        return fake

    return LlmActor(cast(ActorContext, context), load)


async def test_work_is_done_in_order_and_rank_0_answers(tmp_path: Path) -> None:
    rank = FakeRank()
    async with FakeContext("llm:0", tmp_path) as context:
        actor = make_actor(context, rank)
        assert await actor.start() == LlmReady(7, 5, 1024)
        await actor.peer_up(UP)
        for message in (
            attach_slab(context),
            plan(1),
            plan(2),
            DetachSlab(ActorName("vit:0"), Epoch(1)),
            plan(3),
        ):
            await actor.handle(message, SCHEDULER)
        results = [await context.outbox.next() for _ in range(3)]
        assert results == [(SCHEDULER, StepResult(step, (step + 100,), 1.0)) for step in (1, 2, 3)]
        await actor.stop(5.0)
        assert rank.log == ["attach 1", "step 1", "step 2", "detach 1", "step 3", "close"]


async def test_other_ranks_do_not_answer(tmp_path: Path) -> None:
    rank = FakeRank()
    async with FakeContext("llm:1", tmp_path) as context:
        actor = make_actor(context, rank)
        await actor.start()
        await actor.peer_up(UP)
        await actor.handle(plan(1), SCHEDULER)
        await actor.stop(5.0)
        await asyncio.sleep(0)
        assert rank.log == ["step 1", "close"]
        assert context.outbox.take() == []


async def test_a_slab_whose_vit_dies_while_a_step_runs_can_still_be_read_behind_it(tmp_path: Path) -> None:
    rank = FakeRank()
    rank.open.clear()
    async with FakeContext("llm:0", tmp_path) as context:
        actor = make_actor(context, rank)
        await actor.start()
        await actor.peer_up(UP)
        await actor.handle(plan(1), SCHEDULER)
        await asyncio.to_thread(rank.reached.wait, 10)
        await actor.handle(attach_slab(context), SCHEDULER)
        await actor.handle(plan(2), SCHEDULER)  # may read rows
        context.memory.drop("slab/vit:0/1")
        await actor.handle(DetachSlab(ActorName("vit:0"), Epoch(1)), SCHEDULER)
        rank.open.set()
        await actor.stop(5.0)
        assert rank.log == ["step 1", "attach 1", "step 2", "detach 1", "close"]


async def test_a_slab_that_is_gone_already_is_passed_over(tmp_path: Path) -> None:
    rank = FakeRank()
    async with FakeContext("llm:0", tmp_path) as context:
        actor = make_actor(context, rank)
        await actor.start()
        await actor.peer_up(UP)
        message = attach_slab(context)
        context.memory.drop("slab/vit:0/1")
        await actor.handle(message, SCHEDULER)
        await actor.handle(plan(1), SCHEDULER)
        await actor.stop(5.0)
        assert rank.log == ["step 1", "close"]


async def test_plans_of_a_scheduler_that_is_gone_are_dropped(tmp_path: Path) -> None:
    rank = FakeRank()
    rank.open.clear()
    async with FakeContext("llm:0", tmp_path) as context:
        actor = make_actor(context, rank)
        await actor.start()
        await actor.peer_up(UP)
        for step in (1, 2, 3):
            await actor.handle(plan(step), SCHEDULER)
        await asyncio.to_thread(rank.reached.wait, 10)
        await actor.peer_down(peer_down("scheduler:0"))
        await actor.peer_up(peer_up("scheduler:0", SchedulerReady(), epoch=2))
        await actor.handle(plan(1), SCHEDULER)
        rank.open.set()
        assert (await context.outbox.next()).message == StepResult(1, (101,), 1.0)
        await actor.stop(5.0)
        assert rank.log == ["step 1", "clear", "step 1", "close"]
        assert context.outbox.take() == []  # the old scheduler's step 1 is not told to the new one


async def run_one_plan(rank: FakeRank, run_dir: Path, step_timeout_s: float) -> None:
    config = make_config(supervision=SupervisionOptions(step_timeout_s=step_timeout_s))
    async with FakeContext("llm:0", run_dir, config) as context:
        actor = make_actor(context, rank)
        await actor.start()
        await actor.peer_up(UP)
        await actor.handle(plan(1), SCHEDULER)
        await asyncio.wait(context._tasks, timeout=10)


async def test_a_step_that_raises_ends_the_actor(tmp_path: Path) -> None:
    rank = FakeRank()
    rank.fail = True
    with pytest.raises(RuntimeError, match="a step failed"):
        await run_one_plan(rank, tmp_path, step_timeout_s=60.0)


async def test_a_stuck_step_ends_the_actor(tmp_path: Path) -> None:
    rank = FakeRank()
    rank.open.clear()
    try:
        with pytest.raises(StepStuck):
            await run_one_plan(rank, tmp_path, step_timeout_s=0.05)
    finally:
        rank.open.set()


async def answer_into_a_full_channel(run_dir: Path) -> None:
    async with FakeContext("llm:0", run_dir) as context:
        context.outbox.full.add(SCHEDULER)
        actor = make_actor(context, FakeRank())
        await actor.start()
        await actor.peer_up(UP)
        await actor.handle(plan(1), SCHEDULER)
        await asyncio.wait(context._tasks, timeout=10)


async def test_a_scheduler_that_takes_no_results_ends_the_actor(tmp_path: Path) -> None:
    with pytest.raises(ChannelFull):
        await answer_into_a_full_channel(tmp_path)


async def test_a_start_that_cannot_work_says_why(tmp_path: Path) -> None:
    async with FakeContext("llm:0", tmp_path, make_config(tmp_path)) as context:
        with pytest.raises(StartupError, match=r"config\.json"):
            await LlmActor(cast(ActorContext, context)).start()


async def test_a_real_rank_loads_attaches_a_slab_and_answers(one_checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = make_config(one_checkpoint.directory, memory=MemoryOptions(num_kv_blocks=40))
    config = msgspec.structs.replace(config, scheduling=SchedulingOptions(max_num_seqs=4, block_size=4))
    width = one_checkpoint.config.text.hidden_size
    async with FakeContext("llm:0", tmp_path, config) as context:
        actor = LlmActor(cast(ActorContext, context))
        size = block_bytes(one_checkpoint.config.text, 1, 4, torch.float32)
        assert await actor.start() == LlmReady(40, 0, size)
        stage, done, total = context.stages[-1]
        assert stage == "loading weights"
        assert done == total > 0
        await actor.peer_up(UP)

        vit = FakeContext("vit:0", tmp_path, config, memory=context.memory)
        slab = HostSlab.create(vit, num_pages=8, page_rows=2, width=width, dtype="float32")
        pages = (5, 0, 3)
        request, inputs = one_checkpoint.prompt(7, 9, ((1, 4, 6),), SlabView(slab, list(reversed(pages))))
        item = request.media[0]
        embeds = (EmbedSlice(vit.name, vit.epoch, pages, 0, item.num_tokens, item.start),)
        sequence = NewSequence(
            3, RequestId("r"), tuple(request.token_ids), len(request.token_ids), request.media, request.rope_delta,
            Sampling(temperature=0.0), (),
        )  # fmt: skip
        length = len(request.token_ids)
        await actor.handle(AttachSlab(vit.name, vit.epoch, slab.export()), SCHEDULER)
        row = StepRow(3, 0, length, tuple(range(10)), True, embeds)
        await actor.handle(StepPlan(1, (), (sequence,), (row,)), SCHEDULER)
        for step in range(4):  # every decode step is planned before the token it runs is known here
            await actor.handle(StepPlan(2 + step, (), (), (StepRow(3, length + step, 1, (), True),)), SCHEDULER)
        await actor.handle(DetachSlab(vit.name, vit.epoch), SCHEDULER)
        output_ids: list[int] = []
        for step in range(5):
            result = (await context.outbox.next()).message
            assert isinstance(result, StepResult)
            assert result.step == 1 + step
            output_ids += result.token_ids
        one_checkpoint.reference.judge(inputs, output_ids)
        histograms = context.metrics.snapshot().histograms
        assert sum(histograms["step_seconds"].counts) == 5
        assert histograms["step_tokens"].total == length + 4
        await actor.stop(5.0)
        slab.close()


class SlabView:
    """A HostSlab as the prompts of these tests fill it: pages taken from the end of free_pages."""

    def __init__(self, slab: HostSlab, free_pages: list[int]) -> None:
        self.page_rows = slab.page_rows
        self.free_pages = free_pages
        self._slab = slab

    def tensor(self) -> torch.Tensor:
        return self._slab.tensor()


async def test_a_profile_begins_and_ends_between_steps_in_the_thread_that_computes(tmp_path: Path) -> None:
    rank = ComputingRank()
    async with FakeContext("llm:0", tmp_path) as context:
        actor = make_actor(context, rank)
        await actor.start()
        await actor.peer_up(UP)
        begun = await actor.answer(StartProfile(str(tmp_path / "profiles" / "llm-0"), 60.0))
        assert isinstance(begun, Profiling)
        await actor.handle(plan(1), SCHEDULER)
        await context.outbox.next()
        assert await actor.answer(StopProfile()) == Profiling(begun.path, 0.0)
        await actor.stop(5.0)
    assert begun.path.endswith("llm-0.trace.json.gz")
    names = {event.get("name") for event in msgspec.json.decode(gzip.decompress(read(begun.path)))["traceEvents"]}
    assert "aten::mm" in names
    assert await actor.answer(ListRequests()) is None


async def test_a_profile_that_fails_does_not_end_the_rank(tmp_path: Path) -> None:
    rank = FakeRank()
    async with FakeContext("llm:0", tmp_path) as context:
        actor = make_actor(context, rank)
        await actor.start()
        await actor.peer_up(UP)
        await actor.answer(StartProfile(str(tmp_path / "llm-0"), 60.0))
        (tmp_path / "llm-0.trace.json.gz").mkdir()
        found = await actor.answer(StopProfile())
        assert isinstance(found, Unable)
        await actor.handle(plan(1), SCHEDULER)
        await context.outbox.next()
        await actor.stop(5.0)


class ComputingRank(FakeRank):
    """Multiplies something in each step."""

    def launch(self, plan: StepPlan) -> int:
        torch.ones(8, 8) @ torch.ones(8, 8)
        return super().launch(plan)


def read(path: str) -> bytes:
    return Path(path).read_bytes()
