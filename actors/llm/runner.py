"""One rank's step: StepPlan -> forward pass -> sampled tokens."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmrt.actors.llm.batch import HostBatch, Ints, MergePart, build_batch, part_of
from vlmrt.actors.llm.cpu_threads import CpuThreads
from vlmrt.actors.llm.kv_cache import KvCache
from vlmrt.actors.llm.kv_host_tier import KvHostTier
from vlmrt.actors.llm.sampler import Sampler
from vlmrt.actors.llm.slots import PlanError, Slots
from vlmrt.actors.llm.step_graphs import StepGraphs, StepShape
from vlmrt.actors.models.qwen2_vl.language import LanguageModel
from vlmrt.kernels.embed_merge import embed_merge
from vlmrt.kernels.paged_attention import PagedBatch
from vlmrt.kernels.transfer import all_to_device, to_device
from vlmrt.runtime.messages import ActorName, Epoch, StepPlan, StepResult
from vlmrt.runtime.slab import EmbeddingSlab, row_index

SlabKey = tuple[ActorName, Epoch]
Tokens = tuple[Tensor, Ints | slice]  # int64, and where the tokens of the rows that sample are among them

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step that the device runs, or has run; its tokens are read by Runner.complete."""

    step: int
    batch: HostBatch
    tokens: tuple[Tokens, ...]  # on the host, valid once done has happened; in row order, failed rows left out
    failed: tuple[int, ...]  # rows whose sequences are lost
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
        tp_size: int = 1,
        host_tier: KvHostTier | None = None,
    ) -> None:
        self._model = model
        self._host_tier = host_tier
        self._tp_size = tp_size
        self._cpu_threads = cpu_threads
        self._kv = kv
        self._slots = slots
        self._merge_size = merge_size
        self._device = device
        self._sampler = Sampler(slots, model.config.vocab_size, device)
        self._graphs: StepGraphs | None = None
        self._completed_s = 0.0  # when the last step was
        self._slabs: dict[SlabKey, EmbeddingSlab] = {}
        self._lost: set[int] = set()  # slots whose sequence found no memory: nothing of it runs until it is released

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
        """Forget all sequences and slabs; weights and the memory of the KV cache, on the host too, stay."""
        self._slots.clear()
        self._lost.clear()
        for key in list(self._slabs):
            self.detach(key)

    def launch(self, plan: StepPlan) -> PendingStep:
        """Queue a step on the device; on a CPU, run it.

        Blocks are saved to host memory, then loaded from it, then rows run, if there are any.
        A step that finds no memory runs again in pieces; a sequence that finds none even alone is lost, the others go
        on.  Ranks of a group run each step together, so one of them cannot: there the error ends the rank.
        Raises: PlanError if the plan contradicts the slots, or names a slab or a block that this rank lacks,
        torch.OutOfMemoryError in a group of ranks.
        """
        started_s = time.perf_counter()
        batch = build_batch(plan, self._slots, self._merge_size)
        if self._cpu_threads is not None:
            self._cpu_threads.set_for(batch.num_tokens)
        self._lost.difference_update(plan.release)
        with torch.inference_mode():
            self._copy_blocks(plan)
            self._admit([sequence.slot for sequence in plan.admit])
            tokens, failed = self._run_what_can(batch) if len(batch.slots) else ((), ())
            if failed:
                batch = part_of(batch, ~np.isin(np.arange(len(batch.slots)), failed))
            done = None
            if self._device.type != "cpu":
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record()
        return PendingStep(plan.step, batch, tokens, failed, done, started_s)

    def is_done(self, pending: PendingStep) -> bool:
        return pending.done is None or bool(pending.done.query())  # type: ignore[no-untyped-call]

    def complete(self, pending: PendingStep) -> StepResult:
        """Wait for a step, the oldest of those launched, and learn its tokens."""
        if pending.done is not None:
            pending.done.synchronize()
        found = [token_ids.numpy()[rows] for token_ids, rows in pending.tokens]
        token_ids = found[0] if len(found) == 1 else np.concatenate([np.zeros(0, np.int64), *found])
        self._slots.learn(pending.batch.sample_slots, pending.batch.sample_admissions, token_ids)
        completed_s = time.perf_counter()
        # A step that was launched ahead began when the one before it ended.
        duration_s = completed_s - max(pending.started_s, self._completed_s)
        self._completed_s = completed_s
        return StepResult(pending.step, tuple(token_ids.tolist()), 1e3 * duration_s, pending.failed)

    def _copy_blocks(self, plan: StepPlan) -> None:
        if not plan.saves and not plan.loads:
            return
        if self._host_tier is None:
            raise PlanError(f"step {plan.step} saves or loads blocks, and there is no host memory for them")
        self._host_tier.save(plan.saves)
        self._host_tier.load(plan.loads)

    def _admit(self, slots: Sequence[int]) -> None:
        """Let the sampler take in new sequences; one that finds no memory for its penalties is lost."""
        try:
            self._sampler.admit(slots)
        except torch.OutOfMemoryError:
            if self._tp_size > 1:
                raise
        else:
            return
        torch.cuda.empty_cache()
        for slot in slots:
            try:
                self._sampler.admit([slot])
            except torch.OutOfMemoryError:
                self._lose(slot)

    def _try(self, batch: HostBatch) -> Tokens | None:
        """The tokens, on their way to the host; None if there is no memory for this batch."""
        try:
            token_ids, rows = self._run(batch)
            return token_ids if self._device.type == "cpu" else token_ids.to("cpu", non_blocking=True), rows
        except torch.OutOfMemoryError:
            if self._tp_size > 1:
                raise
        # Here, not above: as long as the error lives, its traceback holds the tensors of the step that failed.
        torch.cuda.empty_cache()
        logger.warning("no memory for %d rows, %d tokens at once", len(batch.slots), batch.num_tokens)
        return None

    def _run_what_can(self, batch: HostBatch) -> tuple[tuple[Tokens, ...], tuple[int, ...]]:
        """(tokens, rows that failed): at once, else decode rows together and every other row alone.

        What a step that failed has written is written again, with the same values, and it has sampled nothing.
        """
        is_whole = not self._lost or self._lost.isdisjoint(batch.slots.tolist())
        if is_whole and (tokens_of_all := self._try(batch)) is not None:
            return (tokens_of_all,), ()
        num_rows, num_decodes = len(batch.slots), batch.num_decodes
        lost = np.isin(batch.slots, sorted(self._lost))
        failed = np.flatnonzero(lost).tolist()
        pieces = [np.array([row]) for row in range(num_rows - 1, num_decodes - 1, -1) if not lost[row]]
        pieces.append(np.flatnonzero(~lost[:num_decodes]))
        tokens = []
        while pieces:
            rows = pieces.pop()
            if not len(rows):
                continue
            found = self._try(part_of(batch, np.isin(np.arange(num_rows), rows)))
            if found is not None:
                tokens.append(found)
            elif len(rows) == 1:
                self._lose(int(batch.slots[rows[0]]))
                failed.append(int(rows[0]))
            else:
                pieces += [rows[row : row + 1] for row in range(len(rows) - 1, -1, -1)]
        return tuple(tokens), tuple(sorted(failed))

    def _lose(self, slot: int) -> None:
        logger.error("no memory for a step of slot %d alone: its request is given up", slot)
        self._lost.add(slot)

    def _run(self, batch: HostBatch) -> Tokens:
        """The tokens on the device."""
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
