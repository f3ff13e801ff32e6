"""CUDA graphs of decode steps: one launch instead of hundreds, at a few batch sizes."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmrt.actors.llm.batch import HostBatch
from vlmrt.actors.llm.kv_cache import KvCache
from vlmrt.actors.models.qwen2_vl.language import LanguageModel
from vlmrt.kernels.decode_inputs import decode_inputs
from vlmrt.kernels.paged_attention import PagedBatch

MAX_ROWS = 256
NUM_FIELDS = 6  # of a row: slot, three positions, context length, slot mapping


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes that are recorded: close together where a step is short, 16 apart where weights are most of it."""
    largest = min(max_num_seqs, MAX_ROWS)
    sizes = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, *range(64, MAX_ROWS + 1, 16))
    return (*[size for size in sizes if size < largest], largest)


class DecodeProgram:
    """A decode step of a fixed number of rows over buffers that stay where they are: what a graph records."""

    def __init__(self, model: LanguageModel, kv: KvCache, last_tokens: Tensor, tables: Tensor, size: int) -> None:
        self._model = model
        self._kv = kv
        self._last_tokens = last_tokens
        self._tables = tables
        self._size = size
        self._block_size = kv[0][0].shape[1]
        self._cu_seqlens = torch.arange(size + 1, dtype=torch.int32, device=tables.device)
        self.rows = torch.from_numpy(self._padding()).to(tables.device)  # see padded

    def _padding(self) -> NDArray[np.int64]:
        """Rows that write nothing, see nothing and have the last slot, which is nobody's."""
        rows = np.zeros((NUM_FIELDS, self._size), np.int64)
        rows[0] = len(self._last_tokens) - 1
        rows[5] = -1
        return rows

    def padded(self, batch: HostBatch) -> NDArray[np.int64]:
        """A batch's rows on the host: [NUM_FIELDS, size]."""
        rows = self._padding()
        num_rows = batch.num_tokens
        rows[0, :num_rows] = batch.sample_slots
        rows[1:4, :num_rows] = batch.positions
        rows[4, :num_rows] = batch.context_lens
        rows[5, :num_rows] = batch.slot_mapping
        return rows

    def __call__(self) -> Tensor:
        """Logits of self.rows, float32 [size, vocab_size]; their keys and values are written."""
        slots, positions, context_lens, slot_mapping = self.rows[0], self.rows[1:4], self.rows[4], self.rows[5]
        token_ids, lens, block_tables = decode_inputs(
            slots, context_lens, slot_mapping, self._last_tokens, self._tables, self._block_size
        )
        batch = PagedBatch(
            cu_seqlens=self._cu_seqlens,
            context_lens=lens,
            block_tables=block_tables,
            slot_mapping=slot_mapping,
            num_decodes=self._size,
            query_lens=(1,) * self._size,
            context_lens_host=(),
        )
        hidden = self._model.embed(token_ids)
        cos, sin = self._model.rotary(positions)
        return self._model.logits(self._model.forward(hidden, cos, sin, self._kv, batch))


@dataclass(frozen=True, slots=True)
class Recorded:
    """A captured program and where its logits appear."""

    program: DecodeProgram
    graph: torch.cuda.CUDAGraph
    logits: Tensor


class DecodeGraphs:
    """Decode steps of up to the largest recorded size, each run as the smallest recorded one that holds it."""

    def __init__(
        self, model: LanguageModel, kv: KvCache, last_tokens: Tensor, num_columns: int, sizes: tuple[int, ...]
    ) -> None:
        """last_tokens: int64 [num_slots + 1], one more than there are for padding. num_columns: blocks of a slot."""
        self._sizes = sizes
        self._tables = torch.zeros(len(last_tokens), num_columns, dtype=torch.int32, device=last_tokens.device)
        pool = torch.cuda.graph_pool_handle()
        # Largest first: the smaller ones find room in the memory that it has left.
        recorded = {
            size: self._record(DecodeProgram(model, kv, last_tokens, self._tables, size), pool)
            for size in reversed(sizes)
        }
        self._recorded = [recorded[size] for size in sizes]

    def holds(self, batch: HostBatch) -> bool:
        """Whether a batch is decode rows only, and few enough."""
        return 0 < batch.num_tokens == len(batch.sample_slots) <= self._sizes[-1] and not batch.merges

    def put_blocks(self, slots: Tensor, block_tables: Tensor) -> None:
        """Blocks of slots that did not come to them through run: int64 [S], int32 [S, up to num_columns]."""
        self._tables[:, : block_tables.shape[1]].index_copy_(0, slots, block_tables)

    def run(self, batch: HostBatch) -> Tensor:
        """Logits of a batch that holds() says yes to: float32 [R, vocab_size], until the next run."""
        recorded = self._recorded[bisect_left(self._sizes, batch.num_tokens)]
        rows = torch.from_numpy(recorded.program.padded(batch)).pin_memory()
        recorded.program.rows.copy_(rows, non_blocking=True)
        recorded.graph.replay()
        return recorded.logits[: batch.num_tokens]

    def _record(self, program: DecodeProgram, pool: Any) -> Recorded:
        """Runs once outside the graph first: kernels are compiled and libraries ready before anything is captured."""
        program()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            logits = program()
        return Recorded(program, graph, logits)
