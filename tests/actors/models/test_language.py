"""Logits and greedy tokens of the language model against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.actors.models.conftest import Models, load
from tests.actors.models.paged import PagedRunner, Request
from vlmrt.actors.models.rope_index import MediaSpan
from vlmrt.tools.checkpoint import make_checkpoint

NEW_TOKENS = 12


def prompt(models: Models, grids: list[tuple[int, int, int]], seed: int) -> tuple[list[int], list[MediaSpan], Tensor]:
    """Random text with images between; pixel values of all of them."""
    config = models.config
    rng = np.random.default_rng(seed)

    def text() -> list[int]:
        return [int(token) for token in rng.integers(0, 900, rng.integers(1, 9))]

    token_ids, spans = text(), []
    for grid_thw in grids:
        token_ids.append(config.vision_start_token_id)
        num_tokens = grid_thw[0] * grid_thw[1] * grid_thw[2] // 4
        spans.append(MediaSpan(len(token_ids), num_tokens, grid_thw))
        token_ids += [config.image_token_id] * num_tokens + [config.vision_end_token_id, *text()]
    num_patches = sum(t * h * w for t, h, w in grids)
    generator = torch.Generator().manual_seed(seed)
    return token_ids, spans, torch.randn(num_patches, config.vision.patch_dim, generator=generator)


@torch.inference_mode()
def reference_logits(models: Models, request: Request, pixel_values: Tensor) -> Tensor:
    """Logits after every token of a request, images encoded by the reference."""
    ids = torch.tensor([request.token_ids])
    media: dict[str, Any] = {}
    if request.spans:
        grids = torch.tensor([span.grid_thw for span in request.spans])
        media = {"pixel_values": pixel_values, "image_grid_thw": grids}
        media["mm_token_type_ids"] = (ids == models.config.image_token_id).int()
    models.reference.model.rope_deltas = None
    logits: Tensor = models.reference(input_ids=ids, attention_mask=torch.ones_like(ids), **media).logits[0]
    return logits


def check_requests(models: Models, chunks: list[int], grids: list[list[tuple[int, int, int]]]) -> list[list[int]]:
    """Prefill requests in chunks, decode them together, compare every choice and its logits with the reference."""
    runner = PagedRunner(models.language)
    requests, pixels, logits = [], [], []
    for number, (chunk, images) in enumerate(zip(chunks, grids, strict=True)):
        token_ids, spans, pixel_values = prompt(models, images, number)
        with torch.inference_mode():
            rows = models.tower(pixel_values, images) if images else None
        requests.append(Request(token_ids, spans, rows))
        pixels.append(pixel_values)
        logits.append(runner.prefill(requests[-1], chunk))
    seen = [torch.cat(logits)]
    for _ in range(NEW_TOKENS - 1):
        for request, token in zip(requests, seen[-1].argmax(dim=-1).tolist(), strict=True):
            request.token_ids.append(token)
        seen.append(runner.step([(request, 1) for request in requests]))
    for number, request in enumerate(requests):
        expected = reference_logits(models, request, pixels[number])[request.num_prompt_tokens - 1 :]
        ours = torch.stack([step[number] for step in seen])
        assert (ours - expected).abs().max() <= 1e-4
        assert torch.equal(ours.argmax(dim=-1), expected.argmax(dim=-1))
    return [request.token_ids[request.num_prompt_tokens :] for request in requests]


def test_logits_and_greedy_tokens_equal_the_reference_in_chunks_and_batches(models: Models) -> None:
    grids = [[], [(1, 8, 10)], [(1, 4, 6), (1, 12, 4)], [(1, 16, 20), (1, 2, 2), (1, 6, 6)]]
    outputs = check_requests(models, [100, 7, 5, 33], grids)
    assert len({tuple(output) for output in outputs}) == len(outputs)


@torch.inference_mode()
def test_greedy_tokens_depend_on_the_image(models: Models) -> None:
    token_ids, spans, pixel_values = prompt(models, [(1, 8, 10)], 0)
    outputs = set()
    for number in range(4):
        rows = models.tower(pixel_values.roll(number * 100, 0), [(1, 8, 10)])
        request = Request(list(token_ids), spans, rows)
        runner = PagedRunner(models.language)
        logits = runner.prefill(request, 1000)
        for _ in range(8):
            request.token_ids.append(int(logits.argmax()))
            logits = runner.step([(request, 1)])
        outputs.add(tuple(request.token_ids[len(token_ids) :]))
    assert len(outputs) == 4


def rewritten(directory: Path, change: dict[str, Any]) -> Models:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return load(directory)


@pytest.mark.filterwarnings("ignore:.*[Ss]liding.*")
def test_layers_with_a_sliding_window_equal_the_reference(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "test-qwen2-vl", layers=3)
    models = rewritten(tmp_path, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1})
    assert models.config.text.sliding_window == 9
    check_requests(models, [100, 7, 13], [[], [(1, 8, 10)], [(1, 4, 6), (1, 4, 4)]])


def test_an_untied_head_and_an_odd_vocabulary_equal_the_reference(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_checkpoint(tmp_path, "test-qwen2-vl", tie=False)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat((tensors[name], tensors[name][:3] + 1))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_requests(rewritten(tmp_path, {"vocab_size": 1027}), [9], [[(1, 4, 6)]])


def test_nested_names_and_a_nested_config_load_alike(models: Models, tmp_path: Path) -> None:
    models.reference.save_pretrained(tmp_path, save_original_format=False)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "text_config" in config
    again = load(tmp_path)
    assert again.config == models.config
    for ours, theirs in ((again.language, models.language), (again.tower, models.tower)):
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(parameter, other)
