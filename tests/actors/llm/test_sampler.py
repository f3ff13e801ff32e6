"""Penalties count what each slot's sequence holds; draws depend on seed and output position only."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.actors.llm.conftest import Checkpoint
from tests.actors.llm.driver import Driver, Request, make_runner
from vlmrt.actors.llm.batch import build_batch
from vlmrt.actors.llm.sampler import Sampler
from vlmrt.actors.llm.slots import SamplingFlags, Slots
from vlmrt.actors.models.layers import TensorParallel
from vlmrt.runtime.messages import NewSequence, RequestId, Sampling, StepPlan, StepRow

VOCAB_SIZE = 23
CPU = torch.device("cpu")


class Bench:
    """Slots and a sampler without a model: logits come from the test, plans are applied as Runner.launch does."""

    def __init__(self) -> None:
        self.slots = Slots(4, 100, 100)
        self.sampler = Sampler(self.slots, VOCAB_SIZE, CPU)
        self.to_release: list[int] = []
        self.to_admit: dict[int, NewSequence] = {}

    def admit(self, slot: int, token_ids: list[int], num_prompt_tokens: int, sampling: Sampling) -> None:
        """With the next step, in place of what is in the slot."""
        self.to_release += [slot] if self.slots.num_tokens[slot] else []
        sequence = NewSequence(slot, RequestId("r"), tuple(token_ids), num_prompt_tokens, (), 0, sampling, (slot,))
        self.to_admit[slot] = sequence

    def sample(self, slots: list[int], logits: Tensor) -> list[int]:
        lengths = {slot: int(self.slots.num_tokens[slot]) for slot in slots}
        lengths |= {slot: len(sequence.token_ids) for slot, sequence in self.to_admit.items()}
        rows = tuple(StepRow(slot, lengths[slot] - 1, 1, (), True) for slot in slots)
        admit = tuple(self.to_admit.values())
        batch = build_batch(StepPlan(0, tuple(self.to_release), admit, rows), self.slots, 2)
        self.sampler.admit([sequence.slot for sequence in admit])
        self.to_release, self.to_admit = [], {}
        flags = self.slots.sampling.flags(batch.sample_slots)
        at, positions = torch.from_numpy(batch.sample_slots), torch.from_numpy(batch.output_positions)
        token_ids = self.sampler.sample(logits, at, positions, flags)
        self.slots.learn(batch.sample_slots, batch.sample_admissions, token_ids.numpy())
        return token_ids.tolist()


def expected_best(logits: Tensor, prompt: list[int], output: list[int], sampling: Sampling) -> int:
    """The definitions of the three penalties, token by token in float64."""
    scores = logits.double().tolist()
    counts = Counter(output)
    for token_id in range(VOCAB_SIZE):
        if token_id in prompt or token_id in counts:
            penalty = sampling.repetition_penalty
            scores[token_id] = scores[token_id] / penalty if scores[token_id] > 0 else scores[token_id] * penalty
        scores[token_id] -= sampling.frequency_penalty * counts[token_id]
        scores[token_id] -= sampling.presence_penalty * (counts[token_id] > 0)
    return int(np.argmax(scores))


PENALTIES = (
    Sampling(temperature=0.0, repetition_penalty=1.4),
    Sampling(temperature=0.0, frequency_penalty=0.3, presence_penalty=-0.4),
    Sampling(temperature=0.0),
    Sampling(temperature=0.0, repetition_penalty=0.8, frequency_penalty=-0.2, presence_penalty=0.5),
)


def test_penalties_equal_their_definition_also_after_a_sequence_comes_back() -> None:
    generator = torch.Generator().manual_seed(0)
    bench = Bench()
    sequences: list[list[int]] = []
    lengths = [5, 1, 9, 3]
    for slot, (length, sampling) in enumerate(zip(lengths, PENALTIES, strict=True)):
        sequences.append(torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist())
        bench.admit(slot, sequences[slot], length, sampling)
    slots = [0, 1, 2, 3]
    for step in range(30):
        if step == 12:  # preempted, and back in each other's slots
            slots = [3, 2, 1, 0]
            for index, slot in enumerate(slots):
                bench.admit(slot, sequences[index], lengths[index], PENALTIES[index])
        order = torch.randperm(4, generator=generator).tolist()[: 1 + step % 4]
        logits = torch.randn(len(order), VOCAB_SIZE, generator=generator) * 0.7
        sampled = bench.sample([slots[index] for index in order], logits)
        for index, row, token_id in zip(order, logits, sampled, strict=True):
            prompt, output = sequences[index][: lengths[index]], sequences[index][lengths[index] :]
            assert token_id == expected_best(row, prompt, output, PENALTIES[index])
            sequences[index].append(token_id)


def test_a_slot_s_next_sequence_inherits_no_counts() -> None:
    bench = Bench()
    sampling = Sampling(temperature=0.0, presence_penalty=2.0)
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 3] = 1.0
    for _ in range(2):
        bench.admit(0, [3], 1, sampling)
        assert bench.sample([0], logits) == [3]
        assert bench.sample([0], logits) == [0]


def test_padding_rows_sample_from_no_slot_and_leave_the_others_alone() -> None:
    bench = Bench()
    asked = Sampling(temperature=0.0, presence_penalty=2.0)
    for slot in (1, 3):
        bench.admit(slot, [5, 6], 2, asked)
    assert bench.sample([1, 3], torch.eye(VOCAB_SIZE)[[7, 8]]) == [7, 8]
    before = bench.sampler.last_tokens.clone()
    logits = torch.eye(VOCAB_SIZE)[[7, 20, 21]] + 0.1 * torch.eye(VOCAB_SIZE)[[9, 22, 22]]
    scratch = len(bench.slots)
    flags = bench.slots.sampling.flags(np.array([1]))
    slots = torch.tensor([1, scratch, scratch])
    token_ids = bench.sampler.sample(logits, slots, torch.tensor([1, 0, 0]), flags)
    assert token_ids.tolist() == [9, 20, 21]  # 7 has been generated in slot 1
    assert bench.sampler.last_tokens[:scratch].tolist() == [*before[:1], 9, *before[2:scratch]]
    # what the padding wrote has no part in what it samples next
    assert bench.sampler.sample(logits, slots, torch.tensor([2, 1, 1]), flags)[1:].tolist() == [20, 21]


def test_flags_say_what_the_rows_of_a_batch_need_and_nothing_of_others() -> None:
    slots = Slots(5, 100, 100)
    asked = (
        Sampling(temperature=0.0),
        Sampling(temperature=0.5, top_p=0.9),
        Sampling(temperature=1.0, top_k=3),
        Sampling(temperature=1.0, min_p=0.1),
        Sampling(temperature=0.0, repetition_penalty=1.1),
    )
    for slot, sampling in enumerate(asked):
        slots.admit(NewSequence(slot, RequestId("r"), (1,), 1, (), 0, sampling, (slot,)))
    flags = [slots.sampling.flags(np.array([slot])) for slot in range(5)]
    assert flags == [
        SamplingFlags(True, False, False, False, False),
        SamplingFlags(False, False, True, False, False),
        SamplingFlags(False, True, False, False, False),
        SamplingFlags(False, False, False, True, False),
        SamplingFlags(True, False, False, False, True),
    ]
    assert slots.sampling.flags(np.arange(5)) == SamplingFlags(False, True, True, True, True)


def test_a_slot_s_fields_are_those_of_its_last_admission() -> None:
    bench = Bench()
    logits = torch.arange(VOCAB_SIZE).float()[None] * 0.01
    drawn = []
    for seed in (3, 4, 3):
        bench.admit(2, [1], 1, Sampling(temperature=1.0, seed=seed))
        drawn.append([bench.sample([2], logits)[0] for _ in range(8)])
    assert drawn[0] == drawn[2] != drawn[1]
    bench.admit(2, [1], 1, Sampling(temperature=0.0))
    assert bench.sample([2], logits) == [VOCAB_SIZE - 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_sampler_follows_the_slots_in_its_buffers() -> None:
    num_slots, vocab_size, device = 12, 20_011, torch.device("cuda")
    slots = Slots(num_slots, 100, 100)
    samplers = [Sampler(slots, vocab_size, device) for _ in range(2)]
    asked = (*DRAWS, Sampling(temperature=0.0, presence_penalty=0.5))
    for slot in range(num_slots):
        sampling = asked[slot % len(asked)]
        slots.admit(NewSequence(slot, RequestId("r"), (slot, 5), 2, (), 0, sampling, (slot,)))
    for sampler in samplers:
        sampler.admit(range(num_slots))
    captured, eager = samplers
    logits = torch.empty(8, vocab_size, device=device, dtype=torch.bfloat16)
    rows = torch.full((8,), num_slots, device=device)
    positions = torch.zeros(8, dtype=torch.int64, device=device)
    flags = slots.sampling.flags(np.arange(num_slots))
    logits.normal_()
    captured.sample(logits, rows, positions, flags)  # writes to the scratch row
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token_ids = captured.sample(logits, rows, positions, flags)
    for step in range(6):
        logits.normal_(std=2.0)
        rows.fill_(num_slots)
        rows[:6] = torch.randperm(num_slots, device=device)[:6]
        positions.fill_(step)
        graph.replay()
        assert torch.equal(token_ids[:6], eager.sample(logits[:6], rows[:6], positions[:6], flags))
        assert torch.equal(captured.last_tokens[:num_slots], eager.last_tokens[:num_slots])


DRAWS = (
    Sampling(temperature=1.0, seed=7),
    Sampling(temperature=0.8, seed=7, top_p=0.9),
    Sampling(temperature=1.2, seed=8, top_k=30, min_p=0.02),
    Sampling(temperature=0.0),
    Sampling(temperature=1.0, seed=-(2**63), repetition_penalty=1.2, frequency_penalty=0.1),
)


def generate(checkpoint: Checkpoint, requests: list[Request], num_tokens: int) -> list[list[int]]:
    driver = Driver(make_runner(checkpoint.model, checkpoint.config, TensorParallel()))
    for request in requests:
        driver.admit(request)
        driver.prefill(request, 6)
    driver.decode(requests, num_tokens - 1)
    return [request.output_ids for request in requests]


def test_seeded_draws_are_the_same_alone_and_in_a_batch(one_checkpoint: Checkpoint) -> None:
    def prompts() -> list[Request]:
        return [one_checkpoint.prompt(90 + seed, 9, sampling=sampling)[0] for seed, sampling in enumerate(DRAWS)]

    together = generate(one_checkpoint, prompts(), 12)
    alone = [generate(one_checkpoint, [request], 12)[0] for request in prompts()]
    assert together == alone
    assert generate(one_checkpoint, list(reversed(prompts())), 12) == list(reversed(alone))


@pytest.mark.parametrize("after", [1, 5])
def test_a_preempted_sequence_draws_what_it_would_have_drawn(one_checkpoint: Checkpoint, after: int) -> None:
    for sampling in DRAWS:
        whole = generate(one_checkpoint, [one_checkpoint.prompt(95, 9, sampling=sampling)[0]], 10)[0]
        request, _ = one_checkpoint.prompt(95, 9, sampling=sampling)
        driver = Driver(make_runner(one_checkpoint.model, one_checkpoint.config, TensorParallel()))
        driver.admit(request)
        driver.prefill(request)
        driver.decode([request], after - 1)
        driver.release(request)
        driver.admit(request)
        driver.prefill(request)
        driver.decode([request], 9 - after)
        assert request.output_ids == whole
