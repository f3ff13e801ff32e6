"""What a rank remembers of each running sequence between two steps: tokens, blocks, media spans, sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlmrt.actors.models.rope_index import MediaSpan
from vlmrt.runtime.messages import LogitBias, NewSequence, Sampling


class PlanError(ValueError):
    """A StepPlan contradicts what this rank holds; going on would compute nonsense."""


class Slots:
    """One row per slot in numpy arrays, so that a step's batch is gathered without a loop over rows.

    num_tokens counts every token of a sequence, num_known those whose ids have reached the host: between a step's
    launch and its end the sampled token is counted but not yet known here.
    """

    def __init__(self, num_slots: int, max_model_len: int, block_size: int) -> None:
        columns = max_model_len + 2  # steps planned past the end of a sequence are run and discarded
        self.block_size = block_size
        self.max_tokens = columns
        self.token_ids = np.zeros((num_slots, columns), np.int64)
        self.block_table = np.zeros((num_slots, -(-columns // block_size)), np.int32)
        self.num_blocks = np.zeros(num_slots, np.int64)
        self.num_tokens = np.zeros(num_slots, np.int64)
        self.num_known = np.zeros(num_slots, np.int64)
        self.num_prompt_tokens = np.zeros(num_slots, np.int64)
        self.num_given = np.zeros(num_slots, np.int64)  # tokens that it entered its slot with; later ones are sampled
        self.rope_delta = np.zeros(num_slots, np.int64)
        self.has_spans = np.zeros(num_slots, np.bool_)
        self.admissions = np.zeros(num_slots, np.int64)  # tells a slot's sequences apart
        self.spans: list[tuple[MediaSpan, ...]] = [()] * num_slots
        self.sampling = SlotSampling(num_slots)

    def __len__(self) -> int:
        return len(self.spans)

    def admit(self, sequence: NewSequence) -> None:
        """Put a sequence into a free slot. Raises PlanError if there is no such slot, it is taken or too short."""
        slot, num_tokens = sequence.slot, len(sequence.token_ids)
        self._check_slot(slot)
        if self.num_tokens[slot]:
            raise PlanError(f"slot {slot} of request {sequence.request_id} is taken")
        if not 0 < sequence.num_prompt_tokens <= num_tokens < self.max_tokens:
            raise PlanError(
                f"request {sequence.request_id}: {num_tokens} tokens, {sequence.num_prompt_tokens} of them its prompt, "
                f"do not fit a slot of {self.max_tokens - 2}"
            )
        self.token_ids[slot, :num_tokens] = sequence.token_ids
        self.num_tokens[slot] = self.num_known[slot] = num_tokens
        self.num_prompt_tokens[slot] = sequence.num_prompt_tokens
        self.num_given[slot] = num_tokens
        self.rope_delta[slot] = sequence.rope_delta
        self.spans[slot] = tuple(
            MediaSpan(item.start, item.num_tokens, item.grid_thw, item.time_offset, item.continues)
            for item in sequence.media
        )
        self.has_spans[slot] = bool(sequence.media)
        self.admissions[slot] += 1
        self.num_blocks[slot] = 0
        self.extend_blocks(slot, sequence.block_ids)
        self.sampling.put(slot, sequence.sampling)

    def extend_blocks(self, slot: int, block_ids: Sequence[int]) -> None:
        self._check_slot(slot)
        first = int(self.num_blocks[slot])
        if first + len(block_ids) > self.block_table.shape[1]:
            raise PlanError(f"slot {slot}: {first + len(block_ids)} blocks are more than a sequence can have")
        self.block_table[slot, first : first + len(block_ids)] = block_ids
        self.num_blocks[slot] = first + len(block_ids)

    def release(self, slot: int) -> None:
        self._check_slot(slot)
        self.num_tokens[slot] = self.num_known[slot] = 0
        self.num_blocks[slot] = 0
        self.spans[slot] = ()

    def clear(self) -> None:
        for slot in range(len(self)):
            self.release(slot)

    def learn(self, slots: NDArray[np.int64], admissions: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """The tokens of an earlier step are known now; sequences that have left their slots since are passed over."""
        same = self.admissions[slots] == admissions
        same &= self.num_known[slots] < self.num_tokens[slots]
        slots = slots[same]
        self.token_ids[slots, self.num_known[slots]] = token_ids[same]
        self.num_known[slots] += 1

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < len(self):
            raise PlanError(f"slot {slot} does not exist; there are {len(self)}")


FLOAT_FIELDS = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
NUM_NEEDS = 7
GREEDY_FLOATS = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0)  # in the order of FLOAT_FIELDS: best token, nothing else in use


class SamplingFlags(NamedTuple):
    """What the rows of a batch need of the sampler; false skips a step that no row needs."""

    all_greedy: bool
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool
    any_penalties: bool
    any_bias: bool = False
    any_grammar: bool = False
    num_logprobs: int = -1  # the most of any row; -1: no row wants any

    @property
    def is_argmax(self) -> bool:
        """Every row takes its best token by the logits as they are."""
        return self.all_greedy and not (self.any_penalties or self.any_bias or self.any_grammar)


class SlotSampling:
    """The Sampling of each slot, by field, so that one step's rows are gathered at once."""

    def __init__(self, num_slots: int) -> None:
        self.floats = np.zeros((len(FLOAT_FIELDS), num_slots), np.float32)
        self.top_k = np.zeros(num_slots, np.int64)
        self.seed = np.zeros(num_slots, np.int64)
        self.penalised = np.zeros(num_slots, np.bool_)  # any of the three penalties is in use
        self.has_grammar = np.zeros(num_slots, np.bool_)
        self.num_logprobs = np.full(num_slots, -1, np.int64)
        self.logit_bias: list[tuple[LogitBias, ...]] = [()] * num_slots
        self._needs = np.zeros(num_slots, np.int64)  # a bit for each of the first NUM_NEEDS fields of SamplingFlags

    def put(self, slot: int, sampling: Sampling) -> None:
        self.floats[:, slot] = (
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty,
        )
        self.top_k[slot] = sampling.top_k
        self.seed[slot] = sampling.seed
        penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        self.penalised[slot] = penalties != (1.0, 0.0, 0.0)
        self.has_grammar[slot] = bool(sampling.grammar)
        self.num_logprobs[slot] = sampling.num_logprobs
        self.logit_bias[slot] = sampling.logit_bias
        needs = (
            sampling.temperature > 0,
            sampling.top_k,
            sampling.top_p < 1,
            sampling.min_p,
            self.penalised[slot],
            sampling.logit_bias,
            sampling.grammar,
        )
        self._needs[slot] = sum(1 << bit for bit, need in enumerate(needs) if need)

    def flags(self, slots: NDArray[np.int64]) -> SamplingFlags:
        needs = int(np.bitwise_or.reduce(self._needs[slots]))
        any_top_k, any_top_p, any_min_p, any_penalties, any_bias, any_grammar = (
            bool(needs >> bit & 1) for bit in range(1, NUM_NEEDS)
        )
        num_logprobs = int(self.num_logprobs[slots].max(initial=-1))
        return SamplingFlags(
            not needs & 1, any_top_k, any_top_p, any_min_p, any_penalties, any_bias, any_grammar, num_logprobs
        )
