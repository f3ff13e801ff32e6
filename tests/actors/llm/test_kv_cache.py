"""How many blocks of keys and values fit."""

from __future__ import annotations

import pytest
import torch

from tests.support import make_config
from vlmrt.actors.llm.kv_cache import allocate, block_bytes, by_layer, num_blocks_that_fit
from vlmrt.actors.models.config import TextConfig
from vlmrt.runtime.config import Config, MemoryOptions, ModelOptions, ParallelOptions, SchedulingOptions
from vlmrt.runtime.errors import StartupError

CPU = torch.device("cpu")
TEXT = TextConfig(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=512,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    mrope_section=(4, 6, 6),
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    sliding_window=None,
    first_sliding_layer=4,
    hidden_act="silu",
)
BLOCK_BYTES = 2 * 4 * 16 * 4 * 32 * 4  # keys and values, layers, tokens, heads, head_dim, float32


def config(memory: MemoryOptions, max_model_len: int = 4096, max_num_seqs: int = 64, tp: int = 1) -> Config:
    return make_config(
        model=ModelOptions("", ("m",), max_model_len=max_model_len),
        memory=memory,
        parallel=ParallelOptions(tp=tp),
        scheduling=SchedulingOptions(max_num_seqs=max_num_seqs, block_size=16),
    )


def num_blocks(memory: MemoryOptions, max_model_len: int = 4096, max_num_seqs: int = 64, tp: int = 1) -> int:
    return num_blocks_that_fit(config(memory, max_model_len, max_num_seqs, tp), TEXT, torch.float32, CPU)


def test_a_block_is_counted_with_all_its_layers() -> None:
    assert block_bytes(TEXT, 1, 16, torch.float32) == BLOCK_BYTES
    assert block_bytes(TEXT, 2, 16, torch.bfloat16) == BLOCK_BYTES // 4


def test_a_number_of_blocks_is_taken_before_a_size() -> None:
    assert num_blocks(MemoryOptions(num_kv_blocks=5, kv_cache_gib=1.0)) == 5


def test_a_restart_takes_what_the_first_start_had() -> None:
    said = config(MemoryOptions(kv_cache_gib=1.0))
    assert num_blocks_that_fit(said, TEXT, torch.float32, CPU, at_last_start=7) == 7


@pytest.mark.parametrize("tp", [1, 2])
def test_a_size_is_of_each_rank(tp: int) -> None:
    assert num_blocks(MemoryOptions(kv_cache_gib=0.5), tp=tp) == tp * 2**29 // BLOCK_BYTES


def test_on_a_cpu_enough_for_all_sequences_within_a_gib() -> None:
    nothing_said = MemoryOptions()
    assert num_blocks(nothing_said, max_model_len=62, max_num_seqs=3) == 3 * 4
    assert num_blocks(nothing_said, max_model_len=63, max_num_seqs=3) == 3 * 5  # two tokens may be planned past the end
    assert num_blocks(nothing_said) == 2**30 // BLOCK_BYTES
    assert num_blocks(nothing_said, max_model_len=1_000_000) == 62_501  # one sequence at least


def test_room_for_less_than_a_block_is_refused() -> None:
    with pytest.raises(StartupError, match="--kv-cache-gib 1e-06"):
        num_blocks(MemoryOptions(kv_cache_gib=1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_is_zeros_of_its_own_for_every_layer(dtype: torch.dtype) -> None:
    cache = allocate(3, 16, TEXT, 2, dtype, CPU)
    kv = by_layer(cache)
    assert len(kv) == 4
    for number, tensor in enumerate(tensor for pair in kv for tensor in pair):
        assert tensor.shape == (3, 16, 2, 32)
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert not tensor.any()
        tensor.fill_(number + 1)
    assert cache[:, 1, 0, 0, 0].tolist() == list(range(1, 9))


def test_a_size_beyond_the_machine_is_refused() -> None:
    with pytest.raises(StartupError, match="--kv-cache-gib"):
        allocate(1 << 40, 16, TEXT, 1, torch.float32, CPU)
