"""Logits -> token ids: each slot's sampling fields on the device, and the tables that only some requests need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmrt.actors.llm.slots import FLOAT_FIELDS, GREEDY_FLOATS, SamplingFlags, Slots
from vlmrt.kernels.sampling import LogitBias, SamplingBatch, logprobs, sample
from vlmrt.kernels.transfer import all_to_device, to_device

INTEGER_FIELDS = ("top_k", "seed")
LEAST_BIASES = 16  # columns that the table of biases begins with
ANY_TOKEN = -1  # a word of a grammar's mask that allows all of its tokens
WARM_UP_ROWS = (1, 16)  # of few and of many rows, which kernels tell apart
WARM_UP_FLAGS = (  # greedy, drawn, drawn among some
    SamplingFlags(True, False, False, False, False),
    SamplingFlags(False, False, False, False, False),
    SamplingFlags(False, True, True, True, False),
)

Logprobs = tuple[Tensor, Tensor, Tensor]  # of each row: its token's float32 [R], the likeliest int64 and float32 [R, n]


class Sampler:
    """The sampling fields and the sampled tokens of all slots, on the device.

    Every tensor here has one row more than there are slots: row num_slots is greedy and belongs to nobody, so that a
    padded batch may sample and write there.  The tensors stay where they are, hence sample can be part of a CUDA
    graph: it reads slots and output_positions on the device and depends on the host by its flags alone.
    last_tokens [num_slots + 1] lets the next step start before the host has seen this one's tokens.  The prompt mask
    and the output counts [num_slots + 1, vocab_size] exist from the first request with a penalty on, before the flags
    first say so; a row is right for as long as its slot holds such a request, and unread otherwise.  So do the biases
    [num_slots + 1, as many as any request had] and the grammar's mask [num_slots + 1, a bit for each token], whose rows
    are read for every request of a batch: those of slots without bias or grammar change nothing.
    """

    def __init__(self, slots: Slots, vocab_size: int, device: torch.device) -> None:
        self._slots = slots
        self._vocab_size = vocab_size
        self._device = device
        num_rows = len(slots) + 1
        self.last_tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)
        # One table, so that an admission is one copy: two integers, then the floats in pairs.
        self._fields = torch.zeros((num_rows, len(INTEGER_FIELDS) + len(FLOAT_FIELDS) // 2), dtype=torch.int64)
        self._fields[:, len(INTEGER_FIELDS) :] = torch.from_numpy(_packed(np.array([GREEDY_FLOATS], np.float32)))
        self._fields = self._fields.to(device)
        self._prompt_mask: Tensor | None = None
        self._output_counts: Tensor | None = None
        self._bias: LogitBias | None = None
        self._biased: set[int] = set()  # slots whose rows of that table hold anything
        self._grammar_mask: Tensor | None = None
        self._masked: set[int] = set()  # slots whose rows of that table do

    def admit(self, slots: Sequence[int]) -> None:
        """Take over the sampling fields of sequences that have just entered their slots.

        Where there are penalties, the known tokens are counted, generated ones included.
        """
        if not slots:
            return
        fields, at = self._slots.sampling, np.array(slots, np.int64)
        integers = np.stack((at, fields.top_k[at], fields.seed[at]), axis=1)
        packed = np.concatenate((integers, _packed(fields.floats[:, at].T)), axis=1)
        admitted = to_device(packed, self._device)
        self._fields.index_copy_(0, admitted[:, 0], admitted[:, 1:])
        for slot in slots:
            if fields.penalised[slot]:
                self._count_known(slot)
        self._put_biases(slots)
        self._clear_masks(slots)

    def _put_biases(self, slots: Sequence[int]) -> None:
        """The biases of these slots take the places of those who were there before."""
        found = {slot: self._slots.sampling.logit_bias[slot] for slot in slots}
        changed = [slot for slot in slots if found[slot] or slot in self._biased]
        if not changed:
            return
        bias = self._bias_table(max(map(len, found.values())))
        shape = (len(changed), bias.token_ids.shape[1])
        token_ids, before = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
        values = np.zeros(shape, np.float32)
        for row, slot in enumerate(changed):
            for column, each in enumerate(found[slot]):
                if 0 <= each.token_id < self._vocab_size:
                    token_ids[row, column], values[row, column] = each.token_id, each.value
                    before[row, column] = each.before
        at, *columns = all_to_device((np.array(changed, np.int64), token_ids, values, before), self._device)
        for table, rows in zip((bias.token_ids, bias.values, bias.before), columns, strict=True):
            table.index_copy_(0, at, rows)
        self._biased.difference_update(changed)
        self._biased.update(slot for slot in changed if found[slot])

    def _bias_table(self, num_columns: int) -> LogitBias:
        """Wide enough for so many biases of a slot."""
        old = self._bias
        old_columns = 0 if old is None else old.token_ids.shape[1]
        if old is not None and num_columns <= old_columns:
            return old
        shape = (len(self._slots) + 1, max(LEAST_BIASES, 1 << (num_columns - 1).bit_length()))
        token_ids = torch.full(shape, -1, dtype=torch.int64, device=self._device)
        values = torch.zeros(shape, dtype=torch.float32, device=self._device)
        before = torch.zeros(shape, dtype=torch.int64, device=self._device)
        if old is not None:
            token_ids[:, :old_columns] = old.token_ids
            values[:, :old_columns] = old.values
            before[:, :old_columns] = old.before
        self._bias = LogitBias(token_ids, values, before)
        return self._bias

    def _clear_masks(self, slots: Sequence[int]) -> None:
        """Allow every token to these slots; the masks of those with a grammar come step by step."""
        if self._grammar_mask is None and self._slots.sampling.has_grammar[list(slots)].any():
            shape = (len(self._slots) + 1, -(-self._vocab_size // 32))
            self._grammar_mask = torch.full(shape, ANY_TOKEN, dtype=torch.int32, device=self._device)
        changed = self._masked.intersection(slots)
        if changed and self._grammar_mask is not None:
            at = to_device(np.array(sorted(changed), np.int64), self._device)
            self._grammar_mask.index_fill_(0, at, ANY_TOKEN)
            self._masked -= changed

    def new_masks(self, num_rows: int) -> Tensor:
        """Room for so many masks on the host, int32 [num_rows, ceil(vocab_size / 32)]."""
        shape = (num_rows, -(-self._vocab_size // 32))
        return torch.empty(shape, dtype=torch.int32, pin_memory=self._device.type != "cpu")

    def put_masks(self, slots: NDArray[np.int64], words: Tensor) -> None:
        """The masks of the next tokens of R slots with a grammar: words as new_masks made them, filled."""
        assert self._grammar_mask is not None
        at = to_device(slots, self._device)
        self._grammar_mask.index_copy_(0, at, words.to(self._device, non_blocking=True))
        self._masked.update(slots.tolist())

    def _count_known(self, slot: int) -> None:
        if self._prompt_mask is None or self._output_counts is None:
            shape = (len(self._slots) + 1, self._vocab_size)
            self._prompt_mask = torch.zeros(shape, dtype=torch.bool, device=self._device)
            self._output_counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
        num_prompt_tokens = int(self._slots.num_prompt_tokens[slot])
        token_ids = self._slots.token_ids[slot, : int(self._slots.num_known[slot])]
        mask = np.zeros(self._vocab_size, np.bool_)
        mask[token_ids[:num_prompt_tokens]] = True
        counts = np.bincount(token_ids[num_prompt_tokens:], minlength=self._vocab_size).astype(np.int32)
        self._prompt_mask[slot] = to_device(mask, self._device)
        self._output_counts[slot] = to_device(counts, self._device)

    def sample(self, logits: Tensor, slots: Tensor, output_positions: Tensor, flags: SamplingFlags) -> Tensor:
        """One token for each row that samples.

        Shapes: logits float32 or bfloat16 [R, V], slots and output_positions int64 [R] on the device -> int64 [R].
        flags are those of SlotSampling for the same slots, or any that have more of them set and all_greedy not.
        """
        token_ids = self.choose(logits, slots, output_positions, flags)
        self.count(token_ids, slots, flags)
        return token_ids

    def choose(self, logits: Tensor, slots: Tensor, output_positions: Tensor, flags: SamplingFlags) -> Tensor:
        """The tokens that sample returns; it takes memory and writes nothing."""
        return sample(logits, self._sampling_batch(slots, output_positions, flags))

    def count(self, token_ids: Tensor, slots: Tensor, flags: SamplingFlags) -> None:
        """The tokens chosen for these slots are their last ones.

        Memory first, then writes: a step that finds no room has sampled nothing and may run again.
        """
        counted = flags.any_penalties and self._output_counts is not None
        flat = slots * self._vocab_size + token_ids if counted else None
        ones = torch.ones_like(slots, dtype=torch.int32) if counted else None
        self.last_tokens.index_copy_(0, slots, token_ids)
        if self._output_counts is not None and flat is not None and ones is not None:
            self._output_counts.view(-1).index_add_(0, flat, ones)

    def logprobs(self, logits: Tensor, token_ids: Tensor, rows: NDArray[np.int64], num_top: int) -> Logprobs:
        """Of some rows of a batch: their tokens' log-probabilities, and the num_top likeliest tokens."""
        if len(rows) < len(logits):
            at = to_device(rows, self._device)
            logits, token_ids = logits.index_select(0, at), token_ids.index_select(0, at)
        return logprobs(logits, token_ids, min(num_top, self._vocab_size))

    def warm_up(self, dtype: torch.dtype) -> None:
        """Let a GPU compile what it runs for any Sampling, so that no stream waits for it; writes nothing."""
        anybody = torch.full((len(self._slots) + 1, -(-self._vocab_size // 32)), ANY_TOKEN, dtype=torch.int32)
        masks = (None, anybody.to(self._device))
        for num_rows in WARM_UP_ROWS:
            logits = torch.zeros((num_rows, self._vocab_size), dtype=dtype, device=self._device)
            slots = torch.full((num_rows,), len(self._slots), dtype=torch.int64, device=self._device)
            for flags, mask in product(WARM_UP_FLAGS, masks):
                batch = self._sampling_batch(slots, torch.zeros_like(slots), flags)
                token_ids = sample(logits, replace(batch, grammar_mask=mask))
            logprobs(logits, token_ids, 1)

    def _sampling_batch(self, slots: Tensor, output_positions: Tensor, flags: SamplingFlags) -> SamplingBatch:
        top_k, seeds = self._fields[:, : len(INTEGER_FIELDS)].unbind(1)
        floats = self._fields[:, len(INTEGER_FIELDS) :].view(torch.float32)
        temperature, top_p, min_p, repetition, frequency, presence = floats.unbind(1)
        return SamplingBatch(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition,
            frequency_penalty=frequency,
            presence_penalty=presence,
            seeds=seeds,
            positions=output_positions,
            prompt_mask=self._prompt_mask if flags.any_penalties else None,
            output_counts=self._output_counts if flags.any_penalties else None,
            all_greedy=flags.all_greedy,
            any_top_k=flags.any_top_k,
            any_top_p=flags.any_top_p,
            any_min_p=flags.any_min_p,
            logit_bias=self._bias if flags.any_bias else None,
            grammar_mask=self._grammar_mask if flags.any_grammar else None,
            rows=slots,
        )


def _packed(floats: NDArray[np.float32]) -> NDArray[np.int64]:
    """[n, an even number] of floats as half as many integers of their bits."""
    return np.ascontiguousarray(floats).view(np.int64)
