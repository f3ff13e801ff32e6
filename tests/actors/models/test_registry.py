"""config.json and its neighbours: what is read from them and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vlmrt.actors.models.config import CheckpointError, GenerationDefaults
from vlmrt.actors.models.registry import (
    check_tensor_parallel,
    family,
    load_generation_defaults,
    load_image_processing,
    load_model_config,
)
from vlmrt.tools.checkpoint import make_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made"), "test-qwen2-vl", weights=False)


@pytest.fixture
def directory(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def change(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None takes one out."""
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_the_public_layout_is_read(directory: Path) -> None:
    config = load_model_config(directory)
    assert config.model_type == "qwen2_vl"
    assert config.text.head_dim == 32
    assert config.text.mrope_section == (4, 6, 6)
    assert config.text.sliding_window is None
    assert config.vision.intermediate_size == 256
    assert config.vision.hidden_act == "quick_gelu"
    assert config.dtype == "float32"
    assert config.eos_token_ids == (config.image_token_id - 10,)


@pytest.mark.parametrize(
    "rope",
    [
        {
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 5e5},
            "rope_theta": None,
        },
        {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [4, 6, 6]}, "rope_theta": 5e5},
        {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}, "rope_theta": 5e5},
    ],
)
def test_every_spelling_of_the_rotary_fields_is_read(directory: Path, rope: dict[str, Any]) -> None:
    change(directory / "config.json", **({"rope_scaling": None} | rope))
    text = load_model_config(directory).text
    assert text.rope_theta == 5e5
    assert text.mrope_section == (4, 6, 6)


def test_sliding_windows_are_read_from_either_field(directory: Path) -> None:
    change(directory / "config.json", use_sliding_window=True, sliding_window=64, max_window_layers=1)
    text = load_model_config(directory).text
    assert [text.layer_window(layer) for layer in range(2)] == [None, 64]
    change(directory / "config.json", layer_types=["sliding_attention", "sliding_attention"])
    text = load_model_config(directory).text
    assert [text.layer_window(layer) for layer in range(2)] == [64, 64]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "known: Qwen2VLForConditionalGeneration, Qwen2_5_VL"),
        ({"architectures": None, "model_type": "llama"}, "'llama' is not supported"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "method 'awq' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.type: 'yarn'"),
        ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, "rope_scaling.factor: 2 is not supported"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 7]}}, "does not sum to half the head size, 16"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [4, 12]}}, "has 2 items, expected 3"),
        ({"hidden_size": 0}, "hidden_size: 0 is not an integer of at least 1"),
        ({"hidden_size": 130}, "num_attention_heads: 4 does not divide hidden_size 130"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide num_attention_heads 4"),
        ({"vocab_size": "many"}, "vocab_size: 'many' is not an integer"),
        ({"vocab_size": 100}, "image_token_id: 1022 is outside the vocabulary of 100"),
        ({"num_hidden_layers": None}, "num_hidden_layers: is missing"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps: -1.0 is not above 0"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        ({"torch_dtype": "int8"}, "torch_dtype: 'int8' is not supported"),
        ({"tie_word_embeddings": "yes"}, "'yes' is not true or false"),
        ({"eos_token_id": "x"}, "is not a list of non-negative integers"),
        ({"vision_config": None}, "vision_config: is missing"),
        ({"vision_config": 3}, "vision_config: 3 is not an object"),
        ({"vision_config": {"hidden_size": 64}}, "differs from the language model's hidden_size 128"),
        ({"vision_config": {"hidden_size": 128, "num_heads": 7}}, "7 does not divide a width of 1280"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_in_one_line(
    directory: Path, fields: dict[str, Any], message: str
) -> None:
    change(directory / "config.json", **fields)
    with pytest.raises(CheckpointError) as error:
        load_model_config(directory)
    assert message in str(error.value)
    assert "config.json: field " in str(error.value)
    assert "\n" not in str(error.value)


def test_a_window_smaller_than_a_merged_patch_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "test-qwen2.5-vl", weights=False)
    config = json.loads((tmp_path / "config.json").read_text())
    change(tmp_path / "config.json", vision_config=config["vision_config"] | {"window_size": 20})
    with pytest.raises(CheckpointError, match="window_size: 20 is smaller than a merged patch, 28"):
        load_model_config(tmp_path)


@pytest.mark.parametrize(("content", "message"), [(b"{", "cannot be read as JSON"), (b"[]", "expected a JSON object")])
def test_a_file_that_is_no_json_object_is_refused(directory: Path, content: bytes, message: str) -> None:
    (directory / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_model_config(directory)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: the file is missing"):
        load_model_config(tmp_path)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(CheckpointError, match="known: qwen2_vl, qwen2_5_vl"):
        family("qwen9_vl")


@pytest.mark.parametrize(
    ("tp", "message"), [(3, "num_attention_heads: 4"), (4, "num_key_value_heads: 2"), (0, "below 1")]
)
def test_ranks_that_do_not_divide_the_model_are_refused(directory: Path, tp: int, message: str) -> None:
    config = load_model_config(directory)
    check_tensor_parallel(config, 2)
    with pytest.raises(CheckpointError, match=message):
        check_tensor_parallel(config, tp)


def test_both_spellings_of_the_pixel_bounds_are_read(directory: Path) -> None:
    assert load_image_processing(directory).max_pixels == 12_845_056
    size = {"shortest_edge": 5000, "longest_edge": 70_000}
    change(directory / "preprocessor_config.json", min_pixels=None, max_pixels=None, size=size)
    processing = load_image_processing(directory)
    assert (processing.min_pixels, processing.max_pixels) == (5000, 70_000)
    assert processing.rescale_factor == 1 / 255


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_pixels": 100}, "max_pixels: 100 is below min_pixels 3136"),
        ({"image_std": [1, 0, 1]}, "image_std"),
        ({"image_mean": [1, 2]}, "not a list of 3 numbers"),
        ({"resample": 2}, "resample: 2 is not supported"),
        ({"do_resize": False}, "do_resize: false is not supported"),
        ({"patch_size": None}, "patch_size: is missing"),
    ],
)
def test_image_processing_that_is_not_supported_is_refused(
    directory: Path, fields: dict[str, Any], message: str
) -> None:
    change(directory / "preprocessor_config.json", **fields)
    with pytest.raises(CheckpointError, match=message):
        load_image_processing(directory)


def test_generation_defaults_are_read_and_may_be_missing(directory: Path) -> None:
    defaults = load_generation_defaults(directory)
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.01, 0.001, 1)
    assert len(defaults.eos_token_ids) == 2
    file = directory / "generation_config.json"
    change(file, do_sample=False)
    assert load_generation_defaults(directory).temperature == 0.0
    change(file, do_sample=None, temperature=-1.0)
    with pytest.raises(CheckpointError, match=r"temperature: -1\.0 is below 0"):
        load_generation_defaults(directory)
    change(file, temperature=0.0, top_p=1.5)
    with pytest.raises(CheckpointError, match=r"top_p: 1\.5 is above 1"):
        load_generation_defaults(directory)
    file.unlink()
    assert load_generation_defaults(directory) == GenerationDefaults()
