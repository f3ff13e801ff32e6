"""Where and in which dtypes a Triton kernel is tried: on a GPU, or under the interpreter where there is none."""

from __future__ import annotations

import pytest
import torch

ON_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")

# bfloat16 is for the GPU alone: the interpreter's arithmetic is numpy's, which has none
PLACES = (
    *(pytest.param("cpu", dtype, marks=INTERPRETED) for dtype in (torch.float32, torch.float16)),
    *(pytest.param("cuda", dtype, marks=ON_GPU) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
)
