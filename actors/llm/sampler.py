"""Logits -> token ids: each slot's sampling fields on the device, and the token counts that penalties need."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmrt.actors.llm.slots import FLOAT_FIELDS, GREEDY_FLOATS, SamplingFlags, Slots
from vlmrt.kernels.sampling import SamplingBatch, sample
from vlmrt.kernels.transfer import to_device

INTEGER_FIELDS = ("top_k", "seed")


class Sampler:
    """The sampling fields and the sampled tokens of all slots, on the device.

    Every tensor here has one row more than there are slots: row num_slots is greedy and belongs to nobody, so that a
    padded batch may sample and write there.  The tensors stay where they are, hence sample can be part of a CUDA
    graph: it reads slots and output_positions on the device and depends on the host by its flags alone.
    last_tokens [num_slots + 1] lets the next step start before the host has seen this one's tokens.  The prompt mask
    and the output counts [num_slots + 1, vocab_size] exist from the first request with a penalty on, before the flags
    first say so; a row is right for as long as its slot holds such a request, and unread otherwise.
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
        token_ids = sample(logits, self._sampling_batch(slots, output_positions, flags))
        # Memory first, then writes: a step that finds no room has sampled nothing and may run again.
        counted = flags.any_penalties and self._output_counts is not None
        flat = slots * self._vocab_size + token_ids if counted else None
        ones = torch.ones_like(slots, dtype=torch.int32) if counted else None
        self.last_tokens.index_copy_(0, slots, token_ids)
        if self._output_counts is not None and flat is not None and ones is not None:
            self._output_counts.view(-1).index_add_(0, flat, ones)
        return token_ids

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
            rows=slots,
        )


def _packed(floats: NDArray[np.float32]) -> NDArray[np.int64]:
    """[n, an even number] of floats as half as many integers of their bits."""
    return np.ascontiguousarray(floats).view(np.int64)
