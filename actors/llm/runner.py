"""One rank's step: StepPlan -> forward pass -> sampled tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmrt.actors.llm.batch import HostBatch, Ints, MergePart, build_batch
from vlmrt.actors.llm.cpu_threads import CpuThreads
from vlmrt.actors.llm.kv_cache import KvCache
from vlmrt.actors.llm.sampler import Sampler
from vlmrt.actors.llm.slots import PlanError, Slots
from vlmrt.actors.llm.step_graphs import StepGraphs, StepShape
from vlmrt.actors.llm.transfer import all_to_device, to_device
from vlmrt.actors.models.qwen2_vl.language import LanguageModel
from vlmrt.kernels.embed_merge import embed_merge
from vlmrt.kernels.paged_attention import PagedBatch
from vlmrt.runtime.messages import ActorName, Epoch, StepPlan, StepResult
from vlmrt.runtime.slab import EmbeddingSlab, row_index

SlabKey = tuple[ActorName, Epoch]


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step that the device runs, or has run; its tokens are read by Runner.complete."""

    step: int
    batch: HostBatch
    token_ids: Tensor  # int64 on the host, valid once done has happened
    rows: Ints | slice  # where the tokens of the batch's R rows that sample are among them
    done: torch.cuda.Event | None  # None: a CPU has finished when launch returns
    started_s: float


class Runner:
    """The model, its KV cache, the slots and the slabs that image rows come from."""

    def __init__(
        self,
        model: LanguageModel,
        kv: KvCache,
        slots: Slots,
        merge_size: int,
        device: torch.device,
        cpu_threads: CpuThreads | None = None,
    ) -> None:
        self._model = model
        self._cpu_threads = cpu_threads
        self._kv = kv
        self._slots = slots
        self._merge_size = merge_size
        self._device = device
        self._sampler = Sampler(slots, model.config.vocab_size, device)
        self._graphs: StepGraphs | None = None
        self._slabs: dict[SlabKey, EmbeddingSlab] = {}

    def record(self, shapes: Sequence[StepShape]) -> None:
        """Record steps of these shapes on a GPU, while no sequence is in a slot."""
        with torch.inference_mode():
            columns = self._slots.block_table.shape[1]
            self._graphs = StepGraphs(self._model, self._kv, self._sampler, columns, shapes)

    def attach(self, key: SlabKey, slab: EmbeddingSlab) -> None:
        """Take rows from this slab for slices that name it; the runner closes it."""
        self.detach(key)
        self._slabs[key] = slab

    def detach(self, key: SlabKey) -> None:
        """Close a slab, if it is attached; no step that reads it may still be running."""
        slab = self._slabs.pop(key, None)
        if slab is not None:
            slab.close()

    def clear(self) -> None:
        """Forget all sequences and slabs; weights and the memory of the KV cache stay."""
        self._slots.clear()
        for key in list(self._slabs):
            self.detach(key)

    def launch(self, plan: StepPlan) -> PendingStep:
        """Queue a step on the device; on a CPU, run it.

        Raises: PlanError if the plan contradicts the slots or names a slab that is not attached.
        """
        started_s = time.perf_counter()
        batch = build_batch(plan, self._slots, self._merge_size)
        if self._cpu_threads is not None:
            self._cpu_threads.set_for(batch.num_tokens)
        with torch.inference_mode():
            self._sampler.admit([sequence.slot for sequence in plan.admit])
            token_ids, rows = self._run(batch)
            done = None
            if self._device.type != "cpu":
                token_ids = token_ids.to("cpu", non_blocking=True)
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record()
        return PendingStep(plan.step, batch, token_ids, rows, done, started_s)

    def is_done(self, pending: PendingStep) -> bool:
        return pending.done is None or bool(pending.done.query())  # type: ignore[no-untyped-call]

    def complete(self, pending: PendingStep) -> StepResult:
        """Wait for a step, the oldest of those launched, and learn its tokens."""
        if pending.done is not None:
            pending.done.synchronize()
        token_ids = pending.token_ids.numpy()[pending.rows]
        self._slots.learn(pending.batch.sample_slots, pending.batch.sample_admissions, token_ids)
        duration_ms = (time.perf_counter() - pending.started_s) * 1e3
        return StepResult(pending.step, tuple(token_ids.tolist()), duration_ms)

    def _run(self, batch: HostBatch) -> tuple[Tensor, Ints | slice]:
        """(tokens on the device, where among them those of the rows that sample are)."""
        flags = self._slots.sampling.flags(batch.sample_slots)
        recorded = None if self._graphs is None else self._graphs.find(batch)
        if self._graphs is not None and recorded is not None:
            for image_rows, image_positions in self._images(batch.merges):
                self._graphs.put_images(image_rows, to_device(recorded.places(image_positions, batch), self._device))
            return self._graphs.run(recorded, batch, flags), recorded.places(batch.sample_sequences, batch)
        hidden = self._forward(batch)
        if not len(batch.sample_slots):
            return torch.zeros(0, dtype=torch.int64), slice(None)
        positions, slots, output_positions = all_to_device(
            (batch.sample_positions, batch.sample_slots, batch.output_positions), self._device
        )
        logits = self._model.logits(hidden.index_select(0, positions))
        return self._sampler.sample(logits, slots, output_positions, flags), slice(None)

    def _forward(self, batch: HostBatch) -> Tensor:
        """Hidden states [T, H] of a batch of any shape."""
        token_ids, positions, slot_mapping, cu_seqlens, context_lens, block_tables, slots = all_to_device(
            (
                batch.token_ids,
                batch.positions,
                batch.slot_mapping,
                batch.cu_seqlens,
                batch.context_lens,
                batch.block_tables,
                batch.slots,
            ),
            self._device,
        )
        if len(batch.unknown_positions):
            places, unknown_slots = all_to_device((batch.unknown_positions, batch.unknown_slots), self._device)
            token_ids.index_copy_(0, places, self._sampler.last_tokens[unknown_slots])
        if self._graphs is not None:
            self._graphs.put_blocks(slots, block_tables)
        hidden = self._model.embed(token_ids)
        for rows, image_positions in self._images(batch.merges):
            embed_merge(hidden, rows, to_device(image_positions, self._device))
        cos, sin = self._model.rotary(positions)
        paged = PagedBatch(
            cu_seqlens=cu_seqlens,
            context_lens=context_lens,
            block_tables=block_tables,
            slot_mapping=slot_mapping,
            num_decodes=batch.num_decodes,
            query_lens=batch.query_lens,
            context_lens_host=batch.context_lens_host,
        )
        return self._model.forward(hidden, cos, sin, self._kv, paged)

    def _images(self, merges: Sequence[MergePart]) -> Iterator[tuple[Tensor, Ints]]:
        """(image rows [R, H], positions of their placeholders among the step's tokens), slab by slab."""
        by_slab: dict[SlabKey, list[MergePart]] = {}
        for part in merges:
            by_slab.setdefault((part.source.vit, part.source.epoch), []).append(part)
        for key, parts in by_slab.items():
            if key not in self._slabs:
                raise PlanError(f"image rows lie in the slab of {key[0]}, epoch {key[1]}, which is not attached")
            slab = self._slabs[key]
            rows = [row_index(p.source.pages, p.source.first_row, p.source.num_rows, slab.page_rows) for p in parts]
            positions = [np.arange(p.first_position, p.first_position + p.source.num_rows) for p in parts]
            source = slab.tensor().index_select(0, to_device(np.concatenate(rows), self._device))
            yield source, np.concatenate(positions)
