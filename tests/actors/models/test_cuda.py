"""The same code on a GPU: rows, logits, draws and skipped cache writes as on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.actors.models.paged import PagedRunner, Request
from vlmrt.actors.models.checkpoint_files import check_weight_files
from vlmrt.actors.models.layers import TensorParallel
from vlmrt.actors.models.registry import family, load_model_config
from vlmrt.actors.models.rope_index import MediaSpan
from vlmrt.kernels.rope_and_cache import rope_and_cache
from vlmrt.kernels.rotary import rotary_tables
from vlmrt.kernels.sampling import SamplingBatch, sample
from vlmrt.tools.checkpoint import make_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CPU = torch.device("cpu")
GPU = torch.device("cuda:0")


@torch.inference_mode()
@pytest.mark.parametrize("preset", ["test-qwen2-vl", "test-qwen2.5-vl"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 6e-2)])
def test_rows_and_logits_are_those_of_the_cpu(
    preset: str, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, preset)
    config, files = load_model_config(tmp_path), check_weight_files(tmp_path)
    loaders = family(config.model_type)
    grids = [(1, 8, 10), (1, 20, 34), (2, 6, 4), (1, 4, 4), (1, 4, 4)]
    num_patches = sum(t * h * w for t, h, w in grids)
    pixel_values = torch.randn(num_patches, config.vision.patch_dim, generator=torch.Generator().manual_seed(0))
    rows, logits = [], []
    for device, working in ((CPU, torch.float32), (GPU, dtype)):
        tower = loaders.load_vision(files, config, device, working)
        rows.append(tower(pixel_values.to(device), grids))
        model = loaders.load_language(files, config, TensorParallel(), device, working)
        runner = PagedRunner(model)
        spans = [MediaSpan(4, 20, (1, 8, 10))]
        first = Request([5, 6, 7, 8] + [config.image_token_id] * 20 + [9, 10, 11], spans, rows[-1][:20])
        second = Request(list(range(100, 150)))
        steps = [runner.prefill(first, 7), runner.prefill(second, 100)]
        for token in (3, 77, 500):
            first.token_ids.append(token)
            second.token_ids.append(token)
            steps.append(runner.step([(first, 1), (second, 1)]))
        logits.append(torch.cat(steps))
    for ours, theirs in (rows, logits):
        assert (theirs.cpu().float() - ours).abs().max() <= tolerance * ours.abs().max()


@torch.inference_mode()
def test_draws_are_those_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(512, 2000, generator=generator) * 3
    tokens = []
    for device in (CPU, GPU):
        ones, zeros = torch.ones(512, device=device), torch.zeros(512, device=device)
        batch = SamplingBatch(
            temperature=ones * 0.8,
            top_p=ones * 0.95,
            top_k=torch.full((512,), 100, device=device),
            min_p=ones * 0.01,
            repetition_penalty=ones,
            frequency_penalty=zeros,
            presence_penalty=zeros,
            seeds=torch.arange(512, device=device),
            positions=torch.arange(512, device=device) % 7,
            prompt_mask=None,
            output_counts=None,
            all_greedy=False,
        )
        tokens.append(sample(logits.to(device), batch).cpu())
    # the integers are the same; the logarithms may differ in their last bit, which decides hardly any draw
    assert (tokens[0] != tokens[1]).sum() <= 1


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@torch.inference_mode()
def test_a_step_neither_waits_for_the_device_nor_writes_skipped_rows() -> None:
    qkv, bias = torch.randn(5, 8 * 32, device=GPU), torch.randn(8 * 32, device=GPU)
    cos, sin = rotary_tables(torch.randn(5, 16, device=GPU))
    k_cache, v_cache = (torch.zeros(4, 8, 2, 32, device=GPU) for _ in range(2))
    slots = torch.tensor([17, -1, 5, -1, 30], device=GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rope_and_cache(qkv, bias, cos, sin, k_cache, v_cache, slots, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    written = v_cache.view(32, 2, 32).abs().sum((1, 2)).nonzero().flatten().tolist()
    assert written == [5, 17, 30]
