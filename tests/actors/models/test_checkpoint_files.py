"""Weight files that are whole, and every way in which they may not be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vlmrt.actors.models.checkpoint_files import check_weight_files
from vlmrt.actors.models.config import CheckpointError
from vlmrt.actors.models.layers import TensorParallel
from vlmrt.actors.models.registry import family, load_model_config
from vlmrt.tools.checkpoint import make_checkpoint

CPU = torch.device("cpu")
FIRST = "model-00001-of"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made"), "test-qwen2-vl", shard_bytes=1_000_000)


@pytest.fixture
def directory(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def shard(directory: Path) -> Path:
    return next(directory.glob(f"{FIRST}*"))


def edit_index(directory: Path, edit: Callable[[dict[str, str]], None]) -> None:
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    edit(index["weight_map"])
    file.write_text(json.dumps(index))


def edit_header(file: Path, edit: Callable[[str], str]) -> None:
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = edit(raw[8 : 8 + size].decode()).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])


def test_sharded_and_single_files_hold_the_same_tensors(directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    single = make_checkpoint(tmp_path / "single", "test-qwen2-vl")
    sharded_files, single_files = check_weight_files(directory), check_weight_files(single)
    assert len({entry.file for entry in sharded_files.tensors.values()}) > 2
    assert sharded_files.tensors.keys() == single_files.tensors.keys()
    assert sharded_files.num_bytes == single_files.num_bytes
    expected = load_file(single / "model.safetensors")
    for name, entry in sharded_files.tensors.items():
        assert entry.shape == tuple(expected[name].shape)
        start, stop = entry.offsets
        assert entry.file.read_bytes()[start:stop] == expected[name].numpy().tobytes()


def test_truncated_shards_are_refused_wherever_they_end(directory: Path) -> None:
    file = shard(directory)
    raw = file.read_bytes()
    for size in (0, 4, 8, 100, len(raw) // 2, len(raw) - 1):
        file.write_bytes(raw[:size])
        with pytest.raises(CheckpointError, match=f"{FIRST}.*truncated"):
            check_weight_files(directory)
    file.write_bytes(raw + b"x")
    with pytest.raises(CheckpointError, match="bytes past the last tensor"):
        check_weight_files(directory)


def test_a_missing_shard_is_named(directory: Path) -> None:
    shard(directory).unlink()
    with pytest.raises(CheckpointError, match=f"{FIRST}.*is missing"):
        check_weight_files(directory)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_an_index_that_leads_outside_the_directory_is_refused(directory: Path, name: str) -> None:
    edit_index(directory, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    with pytest.raises(CheckpointError, match="is not a file name in"):
        check_weight_files(directory)


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(directory: Path) -> None:
    edit_index(directory, lambda weight_map: weight_map.update({"model.extra": shard(directory).name}))
    with pytest.raises(CheckpointError, match=r"has no tensor 'model\.extra'"):
        check_weight_files(directory)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_cannot_be_read_is_refused(directory: Path, content: str) -> None:
    (directory / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="weight_map"):
        check_weight_files(directory)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"F32"', '"Q4"', "dtype 'Q4' is not known"),
        ('"shape":[', '"shape":[3,', "do not hold F32 of shape"),
        ('"data_offsets":[0,', '"data_offsets":[4,', "do not hold|data starts at 4"),
        ('"dtype"', '"kind"', "header cannot be read"),
        ("{", "?", "header cannot be read"),
    ],
)
def test_a_header_that_does_not_describe_its_file_is_refused(directory: Path, old: str, new: str, message: str) -> None:
    edit_header(shard(directory), lambda header: header.replace(old, new, 1))
    with pytest.raises(CheckpointError, match=message):
        check_weight_files(directory)


def test_pickled_weights_and_empty_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        check_weight_files(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*pickled weights are not read"):
        check_weight_files(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        check_weight_files(tmp_path / "nowhere")


def load_both(directory: Path) -> list[tuple[int, int]]:
    config, files = load_model_config(directory), check_weight_files(directory)
    seen: list[tuple[int, int]] = []
    loaders = family(config.model_type)
    loaders.load_language(files, config, TensorParallel(), CPU, torch.float32, lambda *step: seen.append(step))
    loaders.load_vision(files, config, CPU, torch.float32)
    return seen


def test_loading_reports_its_progress(directory: Path) -> None:
    seen = load_both(directory)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"intermediate_size": 128}, r"mlp.*: shape \[.*256.*\], config\.json asks for \[128, 128\]"),
        ({"num_hidden_layers": 3}, r"12 tensors \(model\.layers\.2\..* and 8 more\) missing"),
        ({"num_hidden_layers": 1}, r"12 tensors \(model\.layers\.1\..*not part of this architecture"),
        ({"tie_word_embeddings": False}, r"1 tensors \(lm_head\.weight\) missing"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(directory: Path, fields: dict[str, int], message: str) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(CheckpointError, match=message):
        load_both(directory)


def test_integer_weights_are_refused(directory: Path) -> None:
    edit_header(shard(directory), lambda header: header.replace('"F32"', '"I32"', 1))
    with pytest.raises(CheckpointError, match="dtype I32 is not one of"):
        load_both(directory)


def test_a_tied_copy_of_the_head_and_old_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_checkpoint(tmp_path, "test-qwen2-vl")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)
    save_file(tensors, file)
    assert load_both(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_converted_to_the_dtype_asked_for(tmp_path: Path, dtype: str) -> None:
    make_checkpoint(tmp_path, "test-qwen2-vl", dtype=dtype)
    config, files = load_model_config(tmp_path), check_weight_files(tmp_path)
    assert config.dtype == dtype
    loaders = family(config.model_type)
    tower = loaders.load_vision(files, config, CPU, torch.float32)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}
    tower = loaders.load_vision(files, config, CPU, torch.bfloat16)
    assert tower(torch.zeros(16, config.vision.patch_dim), [(1, 4, 4)]).dtype == torch.bfloat16
