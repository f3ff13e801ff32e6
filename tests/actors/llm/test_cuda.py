"""The same rank on a GPU."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import cast

import pytest
import torch

from tests.actors.llm.conftest import Checkpoint
from tests.actors.llm.driver import PAGE_ROWS, Driver, FakeSlab, Request, make_runner
from tests.actors.llm.rank_process import NUM_STEPS, plans, until_run
from tests.actors.llm.test_grammar import mixed_requests
from tests.actors.llm.test_logprobs import check_logprobs
from tests.actors.llm.test_runner import GRIDS
from tests.support import FakeContext, make_config, peer_up
from vlmrt.actors.llm.actor import LlmActor
from vlmrt.actors.llm.grammar import GrammarCompiler
from vlmrt.actors.llm.step_graphs import StepShape
from vlmrt.actors.models.checkpoint_files import check_weight_files
from vlmrt.actors.models.layers import TensorParallel
from vlmrt.actors.models.qwen2_vl.language import LanguageModel
from vlmrt.actors.models.registry import family
from vlmrt.runtime.actor import ActorContext
from vlmrt.runtime.config import MemoryOptions, ParallelOptions, SchedulingOptions
from vlmrt.runtime.control_messages import SchedulerReady
from vlmrt.runtime.messages import ActorName, Sampling, StepResult

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


DEVICE = "cuda:0"


def load_language(checkpoint: Checkpoint) -> LanguageModel:
    files = check_weight_files(checkpoint.directory)
    loaders = family(checkpoint.config.model_type)
    return loaders.load_language(files, checkpoint.config, TensorParallel(), torch.device(DEVICE), torch.float32)


@pytest.fixture(autouse=True)
def _memory_of_other_tests_is_free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize(
    "shapes", [(), (StepShape(1), StepShape(2), StepShape(4)), (StepShape(2), StepShape(3, 4, 2), StepShape(4, 8, 2))]
)
def test_steps_launched_ahead_give_the_reference_s_tokens(
    checkpoint: Checkpoint, shapes: tuple[StepShape, ...]
) -> None:
    slab = FakeSlab(64, PAGE_ROWS, checkpoint.config.text.hidden_size, DEVICE)
    runner = make_runner(load_language(checkpoint), checkpoint.config, TensorParallel(), slab, DEVICE)
    if shapes:
        runner.record(shapes)
    driver = Driver(runner)
    pairs = [checkpoint.prompt(10 + seed, 11 + seed, grids, slab) for seed, grids in enumerate(GRIDS)]
    running: list[Request] = []
    for request, _ in pairs:
        driver.admit(request)
        while request.num_computed < request.num_prompt_tokens:
            chunk = min(6, request.num_prompt_tokens - request.num_computed)
            driver.run([(other, 1) for other in running] + [(request, chunk)])
        running.append(request)
    driver.decode(running, 8)
    for request, inputs in pairs:
        checkpoint.reference.judge(inputs, request.output_ids)


@pytest.mark.parametrize(
    "shapes", [(), (StepShape(1), StepShape(2), StepShape(6)), (StepShape(2), StepShape(3, 4, 2), StepShape(6, 8, 2))]
)
def test_what_rows_ask_of_the_sampler_is_done_as_on_a_cpu(
    one_checkpoint: Checkpoint, compiler: GrammarCompiler, shapes: tuple[StepShape, ...]
) -> None:
    """Biases, penalties, grammars and log-probabilities; beside rows that ask for nothing, and in greedy steps."""
    penalised = Sampling(temperature=0.0, presence_penalty=2.0, num_logprobs=3)
    model = load_language(one_checkpoint)
    outputs = []
    for device in ("cpu", DEVICE):
        on_device = model if device == DEVICE else one_checkpoint.model
        runner = make_runner(on_device, one_checkpoint.config, TensorParallel(), device=device, compiler=compiler)
        if shapes and device == DEVICE:
            runner.record(shapes)
        driver = Driver(runner)
        requests = [*mixed_requests(one_checkpoint), one_checkpoint.prompt(50, 9, sampling=penalised)[0]]
        running: list[Request] = []
        for request in requests:
            driver.admit(request)
            while request.num_computed < request.num_prompt_tokens:
                chunk = min(4, request.num_prompt_tokens - request.num_computed)
                driver.run([(other, 1) for other in running] + [(request, chunk)])
            running.append(request)
        driver.decode(running, 5)
        for alone in (requests[5], requests[3], requests[2]):  # penalties, nothing, a grammar: each greedy
            driver.decode([alone], 3)
        driver.decode([requests[2], requests[3]], 2, one_ahead=False)
        outputs.append([request.output_ids for request in requests])
        for request in requests:
            check_logprobs(one_checkpoint, request, tolerance=1e-3)
    assert outputs[1] == outputs[0]


@pytest.mark.parametrize(
    "memory",
    [MemoryOptions(kv_cache_gib=0.5), MemoryOptions(gpu_memory_fraction=0.2, kv_host_cache_gib=1.25)],
    ids=["a size", "what is free, with a host tier"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_rank_starts_and_answers(
    one_checkpoint: Checkpoint, tmp_path: Path, memory: MemoryOptions, dtype: str
) -> None:
    config = make_config(
        one_checkpoint.directory,
        memory=memory,
        parallel=ParallelOptions(device="cuda", dtype="bfloat16" if dtype == "bfloat16" else "float32"),
        scheduling=SchedulingOptions(max_num_seqs=16, block_size=16),
    )
    async with FakeContext("llm:0", tmp_path, config, device="cuda:0") as context:
        actor = LlmActor(cast(ActorContext, context))
        ready = await actor.start()
        assert ready.num_blocks > 1000
        assert ready.num_host_blocks == int(memory.kv_host_cache_gib * 2**30) // ready.block_bytes
        assert (("pinning host memory", 0) in [stage[:2] for stage in context.stages]) == (ready.num_host_blocks > 0)
        await actor.peer_up(peer_up("scheduler:0", SchedulerReady()))
        for plan in plans(100, NUM_STEPS):
            await actor.handle(plan, ActorName("scheduler:0"))
        await until_run(context, NUM_STEPS)
        await actor.stop(30.0)
        results = [cast(StepResult, sent.message) for sent in context.outbox.take()]
        assert [result.step for result in results] == list(range(1, NUM_STEPS + 1))
        assert [len(result.token_ids) for result in results] == [1] + [2] * (NUM_STEPS - 1)
