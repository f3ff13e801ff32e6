"""The shipped checkpoint: its size and layout, and that it answers right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors import safe_open

from vlmrt.tools.demo import CHECKPOINT
from vlmrt.tools.demo.drawing import Scenery
from vlmrt.tools.demo.evaluate import ask_in_process, questions, summary
from vlmrt.tools.demo.network import Network, Shape
from vlmrt.tools.demo.tasks import KINDS

FILES = (
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
    "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "training.json",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on many threads, far slower on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    return content


def test_the_checkpoint_is_complete_and_at_most_twenty_megabytes() -> None:
    assert {path.name for path in CHECKPOINT.iterdir()} >= set(FILES)
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 20_000_000


def test_the_weights_are_bfloat16_under_their_public_names(config: dict[str, Any]) -> None:
    expected = {name: list(w.shape) for name, w in Network(Shape(vocab_size=config["vocab_size"])).state_dict().items()}
    with safe_open(CHECKPOINT / "model.safetensors", framework="pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        assert {name: part.get_shape() for name, part in found.items()} == expected
        assert {part.get_dtype() for part in found.values()} == {"BF16"}
    assert {name.split(".")[0] for name in expected} == {"visual", "model"}


def test_the_config_says_what_loaders_need(config: dict[str, Any]) -> None:
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert config["tie_word_embeddings"]
    assert "transformers_version" in config
    assert config["hidden_size"] // config["num_attention_heads"] == 32
    assert sum(config["rope_scaling"]["mrope_section"]) == 16


def test_the_checkpoint_answers_at_least_nine_of_ten_questions_right() -> None:
    results = ask_in_process(CHECKPOINT, questions(2 * len(KINDS), KINDS, Scenery(), seed=11))
    report = summary(results)
    assert report["all"]["percent"] >= 90, [result for result in results if not result.right]
