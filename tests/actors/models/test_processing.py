"""Sizes and token counts against transformers."""

from __future__ import annotations

import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference_smart_resize

from vlmrt.actors.models.qwen2_5_vl.processing import smart_resize as qwen2_5_smart_resize
from vlmrt.actors.models.qwen2_vl.processing import num_image_tokens, smart_resize


def test_sizes_equal_the_reference_for_many_shapes_and_bounds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(3000):
        height, width = (int(value) for value in np.exp(rng.uniform(0, 8.5, 2)))
        if max(height, width) > 200 * min(height, width):
            continue
        factor = int(rng.choice([28, 32]))
        low, high = sorted(int(value) for value in np.exp(rng.uniform(7, 16, 2)))
        expected = reference_smart_resize(height, width, factor, low, high)
        assert smart_resize(height, width, factor, low, high) == expected


@pytest.mark.parametrize(
    ("height", "width", "message"), [(1, 201, "aspect ratio 201"), (0, 5, "at least 1"), (9, -1, "at least 1")]
)
def test_sizes_that_cannot_be_resized_are_refused(height: int, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smart_resize(height, width, 28, 3136, 10**6)


def test_both_families_count_tokens_alike() -> None:
    assert qwen2_5_smart_resize is smart_resize
    assert num_image_tokens((1, 8, 10), 2) == 20
    assert num_image_tokens((3, 8, 10), 2) == 60
