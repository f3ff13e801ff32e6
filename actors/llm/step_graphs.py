"""CUDA graphs of steps: one launch instead of hundreds, at a few shapes.

A step is decode rows, whose tokens the device knows, and then the tokens of a few prefill chunks.  Every graph has a
fixed number of each; a step runs in the smallest that holds it, the rest being padding that writes and sees nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmrt.actors.llm.batch import HostBatch, Ints
from vlmrt.actors.llm.kv_cache import KvCache
from vlmrt.actors.llm.sampler import Sampler
from vlmrt.actors.llm.slots import SamplingFlags
from vlmrt.actors.models.qwen2_vl.language import LanguageModel
from vlmrt.kernels.decode_inputs import decode_inputs
from vlmrt.kernels.paged_attention import PagedBatch

MAX_DECODES = 256
# Close together where a step is short, 16 apart where reading the weights is most of it.
DECODES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, *range(64, MAX_DECODES + 1, 16))
DECODES_BESIDE_PREFILL = (16, 64, MAX_DECODES)
CHUNK_TOKENS = (16, 64, 128, 256, 512, 1024)  # more keep the device busy for longer than their launches take
MAX_CHUNKS = 8
GREEDY = SamplingFlags(True, False, False, False, False)
HIGHEST_PRIORITY = -1


class StepShape(NamedTuple):
    """How large a recorded step is."""

    num_decodes: int
    num_tokens: int = 0  # of all prefill chunks together
    num_chunks: int = 0

    @property
    def num_sequences(self) -> int:
        return self.num_decodes + self.num_chunks

    @property
    def num_all_tokens(self) -> int:
        return self.num_decodes + self.num_tokens


def step_shapes(max_num_seqs: int, max_num_batched_tokens: int) -> tuple[StepShape, ...]:
    """The shapes to record, smallest first within decode steps and then within the others."""
    most = min(max_num_seqs, MAX_DECODES)
    decodes = [StepShape(size) for size in (*[size for size in DECODES if size < most], most)]
    beside = sorted({min(size, most) for size in DECODES_BESIDE_PREFILL})
    chunks = [size for size in CHUNK_TOKENS if size <= max_num_batched_tokens]
    return (*decodes, *[StepShape(size, tokens, MAX_CHUNKS) for tokens in chunks for size in beside])


def places(shape: StepShape, indices: Ints, batch: HostBatch) -> Ints:
    """Where tokens, or sequences, of a batch lie among the padded ones: what follows the decode rows is moved."""
    return np.where(indices < batch.num_decodes, indices, indices + shape.num_decodes - batch.num_decodes)


class Inputs:
    """What changes from step to step, as views of one int64 buffer that is filled by one copy."""

    def __init__(self, shape: StepShape, num_columns: int, padding_slot: int, buffer: Tensor | None = None) -> None:
        """num_columns: block table entries of a sequence. buffer: where they lie; None: on the host, made here."""
        tokens, chunks, sequences = shape.num_all_tokens, shape.num_chunks, shape.num_sequences
        shapes = {
            "slots": (sequences,),  # of sequences that sample
            "output_positions": (sequences,),
            "cu_seqlens": (sequences + 1,),
            "context_lens": (sequences,),
            "token_ids": (tokens,),  # of the chunks; decode rows' are on the device
            "positions": (3, tokens),
            "slot_mapping": (tokens,),
            "is_image": (tokens,),
            "chunk_slots": (chunks,),
            "block_tables": (chunks, num_columns),  # of the chunks; decode rows' are on the device
        }
        sizes = [math.prod(each) for each in shapes.values()]
        self.buffer = torch.empty(sum(sizes), dtype=torch.int64) if buffer is None else buffer
        parts = torch.split(self.buffer, sizes)
        views = {name: part.view(each) for (name, each), part in zip(shapes.items(), parts, strict=True)}
        self.slots = views["slots"]
        self.output_positions = views["output_positions"]
        self.cu_seqlens = views["cu_seqlens"]
        self.context_lens = views["context_lens"]
        self.token_ids = views["token_ids"]
        self.positions = views["positions"]
        self.slot_mapping = views["slot_mapping"]
        self.is_image = views["is_image"]
        self.chunk_slots = views["chunk_slots"]
        self.block_tables = views["block_tables"]
        self._shape = shape
        self._padding_slot = padding_slot

    def on(self, device: torch.device) -> Inputs:
        """The same values on a device."""
        columns = self.block_tables.shape[1]
        return Inputs(self._shape, columns, self._padding_slot, self.buffer.to(device))

    def clear(self) -> None:
        """Padding only: slots that are nobody's, sequences without tokens, tokens that are not written."""
        self.buffer.zero_()
        self.slots.fill_(self._padding_slot)
        self.chunk_slots.fill_(self._padding_slot)
        self.slot_mapping.fill_(-1)
        self.cu_seqlens.copy_(torch.arange(self._shape.num_sequences + 1).clamp(max=self._shape.num_decodes))

    def fill(self, batch: HostBatch) -> None:
        """A batch's values among padding, on the host: decode rows from the start, chunks behind the padded ones."""
        self.clear()
        shape, num_decodes = self._shape, batch.num_decodes
        num_chunks, num_tokens = len(batch.query_lens) - num_decodes, batch.num_tokens - num_decodes
        for into, values in (
            (self.positions.T, batch.positions.T),
            (self.slot_mapping, batch.slot_mapping),
            (self.token_ids, batch.token_ids),
        ):
            array = into.numpy()
            array[:num_decodes] = values[:num_decodes]
            array[shape.num_decodes : shape.num_decodes + num_tokens] = values[num_decodes:]
        for part in batch.merges:
            first = part.first_position - num_decodes + shape.num_decodes
            self.is_image.numpy()[first : first + part.source.num_rows] = 1
        lens = self.context_lens.numpy()
        lens[:num_decodes] = batch.context_lens[:num_decodes]
        lens[shape.num_decodes : shape.num_decodes + num_chunks] = batch.context_lens[num_decodes:]
        ends = self.cu_seqlens.numpy()[shape.num_decodes + 1 :]
        ends[:num_chunks] = batch.cu_seqlens[num_decodes + 1 :] - num_decodes + shape.num_decodes
        ends[num_chunks:] = shape.num_decodes + num_tokens
        rows = places(shape, batch.sample_sequences, batch)
        self.slots.numpy()[rows] = batch.sample_slots
        self.output_positions.numpy()[rows] = batch.output_positions
        if num_chunks:
            self.chunk_slots.numpy()[:num_chunks] = batch.slots[num_decodes:]
            self.block_tables.numpy()[:num_chunks, : batch.block_tables.shape[1]] = batch.block_tables[num_decodes:]


