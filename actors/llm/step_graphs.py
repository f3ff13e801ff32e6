"""CUDA graphs of steps: one launch instead of hundreds, at a few shapes.

A step is decode rows, whose tokens the device knows, and then the tokens of a few prefill chunks.  Every graph has a
fixed number of each; a step runs in the smallest that holds it, the rest being padding that writes and sees nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

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

Array = TypeVar("Array", Tensor, Ints)

MAX_DECODES = 256
# Close together where a step is short, 16 apart where reading the weights is most of it. None of 8: cuBLAS takes less
# for 12 rows (a step of 2B on an H100: 1.97 ms with 8, 1.88 with 12).
DECODES = (1, 2, 4, 12, 16, 24, 32, 40, 48, 56, *range(64, MAX_DECODES + 1, 16))
DECODES_BESIDE_PREFILL = (16, 64, MAX_DECODES)
# Launched one by one, a step of 2B takes a host 25 ms, up to 70 beside other work: as long as an H100 needs for 4,000
# tokens.  Padding costs as much as tokens do, so that sizes are never far apart.
CHUNK_TOKENS = (16, 64, 128, 256, 512, *range(768, 4097, 256))
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


def input_shapes(shape: StepShape, num_columns: int) -> dict[str, tuple[int, ...]]:
    """What changes from step to step, all of it int64; num_columns: block table entries of a sequence."""
    tokens, chunks, sequences = shape.num_all_tokens, shape.num_chunks, shape.num_sequences
    return {
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


def views(buffer: Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """The parts of one flat buffer, in order."""
    parts, start = {}, 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        parts[name] = buffer[start:stop].reshape(shape)
        start = stop
    return parts


class DeviceInputs:
    """Where a recorded step reads its inputs."""

    def __init__(self, buffer: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.buffer = buffer
        parts = views(buffer, shapes)
        self.slots = parts["slots"]
        self.output_positions = parts["output_positions"]
        self.cu_seqlens = parts["cu_seqlens"]
        self.context_lens = parts["context_lens"]
        self.token_ids = parts["token_ids"]
        self.positions = parts["positions"]
        self.slot_mapping = parts["slot_mapping"]
        self.is_image = parts["is_image"]
        self.chunk_slots = parts["chunk_slots"]
        self.block_tables = parts["block_tables"]


class HostInputs:
    """The same on the host, filled for one step and copied over in one piece."""

    def __init__(self, shape: StepShape, num_columns: int, padding_slot: int, is_pinned: bool) -> None:
        shapes = input_shapes(shape, num_columns)
        size = sum(math.prod(each) for each in shapes.values())
        self.buffer = torch.zeros(size, dtype=torch.int64, pin_memory=is_pinned)
        self.copied: torch.cuda.Event | None = None  # happens once the buffer may be filled again
        self._shape = shape
        self._flat: Ints = self.buffer.numpy()
        self.fields = views(self._flat, shapes)
        # Slots that are nobody's, sequences without tokens, tokens that are not written.
        self.fields["slots"][:] = self.fields["chunk_slots"][:] = padding_slot
        self.fields["slot_mapping"][:] = -1
        self.fields["cu_seqlens"][:] = np.minimum(np.arange(shape.num_sequences + 1), shape.num_decodes)
        self._padding = self._flat.copy()

    def fill(self, batch: HostBatch) -> None:
        """A batch's values among padding: decode rows from the start, chunks behind the padded ones."""
        np.copyto(self._flat, self._padding)
        fields, num_decodes = self.fields, batch.num_decodes
        fields["positions"][:, :num_decodes] = batch.positions[:, :num_decodes]
        fields["slot_mapping"][:num_decodes] = batch.slot_mapping[:num_decodes]
        fields["context_lens"][:num_decodes] = batch.context_lens[:num_decodes]
        if num_decodes == len(batch.query_lens):
            fields["slots"][:num_decodes] = batch.sample_slots
            fields["output_positions"][:num_decodes] = batch.output_positions
        else:
            self._fill_chunks(batch)

    def _fill_chunks(self, batch: HostBatch) -> None:
        fields, shape, num_decodes = self.fields, self._shape, batch.num_decodes
        num_chunks, first = len(batch.query_lens) - num_decodes, shape.num_decodes
        last = first + batch.num_tokens - num_decodes
        fields["positions"][:, first:last] = batch.positions[:, num_decodes:]
        fields["slot_mapping"][first:last] = batch.slot_mapping[num_decodes:]
        fields["token_ids"][first:last] = batch.token_ids[num_decodes:]
        for part in batch.merges:
            at = part.first_position - num_decodes + first
            fields["is_image"][at : at + part.source.num_rows] = 1
        fields["context_lens"][first : first + num_chunks] = batch.context_lens[num_decodes:]
        ends = fields["cu_seqlens"][first + 1 :]
        ends[:num_chunks] = batch.cu_seqlens[num_decodes + 1 :] - num_decodes + first
        ends[num_chunks:] = last
        rows = places(shape, batch.sample_sequences, batch)
        fields["slots"][rows] = batch.sample_slots
        fields["output_positions"][rows] = batch.output_positions
        fields["chunk_slots"][:num_chunks] = batch.slots[num_decodes:]
        fields["block_tables"][:num_chunks, : batch.block_tables.shape[1]] = batch.block_tables[num_decodes:]


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
        is_cuda, columns = tables.device.type == "cuda", tables.shape[1]
        # In turn: while one is being copied for the step that runs, the other is filled for the step that follows.
        self.hosts = tuple(HostInputs(shape, columns, len(last_tokens) - 1, is_cuda) for _ in range(2))
        self.inputs = DeviceInputs(self.hosts[0].buffer.to(tables.device), input_shapes(shape, columns))

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


@dataclass(slots=True)
class Recorded:
    """A captured program and its greedy sampling, each a graph of its own, and where their results appear."""

    program: StepProgram
    forward: torch.cuda.CUDAGraph
    logits: Tensor
    greedy: torch.cuda.CUDAGraph
    token_ids: Tensor  # int64 [num_sequences]
    num_runs: int = 0

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

    def forward(self, recorded: Recorded, batch: HostBatch) -> Tensor:
        """Run a batch, whose image rows have been put: logits [num_sequences, vocab_size], valid until the next run."""
        inputs = recorded.program.inputs
        host = recorded.program.hosts[recorded.num_runs % 2]
        recorded.num_runs += 1
        if host.copied is not None:
            host.copied.synchronize()  # over long ago, unless a step runs in pieces
        host.fill(batch)
        inputs.buffer.copy_(host.buffer, non_blocking=True)
        host.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        host.copied.record()
        recorded.forward.replay()
        return recorded.logits

    def argmax(self, recorded: Recorded) -> Tensor:
        """What the sampler does where flags.is_argmax: int64 [num_sequences] tokens, valid until the next run."""
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
