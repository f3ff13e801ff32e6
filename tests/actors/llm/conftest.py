"""Two random checkpoints, each with its language model, its tower and transformers as the judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.actors.llm.driver import Request, RowPages, media_item
from tests.reference import Reference
from vlmrt.actors.llm.grammar import GrammarCompiler, load_tokenizer
from vlmrt.actors.models.checkpoint_files import check_weight_files
from vlmrt.actors.models.config import ModelConfig
from vlmrt.actors.models.layers import TensorParallel
from vlmrt.actors.models.qwen2_vl.language import LanguageModel
from vlmrt.actors.models.registry import family, load_image_processing, load_model_config
from vlmrt.actors.models.vision_tower import VisionTower
from vlmrt.kernels.patchify import patchify
from vlmrt.runtime.messages import Sampling
from vlmrt.tools.checkpoint import make_checkpoint

PRESETS = ("test-qwen2-vl", "test-qwen2.5-vl")
GREEDY = Sampling(temperature=0.0)
CPU = torch.device("cpu")
MAX_TEXT_ID = 1000  # below the special tokens of the test checkpoints


@dataclass
class Checkpoint:
    directory: Path
    config: ModelConfig
    model: LanguageModel
    tower: VisionTower
    reference: Reference

    def prompt(
        self,
        seed: int,
        num_text_tokens: int,
        grids: Sequence[tuple[int, int, int]] = (),
        slab: RowPages | None = None,
        sampling: Sampling = GREEDY,
    ) -> tuple[Request, dict[str, Tensor]]:
        """A random prompt with images spread over it, their rows in shuffled pages; and the reference's inputs."""
        rng = np.random.default_rng(seed)
        token_ids = rng.integers(0, MAX_TEXT_ID, num_text_tokens).tolist()
        media, pages, inputs = [], {}, {}
        pieces = np.array_split(np.array(token_ids), len(grids) + 1)
        token_ids = pieces[0].tolist()
        if grids:
            assert slab is not None
            processing = load_image_processing(self.directory)
            size = processing.patch_size
            pixels = [
                torch.from_numpy(rng.integers(0, 256, (1, height * size, width * size, 3), dtype=np.uint8))
                for _, height, width in grids
            ]
            inputs["pixel_values"] = patchify(pixels, processing)
            inputs["image_grid_thw"] = torch.tensor(grids)
            with torch.inference_mode():
                rows = self.tower(inputs["pixel_values"], grids)
        for index, grid in enumerate(grids):
            token_ids.append(self.config.vision_start_token_id)
            item = media_item(f"{seed}-{index}", len(token_ids), grid)
            token_ids += [self.config.image_token_id] * item.num_tokens + [self.config.vision_end_token_id]
            token_ids += pieces[index + 1].tolist()
            media.append(item)
            assert slab is not None
            num_pages = -(-item.num_tokens // slab.page_rows)
            pages[index] = tuple(slab.free_pages.pop() for _ in range(num_pages))
            for number in range(item.num_tokens):
                page = pages[index][number // slab.page_rows]
                slab.tensor()[page * slab.page_rows + number % slab.page_rows] = rows[number]
            rows = rows[item.num_tokens :]
        inputs["input_ids"] = torch.tensor([token_ids])
        return Request(token_ids, tuple(media), pages, sampling), inputs


def load_checkpoint(preset: str, directory: Path) -> Checkpoint:
    make_checkpoint(directory, preset, dtype="float32")
    config = load_model_config(directory)
    files = check_weight_files(directory)
    loaders = family(config.model_type)
    model = loaders.load_language(files, config, TensorParallel(), CPU, torch.float32)
    tower = loaders.load_vision(files, config, CPU, torch.float32)
    return Checkpoint(directory, config, model, tower, Reference(directory))


@pytest.fixture(scope="session")
def compiler(one_checkpoint: Checkpoint) -> Iterator[GrammarCompiler]:
    config = one_checkpoint.config
    made = GrammarCompiler(
        lambda: load_tokenizer(one_checkpoint.directory, config.text.vocab_size, config.eos_token_ids)
    )
    yield made
    made.close()


@pytest.fixture(scope="session", params=PRESETS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(request.param, tmp_path_factory.mktemp(request.param.replace(".", "-")))


@pytest.fixture(scope="session")
def one_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(PRESETS[0], tmp_path_factory.mktemp("one"))