class StepProgram:
    """A step of one shape over buffers that stay where they are: what a graph records."""

    def __init__(
        self,
        model: LanguageModel,
        kv: KvCache,
        last_tokens: Tensor,
        tables: Tensor,
        image_rows: Tensor,
        shape: StepShape,
    ) -> None:
        """image_rows: [most prefill tokens of any shape, H], read where inputs.is_image says so."""
        self._model = model
        self._kv = kv
        self._last_tokens = last_tokens
        self._tables = tables
        self._image_rows = image_rows[: shape.num_all_tokens]
        self.shape = shape
        host = Inputs(shape, tables.shape[1], len(last_tokens) - 1)
        host.clear()
        self.inputs = host.on(tables.device)

    def __call__(self) -> Tensor:
        """Logits of the last token of every sequence, [num_sequences, vocab_size]."""
        inputs, shape = self.inputs, self.shape
        num_decodes = shape.num_decodes
        token_ids, context_lens, block_tables = decode_inputs(
            inputs.slots[:num_decodes],
            inputs.context_lens[:num_decodes],
            inputs.slot_mapping[:num_decodes],
            self._last_tokens,
            self._tables,
            self._kv[0][0].shape[1],
        )
        if shape.num_tokens:
            token_ids = torch.cat((token_ids, inputs.token_ids[num_decodes:]))
            context_lens = inputs.context_lens.to(torch.int32)
            chunk_tables = inputs.block_tables.to(torch.int32)
            self._tables.index_copy_(0, inputs.chunk_slots, chunk_tables)
            block_tables = torch.cat((block_tables, chunk_tables))
        hidden = self._model.embed(token_ids)
        if shape.num_tokens:
            hidden = torch.where(inputs.is_image[:, None] > 0, self._image_rows, hidden)
        batch = PagedBatch(
            cu_seqlens=inputs.cu_seqlens.to(torch.int32),
            context_lens=context_lens,
            block_tables=block_tables,
            slot_mapping=inputs.slot_mapping,
            num_decodes=num_decodes,
            query_lens=(1,) * shape.num_sequences,
            context_lens_host=(),
        )
        cos, sin = self._model.rotary(inputs.positions)
        hidden = self._model.forward(hidden, cos, sin, self._kv, batch)
        if shape.num_tokens:
            hidden = hidden.index_select(0, (inputs.cu_seqlens[1:] - 1).clamp(min=0))
        return self._model.logits(hidden)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A captured program and its greedy sampling, each a graph of its own, and where their results appear."""

    program: StepProgram
    forward: torch.cuda.CUDAGraph
    logits: Tensor
    greedy: torch.cuda.CUDAGraph
    token_ids: Tensor  # int64 [num_sequences]

    def places(self, indices: Ints, batch: HostBatch) -> Ints:
        """Where tokens, or sequences, of a batch lie among this step's."""
        return places(self.program.shape, indices, batch)


