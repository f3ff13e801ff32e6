"""One rank's step: StepPlan -> forward pass -> sampled tokens."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vlmrt.actors.llm.batch import HostBatch, Ints, MergePart, build_batch, part_of
from vlmrt.actors.llm.cpu_threads import CpuThreads
from vlmrt.actors.llm.grammar import GrammarCompiler, SlotGrammars
from vlmrt.actors.llm.kv_cache import KvCache
from vlmrt.actors.llm.kv_host_tier import KvHostTier
from vlmrt.actors.llm.sampler import Logprobs, Sampler
from vlmrt.actors.llm.slots import PlanError, Slots
from vlmrt.actors.llm.step_graphs import StepGraphs, StepShape
from vlmrt.actors.models.qwen2_vl.language import LanguageModel
from vlmrt.kernels.embed_merge import embed_merge
from vlmrt.kernels.paged_attention import PagedBatch
from vlmrt.kernels.transfer import all_to_device, to_device
from vlmrt.runtime.messages import (
    ActorName,
    Epoch,
    FailedRow,
    NewSequence,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from vlmrt.runtime.slab import EmbeddingSlab, row_index

SlabKey = tuple[ActorName, Epoch]
LossReason = Literal["out_of_memory", "grammar"]  # as in FailedRow

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What some rows have sampled, the R of them that have not failed."""

    token_ids: Tensor  # int64, maybe of other rows too
    places: Ints  # [R] where their tokens are among these
    num_logprobs: Ints  # [R] how many likeliest tokens each wants; -1: no log-probability at all
    logprobs: Logprobs | None = None  # of the rows that want any, in order

    def to_host(self) -> Sampled:
        """On its way there, if it is not there already."""
        if self.token_ids.device.type == "cpu":
            return self
        chosen = self.logprobs and _all_to_host(*self.logprobs)
        return replace(self, token_ids=self.token_ids.to("cpu", non_blocking=True), logprobs=chosen)

    def known_token_ids(self) -> Ints:
        token_ids: Ints = self.token_ids.numpy()[self.places]
        return token_ids

    def known_logprobs(self) -> list[TokenLogprobs | None]:
        found: list[TokenLogprobs | None] = [None] * len(self.places)
        if self.logprobs is None:
            return found
        chosen, top_ids, top_values = (each.tolist() for each in self.logprobs)
        for index, row in enumerate(np.flatnonzero(self.num_logprobs >= 0).tolist()):
            count = int(self.num_logprobs[row])
            top = zip(top_ids[index][:count], top_values[index][:count], strict=True)
            found[row] = TokenLogprobs(chosen[index], tuple(top))
        return found


def _all_to_host(chosen: Tensor, top_ids: Tensor, top_values: Tensor) -> Logprobs:
    return (
        chosen.to("cpu", non_blocking=True),
        top_ids.to("cpu", non_blocking=True),
        top_values.to("cpu", non_blocking=True),
    )


