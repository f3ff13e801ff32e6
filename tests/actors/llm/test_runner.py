"""A rank driven by hand-made plans gives the reference's tokens, however the work is cut up."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.actors.llm.conftest import Checkpoint
from tests.actors.llm.driver import BLOCK_SIZE, PAGE_ROWS, Driver, FakeSlab, Request, make_runner
from vlmrt.actors.llm.slots import PlanError
from vlmrt.actors.models.layers import TensorParallel
from vlmrt.runtime.messages import NewSequence, RequestId, Sampling, StepPlan, StepRow

GRIDS: tuple[tuple[tuple[int, int, int], ...], ...] = (
    (),
    ((1, 4, 6),),
    ((1, 2, 10), (1, 8, 4)),
    ((1, 4, 4), (1, 2, 2), (1, 6, 10)),
)


def make_driver(checkpoint: Checkpoint) -> tuple[Driver, FakeSlab]:
    slab = FakeSlab(64, PAGE_ROWS, checkpoint.config.text.hidden_size)
    return Driver(make_runner(checkpoint.model, checkpoint.config, TensorParallel(), slab)), slab


def judge(checkpoint: Checkpoint, requests: Sequence[Request], inputs: Sequence[dict[str, Tensor]], count: int) -> None:
    for request, each in zip(requests, inputs, strict=True):
        assert len(request.output_ids) == count
        verdict = checkpoint.reference.judge(each, request.output_ids)
        assert verdict.num_ties <= 1


@pytest.mark.parametrize("chunk", [1000, 7])
def test_prompts_with_images_give_the_reference_s_tokens(checkpoint: Checkpoint, chunk: int) -> None:
    driver, slab = make_driver(checkpoint)
    for seed, grids in enumerate(GRIDS):
        request, inputs = checkpoint.prompt(seed, 17, grids, slab)
        driver.admit(request)
        driver.prefill(request, chunk)
        driver.decode([request], 9)
        judge(checkpoint, [request], [inputs], 10)
        driver.release(request)


def test_mixed_batches_give_the_reference_s_tokens(checkpoint: Checkpoint) -> None:
    """Every next prompt is prefilled in chunks in the same steps in which the ones before it decode."""
    driver, slab = make_driver(checkpoint)
    pairs = [checkpoint.prompt(10 + seed, 11 + seed, grids, slab) for seed, grids in enumerate(GRIDS)]
    running: list[Request] = []
    for request, _ in pairs:
        driver.admit(request)
        while request.num_computed < request.num_prompt_tokens:
            chunk = min(6, request.num_prompt_tokens - request.num_computed)
            driver.run([(other, 1) for other in running] + [(request, chunk)])
        running.append(request)
    driver.decode(running, 6)
    longest = max(len(request.output_ids) for request in running)
    for request in running:
        driver.decode([request], longest - len(request.output_ids))
    judge(checkpoint, running, [inputs for _, inputs in pairs], longest)


def test_slots_may_share_the_blocks_of_a_common_prefix(checkpoint: Checkpoint) -> None:
    driver, slab = make_driver(checkpoint)
    first, inputs = checkpoint.prompt(20, 15, GRIDS[1], slab)
    second = Request([*first.token_ids[:-2], 5, 6, 7], first.media, first.pages)
    other_inputs = inputs | {"input_ids": torch.tensor([second.token_ids])}
    driver.admit(first)
    driver.prefill(first)
    num_shared = (len(second.token_ids) - 3) // BLOCK_SIZE
    driver.admit(second, first.blocks[:num_shared])
    driver.prefill(second)
    driver.decode([first, second], 6)
    judge(checkpoint, [first, second], [inputs, other_inputs], 7)


def test_a_preempted_sequence_goes_on_as_if_nothing_had_happened(checkpoint: Checkpoint) -> None:
    driver, slab = make_driver(checkpoint)
    request, inputs = checkpoint.prompt(30, 13, GRIDS[2], slab)
    other, other_inputs = checkpoint.prompt(31, 9)
    for each in (request, other):
        driver.admit(each)
        driver.prefill(each)
    driver.decode([request, other], 4)
    driver.release(request)
    driver.decode([other], 2)
    driver.admit(request)  # with what it has generated
    driver.prefill(request, 5)
    driver.decode([request, other], 3)
    driver.decode([other], 1)
    driver.decode([request], 2)
    judge(checkpoint, [request, other], [inputs, other_inputs], 11)


def test_a_decode_row_may_wait_for_its_next_step(one_checkpoint: Checkpoint) -> None:
    driver, _ = make_driver(one_checkpoint)
    pairs = [one_checkpoint.prompt(40 + seed, 8) for seed in range(2)]
    first, second = (request for request, _ in pairs)
    for request in (first, second):
        driver.admit(request)
        driver.prefill(request)
    for each in (first, second, second, first):
        driver.run([(each, 1)])
    judge(one_checkpoint, [first, second], [inputs for _, inputs in pairs], 3)


def test_planning_one_step_ahead_changes_no_token(one_checkpoint: Checkpoint) -> None:
    outputs = []
    for one_ahead in (False, True):
        driver, _ = make_driver(one_checkpoint)
        requests = [
            one_checkpoint.prompt(50 + seed, 8, sampling=Sampling(seed=seed, repetition_penalty=1.3))[0]
            for seed in range(3)
        ]
        for request in requests:
            driver.admit(request)
            driver.prefill(request)
        driver.decode(requests, 8, one_ahead)
        outputs.append([request.output_ids for request in requests])
    assert outputs[0] == outputs[1]


def test_a_step_past_the_end_of_a_sequence_does_not_touch_the_slot_s_next_one(one_checkpoint: Checkpoint) -> None:
    """The scheduler learns that a sequence has ended when its next step is already launched."""
    driver, _ = make_driver(one_checkpoint)
    ended, _ = one_checkpoint.prompt(60, 8)
    driver.admit(ended)
    driver.prefill(ended)
    rows = [(ended, 1)]
    extra = driver.runner.launch(driver.plan(rows))
    driver.release(ended)
    driver.free_slots.sort()
    request, inputs = one_checkpoint.prompt(61, 9)
    driver.admit(request)
    assert request.slot == 0
    plan = driver.plan([(request, request.num_planned)])
    launched = driver.runner.launch(plan)
    driver.runner.complete(extra)
    driver.take([(request, 1)], plan, driver.runner.complete(launched))
    driver.decode([request], 4)
    judge(one_checkpoint, [request], [inputs], 5)


def test_after_clear_every_slot_is_free_and_slabs_are_closed(one_checkpoint: Checkpoint) -> None:
    driver, slab = make_driver(one_checkpoint)
    request, _ = one_checkpoint.prompt(70, 8)
    driver.admit(request)
    driver.prefill(request)
    driver.runner.clear()
    assert slab.closed
    driver = Driver(driver.runner)
    request, inputs = one_checkpoint.prompt(71, 8)
    driver.admit(request)
    driver.prefill(request)
    driver.decode([request], 3)
    judge(one_checkpoint, [request], [inputs], 4)


def sequence(slot: int = 0, num_tokens: int = 5, blocks: tuple[int, ...] = (0, 1)) -> NewSequence:
    ids = tuple(range(num_tokens))
    return NewSequence(slot, RequestId("r"), ids, num_tokens, (), 0, Sampling(temperature=0.0), blocks)


@pytest.mark.parametrize(
    ("admit", "row"),
    [
        (sequence(), StepRow(0, 0, 6, (), False)),  # more tokens than it has
        (sequence(), StepRow(0, 0, 4, (), True)),  # samples before its end
        (sequence(blocks=(0,)), StepRow(0, 0, 5, (), True)),  # not covered by blocks
        (sequence(), StepRow(0, 0, 0, (), False)),
        (sequence(), StepRow(1, 0, 1, (), False)),  # an empty slot
        (sequence(), StepRow(99, 0, 1, (), False)),
        (sequence(slot=99), StepRow(0, 0, 1, (), False)),
        (sequence(num_tokens=2000), StepRow(0, 0, 1, (), False)),
        (sequence(), StepRow(0, 0, 5, tuple(range(2000)), False)),
    ],
)
def test_a_plan_that_contradicts_the_slots_is_refused(
    one_checkpoint: Checkpoint, admit: NewSequence, row: StepRow
) -> None:
    driver, _ = make_driver(one_checkpoint)
    with pytest.raises(PlanError):
        driver.runner.launch(StepPlan(0, (), (admit,), (row,)))


def test_rows_of_a_slab_that_is_not_attached_are_refused(one_checkpoint: Checkpoint) -> None:
    driver, slab = make_driver(one_checkpoint)
    request, _ = one_checkpoint.prompt(80, 8, GRIDS[1], slab)
    driver.runner.clear()
    driver.admit(request)
    with pytest.raises(PlanError, match="not attached"):
        driver.prefill(request)
