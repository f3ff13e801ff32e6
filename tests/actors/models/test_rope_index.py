"""M-RoPE positions against transformers, whole and in chunks."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.actors.models.conftest import Models
from vlmrt.actors.models.rope_index import MediaSpan, mrope_positions, rope_delta

MERGE = 2
side = st.integers(1, 6).map(lambda cells: cells * MERGE)
grid = st.tuples(st.just(1), side, side)
prompt = st.tuples(st.lists(st.tuples(st.integers(1, 12), grid), max_size=4), st.integers(0, 9))


def spans_of(media: list[tuple[int, tuple[int, int, int]]], tail: int) -> tuple[list[MediaSpan], int]:
    """Spans and prompt length of texts of the given lengths, each followed by an image, and a tail of text."""
    spans, length = [], 0
    for text, grid_thw in media:
        spans.append(MediaSpan(length + text, grid_thw[0] * grid_thw[1] * grid_thw[2] // MERGE**2, grid_thw))
        length = spans[-1].start + spans[-1].num_tokens
    return spans, length + tail


def all_positions(spans: list[MediaSpan], length: int, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return mrope_positions(start, stop, spans, length, rope_delta(length, spans, MERGE), MERGE)


def one_by_one(spans: list[MediaSpan], length: int, stop: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The definition, token by token."""
    columns, position, index = [], 0, 0
    for span in [*spans, None]:
        end = length if span is None else span.start
        while index < end:
            columns.append((position,) * 3)
            position, index = position + 1, index + 1
        if span is not None:
            frames, rows, cols = span.grid_thw[0], span.grid_thw[1] // MERGE, span.grid_thw[2] // MERGE
            columns += [
                (position + t * span.time_interval, position + r, position + c)
                for t in range(frames)
                for r in range(rows)
                for c in range(cols)
            ]
            position, index = position + max(rows, cols), index + span.num_tokens
    following = max((max(column) for column in columns), default=-1) + 1
    columns += [(following + ahead,) * 3 for ahead in range(stop - length)]
    return np.array(columns, dtype=np.int64).reshape(-1, 3).T


@given(prompt, st.integers(0, 200), st.integers(0, 60))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_chunk_is_a_slice_of_the_whole(
    case: tuple[list[tuple[int, tuple[int, int, int]]], int], start: int, size: int
) -> None:
    spans, length = spans_of(*case)
    stop = max(start + size, length)
    whole = one_by_one(spans, length, stop)
    np.testing.assert_array_equal(all_positions(spans, length, 0, stop), whole)
    chunk = all_positions(spans, length, start, start + size)
    assert chunk.dtype == np.int64
    np.testing.assert_array_equal(chunk, whole[:, start : start + size])


@pytest.mark.parametrize("kind", [1, 2])
def test_positions_and_delta_equal_the_reference(models: Models, kind: int) -> None:
    """kind: 1 for images, 2 for videos, as the reference numbers token types."""
    media = [(3, (1, 8, 6)), (1, (1, 4, 12)), (7, (1, 2, 2)), (2, (1, 20, 4))]
    if kind == 2:
        media = [(text, (frames, grid[1], grid[2])) for (text, grid), frames in zip(media, (3, 1, 5, 2), strict=True)]
    for tail in (0, 5):
        spans, length = spans_of(media, tail)
        if kind == 2 and models.config.vision.tokens_per_second is not None:
            interval = int(models.config.vision.tokens_per_second)
            spans = [MediaSpan(span.start, span.num_tokens, span.grid_thw, interval) for span in spans]
        token_types = torch.zeros(1, length, dtype=torch.int32)
        for span in spans:
            token_types[0, span.start : span.start + span.num_tokens] = kind
        name = "image_grid_thw" if kind == 1 else "video_grid_thw"
        expected, delta = models.reference.model.get_rope_index(
            torch.zeros(1, length, dtype=torch.int64),
            mm_token_type_ids=token_types,
            **{name: torch.tensor([span.grid_thw for span in spans])},
        )
        assert rope_delta(length, spans, MERGE) == delta.item()
        for chunk in (length, 17, 1):
            chunks = [
                all_positions(spans, length, start, min(start + chunk, length)) for start in range(0, length, chunk)
            ]
            np.testing.assert_array_equal(np.concatenate(chunks, axis=1), expected[:, 0].numpy())


def test_what_the_edge_and_the_scheduler_import_needs_no_torch() -> None:
    modules = ("config", "registry", "rope_index", "checkpoint_files", "qwen2_vl.processing", "qwen2_5_vl.processing")
    imports = "".join(f"import vlmrt.actors.models.{module}\n" for module in modules)
    heavy = "('torch', 'transformers', 'PIL', 'safetensors')"
    script = f"import sys\n{imports}assert not set({heavy}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