@dataclass(frozen=True, slots=True, eq=False)
class PendingStep:
    """A step that the device runs, or has run; its tokens are read by Runner.complete."""

    step: int
    batch: HostBatch
    sampled: tuple[Sampled, ...]  # on the host, valid once done has happened; in row order, failed rows left out
    failed: tuple[FailedRow, ...]
    done: torch.cuda.Event | None  # None: a CPU has finished when launch returns
    started_s: float

    def wait(self) -> None:
        if self.done is not None:
            self.done.synchronize()

    def known_token_ids(self) -> Ints:
        """[R], once it has been waited for."""
        return np.concatenate([np.zeros(0, np.int64), *(each.known_token_ids() for each in self.sampled)])


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
        compiler: GrammarCompiler | None = None,
    ) -> None:
        """compiler: None: rows with a grammar fail."""
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
        self._grammars = SlotGrammars(slots, compiler)
        self._unlearned: deque[PendingStep] = deque()  # launched, their tokens not yet taken in
        self._slabs: dict[SlabKey, EmbeddingSlab] = {}
        self._lost: dict[int, LossReason] = {}  # slots of which nothing runs any more until they are released

    def record(self, shapes: Sequence[StepShape]) -> None:
        """Record steps of these shapes on a GPU, while no sequence is in a slot."""
        with torch.inference_mode():
            columns = self._slots.block_table.shape[1]
            self._graphs = StepGraphs(self._model, self._kv, self._sampler, columns, shapes)
            self._sampler.warm_up(self._kv[0][0].dtype)

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
        self._grammars.clear()
        self._unlearned.clear()
        self._lost.clear()
        for key in list(self._slabs):
            self.detach(key)

    def launch(self, plan: StepPlan) -> PendingStep:
        """Queue a step on the device; on a CPU, run it.

        Blocks are saved to host memory, then loaded from it, then rows run, if there are any.
        A step that finds no memory runs again in pieces; a sequence that finds none even alone is lost, the others go
        on.  Ranks of a group run each step together, so one of them cannot: there the error ends the rank.
        Where a row has a grammar, the tokens of the step before are waited for while the device runs this one.
        Raises: PlanError if the plan contradicts the slots, or names a slab or a block that this rank lacks,
        torch.OutOfMemoryError in a group of ranks.
        """
        started_s = time.perf_counter()
        batch = build_batch(plan, self._slots, self._merge_size)
        if self._cpu_threads is not None:
            self._cpu_threads.set_for(batch.num_tokens)
        self._grammars.release(plan.release)
        for slot in plan.release:
            self._lost.pop(slot, None)
        with torch.inference_mode():
            self._copy_blocks(plan)
            self._admit(plan.admit)
            sampled = self._run_what_can(batch) if len(batch.slots) else ()
            failed = [(row, self._lost[slot]) for row, slot in enumerate(batch.slots.tolist()) if slot in self._lost]
            if failed:
                batch = part_of(batch, ~np.isin(batch.slots, list(self._lost)))
            done = None
            if self._device.type != "cpu":
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record()
        pending = PendingStep(
            plan.step, batch, sampled, tuple(FailedRow(row, reason) for row, reason in failed), done, started_s
        )
        self._unlearned.append(pending)
        return pending

    def is_done(self, pending: PendingStep) -> bool:
        return pending.done is None or bool(pending.done.query())  # type: ignore[no-untyped-call]

    def complete(self, pending: PendingStep) -> StepResult:
        """Wait for a step, the oldest of those launched, and learn its tokens."""
        pending.wait()
        if pending in self._unlearned:
            self._learn(pending)
        logprobs = [each for sampled in pending.sampled for each in sampled.known_logprobs()]
        if not any(logprobs):
            logprobs = []
        completed_s = time.perf_counter()
        # A step that was launched ahead began when the one before it ended.
        duration_s = completed_s - max(pending.started_s, self._completed_s)
        self._completed_s = completed_s
        token_ids = tuple(pending.known_token_ids().tolist())
        return StepResult(pending.step, token_ids, 1e3 * duration_s, pending.failed, tuple(logprobs))

    def _learn(self, last: PendingStep | None = None) -> None:
        """Take in the tokens of the steps that have been launched, up to this one or all of them; waits for them."""
        while self._unlearned:
            pending = self._unlearned.popleft()
            pending.wait()
            batch = pending.batch
            self._slots.learn(batch.sample_slots, batch.sample_admissions, pending.known_token_ids())
            if pending is last:
                return

    def _copy_blocks(self, plan: StepPlan) -> None:
        if not plan.saves and not plan.loads:
            return
        if self._host_tier is None:
            raise PlanError(f"step {plan.step} saves or loads blocks, and there is no host memory for them")
        self._host_tier.save(plan.saves)
        self._host_tier.load(plan.loads)

    def _admit(self, sequences: Sequence[NewSequence]) -> None:
        """Let the sampler take in new sequences; one that finds no memory for what it asks of it is lost."""
        for sequence in sequences:
            if sequence.sampling.grammar:
                self._grammars.admit(sequence.slot, sequence.sampling.grammar)
        slots = [sequence.slot for sequence in sequences]
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
                self._lose(slot, "out_of_memory")

    def _try(self, batch: HostBatch) -> Sampled | None:
        """What it samples, on its way to the host; None if there is no memory for this batch."""
        try:
            return self._run(batch).to_host()
        except torch.OutOfMemoryError:
            if self._tp_size > 1:
                raise
        # Here, not above: as long as the error lives, its traceback holds the tensors of the step that failed.
        torch.cuda.empty_cache()
        logger.warning("no memory for %d rows, %d tokens at once", len(batch.slots), batch.num_tokens)
        return None

    def _run_what_can(self, batch: HostBatch) -> tuple[Sampled, ...]:
        """What its rows sample: at once, else decode rows together and every other row alone.

        What a step that failed has written is written again, with the same values, and it has sampled nothing.
        """
        is_whole = not self._lost or self._lost.keys().isdisjoint(batch.slots.tolist())
        if is_whole and (sampled_by_all := self._try(batch)) is not None:
            return (sampled_by_all,)
        num_rows, num_decodes = len(batch.slots), batch.num_decodes
        lost = np.isin(batch.slots, list(self._lost))
        pieces = [np.array([row]) for row in range(num_rows - 1, num_decodes - 1, -1) if not lost[row]]
        pieces.append(np.flatnonzero(~lost[:num_decodes]))
        sampled = []
        while pieces:
            rows = pieces.pop()
            if not len(rows):
                continue
            found = self._try(part_of(batch, np.isin(np.arange(num_rows), rows)))
            if found is not None:
                sampled.append(found)
            elif len(rows) == 1:
                self._lose(int(batch.slots[rows[0]]), "out_of_memory")
            else:
                pieces += [rows[row : row + 1] for row in range(len(rows) - 1, -1, -1)]
        return tuple(sampled)

    def _lose(self, slot: int, reason: LossReason) -> None:
        logger.error("the request in slot %d is given up: %s", slot, reason)
        self._lost[slot] = reason

    def _run(self, batch: HostBatch) -> Sampled:
        """What it samples, on the device."""
        sampling = self._slots.sampling
        flags = sampling.flags(batch.sample_slots)
        recorded = None if self._graphs is None else self._graphs.find(batch)
        if self._graphs is not None and recorded is not None:
            for image_rows, image_positions in self._images(batch.merges):
                self._graphs.put_images(image_rows, to_device(recorded.places(image_positions, batch), self._device))
            logits = self._graphs.forward(recorded, batch)
            slots, output_positions = recorded.program.inputs.slots, recorded.program.inputs.output_positions
            places = recorded.places(batch.sample_sequences, batch)
        else:
            hidden = self._forward(batch)
            places = np.arange(len(batch.sample_slots))
            if not len(places):
                return Sampled(torch.zeros(0, dtype=torch.int64), places, places)
            positions, slots, output_positions = all_to_device(
                (batch.sample_positions, batch.sample_slots, batch.output_positions), self._device
            )
            logits = self._model.logits(hidden.index_select(0, positions))
        num_logprobs = sampling.num_logprobs[batch.sample_slots]
        if flags.any_grammar:
            self._put_masks(batch)
            going_on = ~np.isin(batch.sample_slots, list(self._lost))
            places, num_logprobs = places[going_on], num_logprobs[going_on]
        if self._graphs is not None and recorded is not None and flags.is_argmax:
            token_ids, is_counted = self._graphs.argmax(recorded), True
        else:
            token_ids, is_counted = self._sampler.choose(logits, slots, output_positions, flags), False
        logprobs = None
        if (num_logprobs >= 0).any():
            logprobs = self._sampler.logprobs(logits, token_ids, places[num_logprobs >= 0], flags.num_logprobs)
        if not is_counted:
            self._sampler.count(token_ids, slots, flags)
        return Sampled(token_ids, places, num_logprobs, logprobs)

    def _put_masks(self, batch: HostBatch) -> None:
        """The masks of rows with a grammar, while the device computes their logits; those without a next are lost."""
        rows = np.flatnonzero(self._slots.sampling.has_grammar[batch.sample_slots])
        slots, output_positions = batch.sample_slots[rows], batch.output_positions[rows]
        if (self._slots.num_known[slots] - self._slots.num_prompt_tokens[slots] < output_positions).any():
            self._learn()
        words = self._sampler.new_masks(len(rows))
        for slot in self._grammars.fill(slots, output_positions, words.numpy()):
            self._lose(slot, "grammar")
        self._sampler.put_masks(slots, words)

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
