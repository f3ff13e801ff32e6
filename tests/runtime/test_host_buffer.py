"""Host memory for a cache's second tier is had, or refused by the name of its option."""

from __future__ import annotations

import gc

import pytest
import torch

from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.host_buffer import HostBuffer


def test_more_than_the_host_has_is_refused_by_the_options_name() -> None:
    with pytest.raises(StartupError, match=r"^--some-cache-gib: 4194304\.00 GiB are asked for, and the host has \d"):
        HostBuffer((1 << 50,), torch.float32, torch.device("cpu"), "--some-cache-gib")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_is_pinned_for_as_long_as_the_buffer_lives() -> None:
    buffer = HostBuffer((3, 1 << 20), torch.uint8, torch.device("cuda:0"), "--some-cache-gib")
    tensor = buffer.tensor
    assert tensor.is_pinned()
    del buffer
    gc.collect()
    assert not tensor.is_pinned()
