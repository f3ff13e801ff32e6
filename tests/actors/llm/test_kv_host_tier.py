"""Blocks that went to host memory come back as they were, whatever became of their places meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.actors.llm.conftest import Checkpoint
from tests.actors.llm.driver import BLOCK_SIZE, PAGE_ROWS, Driver, FakeSlab, make_runner
from tests.support import make_config
from vlmrt.actors.llm.kv_host_tier import NUM_PARTS, PART_BLOCKS, KvHostTier, num_blocks_of_host
from vlmrt.actors.llm.slots import PlanError
from vlmrt.actors.models.checkpoint_files import check_weight_files
from vlmrt.actors.models.layers import TensorParallel
from vlmrt.actors.models.registry import family
from vlmrt.runtime.config import MemoryOptions, ParallelOptions, SchedulingOptions
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.host_buffer import HostBuffer
from vlmrt.runtime.messages import BlockCopy, StepPlan

SHAPE = (6, 4, 2, 8)  # keys and values of 3 layers, tokens, heads, head_dim
ON_GPU = pytest.param(
    "cuda:0",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
DEVICES = ("cpu", ON_GPU)


def make_tier(num_blocks: int, num_host_blocks: int, device: str) -> tuple[KvHostTier, Tensor]:
    """A tier and the cache that it copies from and to, each of whose values names its block and place."""
    layers, *rest = SHAPE
    cache = torch.arange(layers * num_blocks * 64, dtype=torch.float32, device=device).view(layers, num_blocks, *rest)
    host = HostBuffer((num_host_blocks, *SHAPE), torch.float32, torch.device(device), "--kv-host-cache-gib")
    return KvHostTier(cache, host), cache


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("device", DEVICES)
def test_random_copies_do_what_a_dictionary_does(device: str, seed: int) -> None:
    rng = random.Random(seed)
    num_blocks, num_host_blocks = 9, 11
    tier, cache = make_tier(num_blocks, num_host_blocks, device)
    on_device = {block_id: cache[:, block_id].to("cpu", copy=True) for block_id in range(num_blocks)}
    on_host: dict[int, Tensor] = {}
    for number in range(60):
        written = rng.randrange(num_blocks)
        cache[:, written] = float(-number - 1)
        on_device[written] = torch.full(SHAPE, float(-number - 1))
        saves = [BlockCopy(rng.randrange(num_blocks), rng.randrange(num_host_blocks)) for _ in range(rng.randrange(6))]
        tier.save(saves)
        for copy in saves:
            on_host[copy.host_block_id] = on_device[copy.block_id]
        known = sorted(on_host)
        loads = [BlockCopy(rng.randrange(num_blocks), rng.choice(known)) for _ in range(rng.randrange(6)) if known]
        tier.load(loads)
        for copy in loads:
            on_device[copy.block_id] = on_host[copy.host_block_id]
        found = cache.cpu()
        for block_id, expected in on_device.items():
            assert torch.equal(found[:, block_id], expected)


@pytest.mark.parametrize("device", DEVICES)
def test_more_blocks_than_the_staging_holds_are_saved_before_what_follows_writes_them(device: str) -> None:
    num_blocks = 3 * NUM_PARTS * PART_BLOCKS + 5
    tier, cache = make_tier(num_blocks, num_blocks, device)
    before = cache.to("cpu", copy=True)
    places = random.Random(1).sample(range(num_blocks), num_blocks)
    copies = [BlockCopy(block_id, place) for block_id, place in enumerate(places)]
    tier.save(copies)
    cache.zero_()
    tier.load([BlockCopy((copy.block_id + 1) % num_blocks, copy.host_block_id) for copy in copies])
    assert torch.equal(cache.cpu().roll(-1, 1), before)


@pytest.mark.parametrize("copy", [BlockCopy(4, 0), BlockCopy(-1, 0), BlockCopy(0, 3), BlockCopy(0, -1)])
def test_blocks_that_do_not_exist_are_refused_before_anything_is_copied(copy: BlockCopy) -> None:
    tier, cache = make_tier(4, 3, "cpu")
    tier.save([BlockCopy(1, 0), BlockCopy(2, 1), BlockCopy(3, 2)])
    before = cache.clone()
    for copies in (tier.save, tier.load):
        with pytest.raises(PlanError, match=r"the 4 and 3 there are"):
            copies([BlockCopy(0, 1), copy])
    assert torch.equal(cache, before)


def test_a_size_is_of_each_rank_and_holds_at_least_a_block(one_checkpoint: Checkpoint) -> None:
    def num_blocks(gib: float, tp: int) -> int:
        config = make_config(
            memory=MemoryOptions(kv_host_cache_gib=gib),
            parallel=ParallelOptions(tp=tp),
            scheduling=SchedulingOptions(block_size=16),
        )
        return num_blocks_of_host(config, one_checkpoint.config.text, torch.float32)

    assert num_blocks(0.0, 1) == 0
    assert num_blocks(0.25, 2) == 2 * num_blocks(0.25, 1) > 0
    with pytest.raises(StartupError, match="--kv-host-cache-gib 1e-07"):
        num_blocks(1e-7, 1)


# ---------------------------------------------------------------- within a rank's steps


def make_driver(checkpoint: Checkpoint, device: str, num_host_blocks: int = 200) -> tuple[Driver, FakeSlab]:
    slab = FakeSlab(64, PAGE_ROWS, checkpoint.config.text.hidden_size, device)
    model = checkpoint.model
    if device != "cpu":
        files = check_weight_files(checkpoint.directory)
        load = family(checkpoint.config.model_type).load_language
        model = load(files, checkpoint.config, TensorParallel(), torch.device(device), torch.float32)
    runner = make_runner(model, checkpoint.config, TensorParallel(), slab, device, num_host_blocks)
    return Driver(runner), slab


@pytest.mark.parametrize("in_its_own_plan", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_a_prefix_saved_overwritten_and_loaded_gives_the_same_tokens(
    checkpoint: Checkpoint, device: str, in_its_own_plan: bool
) -> None:
    driver, slab = make_driver(checkpoint, device)
    first, inputs = checkpoint.prompt(200, 19, ((1, 4, 6),), slab)
    driver.admit(first)
    driver.prefill(first)
    driver.decode([first], 6)
    num_prefix = (first.num_prompt_tokens - 1) // BLOCK_SIZE
    prefix = first.blocks[:num_prefix]
    assert num_prefix > 3
    saves = tuple(BlockCopy(block_id, 150 - 2 * place) for place, block_id in enumerate(prefix))
    driver.release(first)
    driver.free_blocks.sort(key=lambda block_id: block_id in prefix)  # the next prompt takes the prefix's blocks first

    other, other_inputs = checkpoint.prompt(201, 31)
    driver.admit(other)
    driver.run([(other, other.num_prompt_tokens)], saves=saves)
    assert set(prefix) <= set(other.blocks)
    driver.decode([other], 3)

    again, _ = checkpoint.prompt(200, 19, ((1, 4, 6),), slab)
    loaded = [driver.free_blocks.pop() for _ in prefix]
    loads = tuple(BlockCopy(block_id, copy.host_block_id) for block_id, copy in zip(loaded, saves, strict=True))
    if in_its_own_plan:
        result = driver.run([], loads=loads)
        assert result.token_ids == ()
        assert result.failed == ()
        loads = ()
    driver.admit(again, loaded)
    driver.run([(again, again.num_planned - again.num_computed)], loads=loads)
    driver.decode([again, other], 6)
    assert again.output_ids == first.output_ids
    checkpoint.reference.judge(inputs, again.output_ids)
    checkpoint.reference.judge(other_inputs, other.output_ids)


@pytest.mark.parametrize("device", DEVICES)
def test_a_plan_may_save_a_block_and_load_it_elsewhere(one_checkpoint: Checkpoint, device: str) -> None:
    """What is loaded is what the step before wrote, though no result of it has come yet."""
    driver, _ = make_driver(one_checkpoint, device)
    first, inputs = one_checkpoint.prompt(210, 21)
    driver.admit(first)
    rows = [(first, first.num_planned)]
    plan = driver.plan(rows)
    launched = driver.runner.launch(plan)
    prefix = first.blocks[:5]
    loaded = [driver.free_blocks.pop() for _ in prefix]
    again, _ = one_checkpoint.prompt(210, 21)
    driver.admit(again, loaded)
    next_rows = [(again, again.num_planned - again.num_computed)]
    saves = tuple(BlockCopy(block_id, place) for place, block_id in enumerate(prefix))
    loads = tuple(BlockCopy(block_id, place) for place, block_id in enumerate(loaded))
    next_plan = driver.plan(next_rows, saves, loads)
    next_launched = driver.runner.launch(next_plan)
    driver.take(rows, plan, driver.runner.complete(launched))
    driver.take(next_rows, next_plan, driver.runner.complete(next_launched))
    driver.decode([first, again], 5)
    assert first.output_ids == again.output_ids
    one_checkpoint.reference.judge(inputs, first.output_ids)


def noted(logits: Callable[[Tensor], Tensor], found: list[Tensor], hidden: Tensor) -> Tensor:
    found.append(logits(hidden))
    return found[-1]


@pytest.mark.parametrize("device", DEVICES)
def test_logits_over_a_loaded_prefix_are_those_over_the_computed_one(one_checkpoint: Checkpoint, device: str) -> None:
    logits = []
    for with_detour in (False, True):
        driver, _ = make_driver(one_checkpoint, device)
        model = driver.runner._model
        request, _ = one_checkpoint.prompt(220, 18)
        driver.admit(request)
        driver.run([(request, 4 * BLOCK_SIZE)])
        if with_detour:
            copies = tuple(BlockCopy(block_id, block_id) for block_id in request.blocks)
            driver.run([], saves=copies)
            for keys, values in driver.runner._kv:
                keys.fill_(float("nan"))
                values.fill_(float("nan"))
            driver.run([], loads=copies)
        found: list[Tensor] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "logits", partial(noted, model.logits, found))
            driver.prefill(request)
        logits.append(torch.cat(found).cpu())
    assert torch.equal(*logits)
    assert np.isfinite(logits[0].numpy()).all()


def test_clearing_a_rank_leaves_its_host_memory(one_checkpoint: Checkpoint) -> None:
    """What of it still has a meaning is for the scheduler to know."""
    driver, _ = make_driver(one_checkpoint, "cpu")
    request, _ = one_checkpoint.prompt(230, 9)
    driver.admit(request)
    driver.prefill(request)
    block_id = request.blocks[0]
    keys = driver.runner._kv[1][0]
    before = keys[block_id].clone()
    driver.run([], saves=(BlockCopy(block_id, 7),))
    driver.runner.clear()
    keys.fill_(0.0)
    driver = Driver(driver.runner)
    driver.run([], loads=(BlockCopy(block_id, 7),))
    assert torch.equal(keys[block_id], before)


def test_a_plan_that_only_releases_runs_nothing(one_checkpoint: Checkpoint) -> None:
    driver, _ = make_driver(one_checkpoint, "cpu")
    request, inputs = one_checkpoint.prompt(240, 9)
    driver.admit(request)
    driver.prefill(request)
    driver.release(request)
    assert driver.run([]).token_ids == ()
    driver.free_slots.sort()
    again, _ = one_checkpoint.prompt(240, 9)
    driver.admit(again)
    driver.prefill(again)
    driver.decode([again], 3)
    one_checkpoint.reference.judge(inputs, again.output_ids)


def test_copies_of_a_rank_without_host_memory_are_refused(one_checkpoint: Checkpoint) -> None:
    driver, _ = make_driver(one_checkpoint, "cpu", num_host_blocks=0)
    for plan in (
        StepPlan(0, (), (), (), saves=(BlockCopy(0, 0),)),
        StepPlan(0, (), (), (), loads=(BlockCopy(0, 0),)),
    ):
        with pytest.raises(PlanError, match="no host memory"):
            driver.runner.launch(plan)
