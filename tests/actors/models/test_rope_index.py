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
from vlmrt.actors.models.qwen2_vl.video import time_offsets
from vlmrt.actors.models.rope_index import MediaSpan, mrope_positions, rope_delta

MERGE = 2
NUM_PROMPTS = 30
side = st.integers(1, 6).map(lambda cells: cells * MERGE)
clip = st.tuples(side, side, st.lists(st.integers(0, 9), min_size=1, max_size=4))  # the groups' time offsets
prompt = st.tuples(st.lists(st.tuples(st.integers(0, 12), clip), max_size=4), st.integers(0, 9))
Clip = tuple[int, int, list[int]]


def spans_of(media: list[tuple[int, Clip]], tail: int) -> tuple[list[MediaSpan], int]:
    """Spans and prompt length of texts of the given lengths, each followed by an image or clip, and a tail of text."""
    spans, length = [], 0
    for text, (height, width, offsets) in media:
        length += text
        for index, offset in enumerate(offsets):
            spans.append(MediaSpan(length, height * width // MERGE**2, (1, height, width), offset, index > 0))
            length += spans[-1].num_tokens
    return spans, length + tail


def all_positions(spans: list[MediaSpan], length: int, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return mrope_positions(start, stop, spans, length, rope_delta(length, spans, MERGE), MERGE)


def one_by_one(media: list[tuple[int, Clip]], tail: int, stop: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The definition, token by token."""
    columns: list[tuple[int, int, int]] = []
    position = 0
    for text, (height, width, offsets) in media:
        columns += [(position + ahead,) * 3 for ahead in range(text)]
        position += text
        rows, cols = height // MERGE, width // MERGE
        columns += [
            (position + t, position + r, position + c) for t in offsets for r in range(rows) for c in range(cols)
        ]
        position += max(rows, cols)
    columns += [(position + ahead,) * 3 for ahead in range(tail)]
    following = max((max(column) for column in columns), default=-1) + 1
    columns += [(following + ahead,) * 3 for ahead in range(stop - len(columns))]
    return np.array(columns, dtype=np.int64).reshape(-1, 3).T


@given(prompt, st.integers(0, 200), st.integers(0, 60))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_chunk_is_a_slice_of_the_whole(case: tuple[list[tuple[int, Clip]], int], start: int, size: int) -> None:
    spans, length = spans_of(*case)
    stop = max(start + size, length)
    whole = one_by_one(*case, stop)
    np.testing.assert_array_equal(all_positions(spans, length, 0, stop), whole)
    chunk = all_positions(spans, length, start, start + size)
    assert chunk.dtype == np.int64
    np.testing.assert_array_equal(chunk, whole[:, start : start + size])


@pytest.mark.parametrize("seed", range(NUM_PROMPTS))
def test_positions_and_delta_equal_the_reference(models: Models, seed: int) -> None:
    """For random prompts of text, images and clips; seconds per grid are whole, as the reference takes them."""
    rng = np.random.default_rng(seed)
    tokens_per_second = models.config.vision.tokens_per_second
    media: list[tuple[int, Clip]] = []
    kinds, seconds = [], []
    for _ in range(rng.integers(1, 6)):
        text = int(rng.integers(1, 12))
        height, width = (int(cells) * MERGE for cells in rng.integers(1, 9, 2))
        is_clip = bool(rng.random() < 0.6)
        kinds.append(2 if is_clip else 1)
        if is_clip:
            seconds.append(float(rng.integers(1, 4)))
            offsets = list(time_offsets(int(rng.integers(1, 9)), seconds[-1], tokens_per_second))
        media.append((text, (height, width, offsets if is_clip else [0])))
    tail = int(rng.integers(0, 7))
    spans, length = spans_of(media, tail)
    token_types, at = torch.zeros(1, length, dtype=torch.int32), 0
    grids: tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]] = ([], [])
    for kind, (text, (height, width, offsets)) in zip(kinds, media, strict=True):
        num_tokens = len(offsets) * height * width // MERGE**2
        token_types[0, at + text : at + text + num_tokens] = kind
        at += text + num_tokens
        grids[kind - 1].append((len(offsets), height, width))
    options = {} if tokens_per_second is None else {"second_per_grid_ts": torch.tensor(seconds)}
    expected, delta = models.reference.model.get_rope_index(
        torch.zeros(1, length, dtype=torch.int64),
        mm_token_type_ids=token_types,
        image_grid_thw=torch.tensor(grids[0]),
        video_grid_thw=torch.tensor(grids[1]),
        **options,
    )
    assert rope_delta(length, spans, MERGE) == delta.item()
    for chunk in (length, 17, 1):
        chunks = [all_positions(spans, length, start, min(start + chunk, length)) for start in range(0, length, chunk)]
        np.testing.assert_array_equal(np.concatenate(chunks, axis=1), expected[:, 0].numpy())


def test_what_the_edge_and_the_scheduler_import_needs_no_torch() -> None:
    modules = (
        "config",
        "registry",
        "rope_index",
        "checkpoint_files",
        "qwen2_vl.processing",
        "qwen2_5_vl.processing",
        "qwen2_vl.video",
        "qwen2_5_vl.video",
    )
    imports = "".join(f"import vlmrt.actors.models.{module}\n" for module in modules)
    heavy = "('torch', 'transformers', 'PIL', 'safetensors')"
    script = f"import sys\n{imports}assert not set({heavy}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
