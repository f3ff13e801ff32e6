"""Ranks in real processes over gloo."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import cast

import pytest

from tests.actors.llm import rank_process
from tests.actors.llm.conftest import Checkpoint
from tests.support import FakeContext, make_config, peer_up
from vlmrt.actors.llm.actor import LlmActor
from vlmrt.actors.llm.process_group import LAST_STEP, step_key
from vlmrt.runtime.actor import ActorContext
from vlmrt.runtime.config import MemoryOptions, SchedulingOptions
from vlmrt.runtime.control_messages import SchedulerReady
from vlmrt.runtime.messages import Epoch, FailedRow, StepResult

ROOT = Path(__file__).parents[3]


async def start_rank(checkpoint: Path, run_dir: Path, tp: int, rank: int) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.actors.llm.rank_process",
        str(checkpoint), str(run_dir), str(tp), str(rank),
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def test_two_ranks_give_the_tokens_of_one_also_after_a_scheduler_died_in_mid_sentence(
    one_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    alone = await rank_process.run(str(one_checkpoint.directory), tmp_path, 1, 0)
    ranks = [await start_rank(one_checkpoint.directory, tmp_path, 2, rank) for rank in range(2)]
    try:
        told = await asyncio.wait_for(asyncio.gather(*(rank.communicate() for rank in ranks)), 120)
    finally:
        for rank in ranks:
            if rank.returncode is None:
                rank.kill()
                await rank.wait()
    for rank, (_, err) in zip(ranks, told, strict=True):
        assert rank.returncode == 0, err.decode()
    outputs = [json.loads(out) for out, _ in told]
    *steps, saved, loaded, first, second, third, fourth = alone
    assert len(steps) == 2 * rank_process.NUM_STEPS
    assert (saved, loaded) == ((), ())
    prefilled, *decoded = steps[rank_process.NUM_STEPS + 1 :]
    of_slot_0 = [prefilled[1], *[tokens[0] for tokens in decoded]]
    assert [*first, *second, *third, *fourth] == of_slot_0[:4]  # the same prompt over blocks that were loaded
    assert [tuple(step) for step in outputs[0]] == alone
    assert outputs[1] == []


def test_keys_order_epochs_before_steps_and_the_end_of_an_epoch_after_its_steps() -> None:
    keys = [
        step_key(Epoch(1), 0),
        step_key(Epoch(1), 7),
        step_key(Epoch(1), LAST_STEP),
        step_key(Epoch(2), 0),
        step_key(Epoch(2), 1),
    ]
    assert keys == sorted(keys)
    assert max(keys) < 2**62


def copy_without(missing: str, checkpoint: Path, parent: Path) -> Path:
    copy = parent / "copy"
    copy.mkdir()
    for file in checkpoint.iterdir():
        if file.name != missing:
            (copy / file.name).symlink_to(file)
    return copy


async def test_a_rank_without_a_tokenizer_starts_and_fails_requests_with_a_grammar(
    one_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config = make_config(
        copy_without("tokenizer.json", one_checkpoint.directory, tmp_path),
        memory=MemoryOptions(num_kv_blocks=40),
        scheduling=SchedulingOptions(max_num_seqs=4, block_size=4),
    )
    async with FakeContext("llm:0", tmp_path, config) as context:
        actor = LlmActor(cast(ActorContext, context))
        await actor.start()
        await actor.peer_up(peer_up("scheduler:0", SchedulerReady()))
        await actor.handle(next(rank_process.plans(100, 1)), rank_process.SCHEDULER)
        await rank_process.until_run(context, 1)
        await actor.stop(30.0)
        (result,) = [sent.message for sent in context.outbox.take()]
    assert isinstance(result, StepResult)
    assert (result.token_ids, result.failed) == ((), (FailedRow(1, "grammar"),))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
async def test_a_rank_without_its_files_exits(one_checkpoint: Checkpoint, tmp_path: Path, missing: str) -> None:
    copy = copy_without(missing, one_checkpoint.directory, tmp_path)
    with pytest.raises(Exception, match=missing.removesuffix(".json")):
        await rank_process.run(str(copy), tmp_path, 1, 0)
