"""One rank in a process of its own: `python -m tests.actors.llm.rank_process CHECKPOINT RUN_DIR TP RANK`.

Prints the tokens of every step of two schedulers; the first dies when only the last rank has got its last plan.
The second one's end is a prompt whose blocks have been in host memory.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from tests.support import FakeContext, make_config, peer_down, peer_up
from vlmrt.actors.llm.actor import LlmActor
from vlmrt.runtime.actor import ActorContext
from vlmrt.runtime.config import MemoryOptions, ParallelOptions, SchedulingOptions, SupervisionOptions
from vlmrt.runtime.control_messages import SchedulerReady
from vlmrt.runtime.messages import ActorName, BlockCopy, NewSequence, RequestId, Sampling, StepPlan, StepResult, StepRow

SCHEDULER = ActorName("scheduler:0")
NUM_STEPS = 8
LENGTHS = (13, 6)
NUM_DETOUR_STEPS = 6
GRAMMAR = "start: /[a-z]{300}/"


def plans(first_id: int, num_steps: int) -> Iterator[StepPlan]:
    """Two sequences, one greedy and one drawn, prefilled together in chunks and decoded ahead of their tokens.

    The drawn one follows a grammar.
    """
    admit = tuple(
        NewSequence(
            slot,
            RequestId(f"r{slot}"),
            tuple(range(first_id, first_id + length)),
            length,
            (),
            0,
            Sampling(temperature=float(slot), seed=slot, grammar=GRAMMAR if slot else "", num_logprobs=2 * slot),
            tuple(range(10 * slot, 10 * slot + 10)),
        )
        for slot, length in enumerate(LENGTHS)
    )
    yield StepPlan(1, (), admit, (StepRow(0, 0, 5, (), False), StepRow(1, 0, LENGTHS[1], (), True)))
    yield StepPlan(2, (), (), (StepRow(1, LENGTHS[1], 1, (), True), StepRow(0, 5, LENGTHS[0] - 5, (), True)))
    for step in range(3, num_steps + 1):
        rows = (
            StepRow(0, LENGTHS[0] + step - 3, 1, (), True),
            StepRow(1, LENGTHS[1] + step - 2, 1, (), True),
        )
        yield StepPlan(step, (), (), rows)


def detour(first_id: int, step: int) -> Iterator[StepPlan]:
    """The prompt of slot 0 in slot 2: three of its blocks are saved and loaded elsewhere, the rest is computed."""
    host_block_ids, loaded = (4, 0, 2), (30, 32, 31)
    saves = tuple(BlockCopy(block_id, host) for block_id, host in enumerate(host_block_ids))
    yield StepPlan(step, (), (), (), saves=saves)
    loads = tuple(BlockCopy(block_id, host) for block_id, host in zip(loaded, host_block_ids, strict=True))
    yield StepPlan(step + 1, (), (), (), loads=loads)
    length = LENGTHS[0]
    token_ids = tuple(range(first_id, first_id + length))
    sequence = NewSequence(2, RequestId("r2"), token_ids, length, (), 0, Sampling(temperature=0.0), loaded)
    yield StepPlan(step + 2, (), (sequence,), (StepRow(2, 12, 1, (33, 34), True),))
    for number in range(NUM_DETOUR_STEPS - 3):
        yield StepPlan(step + 3 + number, (), (), (StepRow(2, length + number, 1, (), True),))


async def run(checkpoint: str, run_dir: Path, tp: int, rank: int) -> list[tuple[int, ...]]:
    config = make_config(
        checkpoint,
        memory=MemoryOptions(num_kv_blocks=40 + rank, kv_host_cache_gib=1 / 1024),
        parallel=ParallelOptions(tp=tp),
        scheduling=SchedulingOptions(max_num_seqs=4, block_size=4),
        supervision=SupervisionOptions(step_timeout_s=60.0),
    )
    async with FakeContext(f"llm:{rank}", run_dir, config) as context:
        actor = LlmActor(cast(ActorContext, context))
        ready = await actor.start()
        assert ready.num_blocks == 40
        assert ready.num_host_blocks == (1 << 20) // ready.block_bytes > 4
        await actor.peer_up(peer_up("scheduler:0", SchedulerReady(), epoch=1))
        planned = list(plans(100, NUM_STEPS + 1))
        for plan in planned[:NUM_STEPS]:
            await actor.handle(plan, SCHEDULER)
        await until_run(context, NUM_STEPS)
        if rank == tp - 1 and tp > 1:
            await actor.handle(planned[NUM_STEPS], SCHEDULER)
        await actor.peer_down(peer_down("scheduler:0", epoch=1))
        await actor.peer_up(peer_up("scheduler:0", SchedulerReady(), epoch=2))
        for plan in (*plans(300, NUM_STEPS), *detour(300, NUM_STEPS + 1)):
            await actor.handle(plan, SCHEDULER)
        await until_run(context, 2 * NUM_STEPS + NUM_DETOUR_STEPS)
        await actor.stop(30.0)
        results = [sent.message for sent in context.outbox.take()]
    return [result.token_ids for result in results if isinstance(result, StepResult)]


async def until_run(context: FakeContext, num_steps: int) -> None:
    async with asyncio.timeout(60.0):
        while True:
            steps = context.metrics.snapshot().histograms.get("step_seconds")
            if steps is not None and sum(steps.counts) == num_steps:
                return
            await asyncio.sleep(0.01)


if __name__ == "__main__":
    checkpoint, run_dir, tp, rank = sys.argv[1:]
    print(json.dumps(asyncio.run(run(checkpoint, Path(run_dir), int(tp), int(rank)))))
