"""A language model driven as an LLM rank drives it: paged cache, prefill in chunks, batched decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmrt.actors.models.qwen2_vl.language import LanguageModel
from vlmrt.actors.models.rope_index import MediaSpan, mrope_positions, rope_delta
from vlmrt.kernels.embed_merge import embed_merge
from vlmrt.kernels.paged_attention import PagedBatch

MERGE_SIZE = 2


@dataclass
class Request:
    """One request: its tokens so far, its media and its blocks."""

    token_ids: list[int]
    spans: list[MediaSpan] = field(default_factory=list)
    rows: Tensor | None = None  # of all media, one after the other
    num_prompt_tokens: int = 0
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    def positions(self, start: int, stop: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        delta = rope_delta(self.num_prompt_tokens, self.spans, MERGE_SIZE)
        return mrope_positions(start, stop, self.spans, self.num_prompt_tokens, delta, MERGE_SIZE)


class PagedRunner:
    """Steps of a language model over a cache whose blocks are handed out in a scattered order."""

    def __init__(self, model: LanguageModel, num_blocks: int = 64, block_size: int = 16, tp_size: int = 1) -> None:
        self.model = model
        self.block_size = block_size
        config = model.config
        shape = (num_blocks, block_size, config.num_kv_heads // tp_size, config.head_dim)
        dtype, self.device = model.norm.weight.dtype, model.norm.weight.device
        # unwritten slots hold NaN: reading one shows
        self.kv = [
            (
                torch.full(shape, float("nan"), dtype=dtype, device=self.device),
                torch.full(shape, float("nan"), dtype=dtype, device=self.device),
            )
            for _ in range(config.num_layers)
        ]
        self.free = list(np.random.default_rng(0).permutation(num_blocks))

    @torch.inference_mode()
    def step(self, work: Sequence[tuple[Request, int]]) -> Tensor:
        """Run the next tokens of each sequence (decodes first); logits after the last token of each."""
        token_ids: list[int] = []
        slots: list[int] = []
        positions = []
        for sequence, count in work:
            start, stop = sequence.num_computed, sequence.num_computed + count
            while len(sequence.blocks) * self.block_size < stop:
                sequence.blocks.append(int(self.free.pop()))
            token_ids += sequence.token_ids[start:stop]
            slots += [
                sequence.blocks[index // self.block_size] * self.block_size + index % self.block_size
                for index in range(start, stop)
            ]
            positions.append(sequence.positions(start, stop))
            sequence.num_computed = stop
        query_lens = tuple(count for _, count in work)
        context_lens = tuple(sequence.num_computed for sequence, _ in work)
        width = max(len(sequence.blocks) for sequence, _ in work)
        batch = PagedBatch(
            cu_seqlens=self._tensor([0, *np.cumsum(query_lens).tolist()], torch.int32),
            context_lens=self._tensor(context_lens, torch.int32),
            block_tables=self._tensor([s.blocks + [0] * (width - len(s.blocks)) for s, _ in work], torch.int32),
            slot_mapping=self._tensor(slots, torch.int64),
            num_decodes=sum(1 for sequence, _ in work if sequence.num_computed > sequence.num_prompt_tokens),
            query_lens=query_lens,
            context_lens_host=context_lens,
        )
        hidden = self.model.embed(self._tensor(token_ids, torch.int64))
        self._merge(hidden, work)
        cos, sin = self.model.rotary(torch.from_numpy(np.concatenate(positions, axis=1)).to(self.device))
        hidden = self.model(hidden, cos, sin, self.kv, batch)
        return self.model.logits(hidden[batch.cu_seqlens[1:].long() - 1])

    def _tensor(self, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def _merge(self, hidden: Tensor, work: Sequence[tuple[Request, int]]) -> None:
        offset = 0
        for sequence, count in work:
            start = sequence.num_computed - count
            first_row = 0
            for span in sequence.spans:
                low, high = max(span.start, start), min(span.start + span.num_tokens, start + count)
                if low < high and sequence.rows is not None:
                    rows = sequence.rows[first_row + low - span.start : first_row + high - span.start]
                    positions = torch.arange(low, high, device=self.device) - start + offset
                    embed_merge(hidden, rows, positions)
                first_row += span.num_tokens
            offset += count

    def prefill(self, sequence: Request, chunk: int) -> Tensor:
        """All of the prompt in chunks; logits after its last token [1, V]."""
        while True:
            count = min(chunk, sequence.num_prompt_tokens - sequence.num_computed)
            logits = self.step([(sequence, count)])
            if sequence.num_computed == sequence.num_prompt_tokens:
                return logits
