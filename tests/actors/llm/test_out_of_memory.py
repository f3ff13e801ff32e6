"""A step that finds no memory fails nobody but the sequence that finds none even alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.actors.llm.conftest import Checkpoint
from tests.actors.llm.driver import (
    BLOCK_SIZE,
    MAX_MODEL_LEN,
    NUM_BLOCKS,
    NUM_SLOTS,
    PAGE_ROWS,
    Driver,
    FakeSlab,
    Request,
    make_runner,
)
from vlmrt.actors.llm.kv_cache import KvCache, allocate, by_layer
from vlmrt.actors.llm.runner import Runner
from vlmrt.actors.llm.sampler import Sampler
from vlmrt.actors.llm.slots import Slots
from vlmrt.actors.models.layers import TensorParallel
from vlmrt.actors.models.qwen2_vl.language import LanguageModel
from vlmrt.kernels.paged_attention import PagedBatch
from vlmrt.runtime.messages import FailedRow, Sampling

GRID = (1, 4, 6)


class Cramped:
    """A language model with room for so many tokens and so many rows of logits; it runs out when its work is done."""

    def __init__(self, model: LanguageModel, max_tokens: int = 10_000, max_logits: int = 10_000) -> None:
        self._model = model
        self.config = model.config
        self.embed, self.rotary = model.embed, model.rotary
        self.max_tokens, self.max_logits = max_tokens, max_logits
        self.num_refused = 0

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, kv: KvCache, batch: PagedBatch) -> Tensor:
        return self._within(self.max_tokens, len(hidden), self._model.forward(hidden, cos, sin, kv, batch))

    def logits(self, hidden: Tensor) -> Tensor:
        return self._within(self.max_logits, len(hidden), self._model.logits(hidden))

    def _within(self, room: int, size: int, result: Tensor) -> Tensor:
        if size > room:
            self.num_refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result


def make_driver(checkpoint: Checkpoint, model: Cramped) -> tuple[Driver, FakeSlab]:
    slab = FakeSlab(64, PAGE_ROWS, checkpoint.config.text.hidden_size)
    runner = make_runner(cast(LanguageModel, model), checkpoint.config, TensorParallel(), slab)
    return Driver(runner), slab


def judge(checkpoint: Checkpoint, request: Request, inputs: dict[str, Tensor], count: int) -> None:
    assert len(request.output_ids) == count
    assert checkpoint.reference.judge(inputs, request.output_ids).num_ties <= 1


def without_memory(row: int) -> tuple[FailedRow, ...]:
    return (FailedRow(row, "out_of_memory"),)


def begin(driver: Driver, requests: Sequence[Request]) -> None:
    for request in requests:
        driver.admit(request)
        driver.prefill(request)


def test_a_step_without_room_runs_in_pieces_and_gives_the_reference_s_tokens(one_checkpoint: Checkpoint) -> None:
    model = Cramped(one_checkpoint.model)
    driver, slab = make_driver(one_checkpoint, model)
    decoding = [one_checkpoint.prompt(100 + seed, 9) for seed in range(3)]
    fresh = [one_checkpoint.prompt(110, 12), one_checkpoint.prompt(111, 8, (GRID,), slab)]
    begin(driver, [request for request, _ in decoding])
    for request, _ in fresh:
        driver.admit(request)
    model.max_tokens = max(request.num_prompt_tokens for request, _ in fresh)
    rows = [*[(request, 1) for request, _ in decoding], *[(request, request.num_prompt_tokens) for request, _ in fresh]]
    result = driver.run(rows)
    assert result.failed == ()
    assert model.num_refused == 1
    driver.decode([request for request, _ in (*decoding, *fresh)], 5)
    for request, inputs in decoding:
        judge(one_checkpoint, request, inputs, 7)
    for request, inputs in fresh:
        judge(one_checkpoint, request, inputs, 6)


@pytest.mark.parametrize("chunk", [20, 30])
def test_only_the_sequence_that_fits_not_even_alone_is_lost(one_checkpoint: Checkpoint, chunk: int) -> None:
    """Its next step, launched before anybody knows, runs without it; its slot serves the next request."""
    model = Cramped(one_checkpoint.model)
    driver, _ = make_driver(one_checkpoint, model)
    decoding = [one_checkpoint.prompt(120 + seed, 9) for seed in range(3)]
    (small, small_inputs), (large, _) = one_checkpoint.prompt(130, 12), one_checkpoint.prompt(131, 30)
    others = [request for request, _ in decoding]
    begin(driver, others)
    model.max_tokens = 15
    for request in (large, small):
        driver.admit(request)
    rows = [*[(request, 1) for request in others], (large, chunk), (small, 12)]
    plan = driver.plan(rows)
    launched = driver.runner.launch(plan)
    next_rows = [*[(request, 1) for request in others]]
    if chunk == 30:
        next_rows += [(large, 1), (small, 1)]
        place = 3
    else:
        next_rows += [(small, 1), (large, 10)]
        place = 4
    next_plan = driver.plan(next_rows)
    next_launched = driver.runner.launch(next_plan)
    result = driver.runner.complete(launched)
    assert result.failed == without_memory(3)
    driver.take(rows, plan, result)
    next_result = driver.runner.complete(next_launched)
    assert next_result.failed == without_memory(place)
    driver.take(next_rows, next_plan, next_result)
    assert large.output_ids == []
    driver.release(large)
    driver.free_slots.sort()
    reborn, reborn_inputs = one_checkpoint.prompt(132, 7)
    driver.admit(reborn)
    driver.prefill(reborn)
    driver.decode([*others, small, reborn], 4)
    for request, inputs in decoding:
        judge(one_checkpoint, request, inputs, 7)
    judge(one_checkpoint, small, small_inputs, 6)
    judge(one_checkpoint, reborn, reborn_inputs, 5)


def test_decode_rows_that_have_no_room_together_run_alone_and_are_counted_once(one_checkpoint: Checkpoint) -> None:
    """With seeds and penalties: a token counted twice, or fed twice, would change what follows."""
    sampling = [Sampling(seed=1, frequency_penalty=1.5), Sampling(seed=2, repetition_penalty=1.4), Sampling(seed=3)]
    outputs = []
    for max_logits in (10_000, 1):
        model = Cramped(one_checkpoint.model)
        driver, _ = make_driver(one_checkpoint, model)
        requests = [one_checkpoint.prompt(140 + i, 8, sampling=each)[0] for i, each in enumerate(sampling)]
        begin(driver, requests)
        model.max_logits = max_logits
        driver.decode(requests, 8)
        assert model.num_refused == (2 * 8 if max_logits == 1 else 0)  # at once, and again with all memory given back
        outputs.append([request.output_ids for request in requests])
    assert outputs[0] == outputs[1]
    assert [len(output_ids) for output_ids in outputs[0]] == [9, 9, 9]


def test_a_sequence_whose_penalties_find_no_room_is_lost_alone(
    one_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(_sampler: Sampler, slot: int) -> None:
        raise torch.OutOfMemoryError(f"CUDA out of memory for slot {slot}")

    monkeypatch.setattr(Sampler, "_count_known", no_room)
    driver, _ = make_driver(one_checkpoint, Cramped(one_checkpoint.model))
    plain, inputs = one_checkpoint.prompt(150, 9)
    penalised, _ = one_checkpoint.prompt(151, 9, sampling=Sampling(presence_penalty=0.5))
    for request in (penalised, plain):
        driver.admit(request)
    assert driver.run([(penalised, 4), (plain, 9)]).failed == without_memory(0)
    assert driver.run([(plain, 1), (penalised, 5)]).failed == without_memory(1)
    driver.release(penalised)
    driver.decode([plain], 3)
    judge(one_checkpoint, plain, inputs, 5)


def test_a_rank_of_a_group_cannot_go_on_alone(one_checkpoint: Checkpoint) -> None:
    model: Any = Cramped(one_checkpoint.model)
    kv = by_layer(allocate(NUM_BLOCKS, BLOCK_SIZE, one_checkpoint.config.text, 1, torch.float32, torch.device("cpu")))
    driver = Driver(Runner(model, kv, Slots(NUM_SLOTS, MAX_MODEL_LEN, BLOCK_SIZE), 2, torch.device("cpu"), tp_size=2))
    request, _ = one_checkpoint.prompt(160, 9)
    driver.admit(request)
    model.max_tokens = 5
    with pytest.raises(torch.OutOfMemoryError):
        driver.prefill(request)


def test_a_cleared_rank_has_lost_nobody(one_checkpoint: Checkpoint) -> None:
    model = Cramped(one_checkpoint.model, max_tokens=10)
    driver, _ = make_driver(one_checkpoint, model)
    large, _ = one_checkpoint.prompt(170, 20)
    driver.admit(large)
    assert driver.run([(large, 20)]).failed == without_memory(0)
    driver.runner.clear()
    driver = Driver(driver.runner)
    request, inputs = one_checkpoint.prompt(171, 8)
    begin(driver, [request])
    driver.decode([request], 3)
    judge(one_checkpoint, request, inputs, 4)