class StepGraphs:
    """Steps of the recorded shapes."""

    def __init__(
        self,
        model: LanguageModel,
        kv: KvCache,
        sampler: Sampler,
        num_columns: int,
        shapes: Sequence[StepShape],
    ) -> None:
        """num_columns: blocks of a slot."""
        last_tokens = sampler.last_tokens
        device, dtype = last_tokens.device, kv[0][0].dtype
        self._sampler = sampler
        self._tables = torch.zeros(len(last_tokens), num_columns, dtype=torch.int32, device=device)
        most_tokens = max(shape.num_all_tokens for shape in shapes)
        self._image_rows = torch.zeros(most_tokens, model.config.hidden_size, dtype=dtype, device=device)
        pool = torch.cuda.graph_pool_handle()
        # Kernels keep the priority of the stream that they are captured on: beside a vision tower's they go first.
        stream = torch.cuda.Stream(device, priority=HIGHEST_PRIORITY)  # type: ignore[no-untyped-call]
        recorded = {}
        # Largest first: the smaller ones find room in the memory that it has left.
        for shape in sorted(shapes, key=lambda shape: (shape.num_all_tokens, shape.num_sequences), reverse=True):
            program = StepProgram(model, kv, last_tokens, self._tables, self._image_rows, shape)
            recorded[shape] = self._record(program, pool, stream)
        self._recorded = [recorded[shape] for shape in shapes]

    def find(self, batch: HostBatch) -> Recorded | None:
        """The smallest recorded step that holds a batch; None if there is none."""
        num_chunks, num_tokens = len(batch.query_lens) - batch.num_decodes, batch.num_tokens - batch.num_decodes
        if (batch.unknown_positions >= batch.num_decodes).any():
            return None
        for recorded in self._recorded:
            shape = recorded.program.shape
            if (
                shape.num_decodes >= batch.num_decodes
                and shape.num_chunks >= num_chunks
                and shape.num_tokens >= num_tokens
            ):
                return recorded
        return None

    def put_blocks(self, slots: Tensor, block_tables: Tensor) -> None:
        """The blocks of slots whose step runs without a graph: int64 [S], int32 [S, up to num_columns]."""
        self._tables[:, : block_tables.shape[1]].index_copy_(0, slots, block_tables)

    def put_images(self, rows: Tensor, positions: Tensor) -> None:
        """Image rows of the next step: [R, H] at int64 [R] places among its padded tokens."""
        self._image_rows.index_copy_(0, positions, rows.to(self._image_rows.dtype))

    def run(self, recorded: Recorded, batch: HostBatch, flags: SamplingFlags) -> Tensor:
        """Run a batch, whose image rows have been put: int64 [num_sequences] tokens, valid until the next run."""
        inputs = recorded.program.inputs
        buffer = torch.empty(inputs.buffer.shape, dtype=torch.int64, pin_memory=True)
        columns = inputs.block_tables.shape[1]
        Inputs(recorded.program.shape, columns, len(self._tables) - 1, buffer).fill(batch)
        inputs.buffer.copy_(buffer, non_blocking=True)
        recorded.forward.replay()
        if not flags.all_greedy:
            return self._sampler.sample(recorded.logits, inputs.slots, inputs.output_positions, flags)
        recorded.greedy.replay()
        return recorded.token_ids

    def _record(self, program: StepProgram, pool: Any, stream: torch.cuda.Stream) -> Recorded:
        """Runs once outside the graphs first: kernels are compiled and libraries ready before anything is captured."""

        def sample(logits: Tensor) -> Tensor:
            return self._sampler.sample(logits, program.inputs.slots, program.inputs.output_positions, GREEDY)

        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            sample(program())
            forward, logits = _captured(program, pool)
            greedy, token_ids = _captured(lambda: sample(logits), pool)
        torch.cuda.current_stream().wait_stream(stream)
        return Recorded(program, forward, logits, greedy, token_ids)


def _captured(run: Callable[[], Tensor], pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of what run launches on the current stream, and where its result appears.

    torch.cuda.graph would collect garbage and give memory back before each capture: a tenth of a second each time.
    """
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    result = run()
    graph.capture_end()
    return graph, result
