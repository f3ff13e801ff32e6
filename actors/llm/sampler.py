"""Logits -> token ids: gathers each row's sampling fields and keeps the token counts that penalties need."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vlmrt.actors.llm.batch import HostBatch
from vlmrt.actors.llm.slots import Slots
from vlmrt.actors.llm.transfer import to_device
from vlmrt.kernels.sampling import SamplingBatch, sample


class Sampler:
    """The sampled tokens of all slots, on the device.

    last_tokens [num_slots + 1], the last one nobody's, lets the next step start before the host has seen this one's
    tokens.  prompt_mask and output_counts [num_slots, vocab_size] exist from the first request with a penalty on; a row
    is right for as long as its slot holds such a request, and unread otherwise.
    """

    def __init__(self, slots: Slots, vocab_size: int, device: torch.device) -> None:
        self._slots = slots
        self._vocab_size = vocab_size
        self._device = device
        self.last_tokens = torch.zeros(len(slots) + 1, dtype=torch.int64, device=device)
        self._prompt_mask: Tensor | None = None
        self._output_counts: Tensor | None = None

    def admit(self, slot: int) -> None:
        """Count the known tokens of a sequence that has just entered a slot, generated ones included."""
        if not self._slots.sampling.penalised[slot]:
            return
        if self._prompt_mask is None or self._output_counts is None:
            shape = (len(self._slots), self._vocab_size)
            self._prompt_mask = torch.zeros(shape, dtype=torch.bool, device=self._device)
            self._output_counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
        num_prompt_tokens = int(self._slots.num_prompt_tokens[slot])
        token_ids = self._slots.token_ids[slot, : int(self._slots.num_known[slot])]
        mask = np.zeros(self._vocab_size, np.bool_)
        mask[token_ids[:num_prompt_tokens]] = True
        counts = np.bincount(token_ids[num_prompt_tokens:], minlength=self._vocab_size).astype(np.int32)
        self._prompt_mask[slot] = to_device(mask, self._device)
        self._output_counts[slot] = to_device(counts, self._device)

    def sample(self, logits: Tensor, batch: HostBatch) -> Tensor:
        """One token for each row that samples: float32 [R, V] -> int64 [R]."""
        slots = to_device(batch.sample_slots, self._device)
        token_ids = sample(logits, self._sampling_batch(batch, slots))
        self.last_tokens[slots] = token_ids
        if self._output_counts is not None:
            flat = slots * self._vocab_size + token_ids
            self._output_counts.view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        return token_ids

    def _sampling_batch(self, batch: HostBatch, slots: Tensor) -> SamplingBatch:
        fields = self._slots.sampling
        floats = fields.floats[:, batch.sample_slots]
        integers = np.stack((fields.top_k[batch.sample_slots], fields.seed[batch.sample_slots], batch.output_positions))
        temperature, top_p, min_p, repetition, frequency, presence = to_device(floats, self._device).unbind()
        top_k, seeds, positions = to_device(integers, self._device).unbind()
        penalised = bool(fields.penalised[batch.sample_slots].any())
        mask, counts = self._prompt_mask, self._output_counts
        return SamplingBatch(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition,
            frequency_penalty=frequency,
            presence_penalty=presence,
            seeds=seeds,
            positions=positions,
            prompt_mask=mask.index_select(0, slots) if penalised and mask is not None else None,
            output_counts=counts.index_select(0, slots) if penalised and counts is not None else None,
            all_greedy=not floats[0].any(),
            any_top_k=bool(integers[0].any()),
            any_top_p=bool((floats[1] < 1.0).any()),
            any_min_p=bool(floats[2].any()),
        )
