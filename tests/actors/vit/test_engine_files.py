"""The cache of exported towers: named by what they were made of, built once, whole or not there."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import pytest

from vlmrt.actors.models.checkpoint_files import check_weight_files
from vlmrt.actors.models.registry import load_model_config
from vlmrt.actors.vit.engines.engine_files import (
    EngineSpec,
    build_once,
    default_cache,
    is_built,
    read_about,
    versions_of,
    weights_hash,
)
from vlmrt.runtime.errors import StartupError
from vlmrt.tools.checkpoint import make_checkpoint


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "test-qwen2-vl", dtype="float32")


@pytest.fixture
def spec(directory: Path) -> EngineSpec:
    config = load_model_config(directory)
    return EngineSpec("onnx", config.model_type, "hash", config.vision, "float32", 23, {"torch": "2", "onnx": "1"})


def test_what_a_tower_was_made_of_is_in_its_name(spec: EngineSpec) -> None:
    others = [
        msgspec.structs.replace(spec, format="tensorrt"),
        msgspec.structs.replace(spec, model_type="qwen2_5_vl"),
        msgspec.structs.replace(spec, weights="other"),
        msgspec.structs.replace(spec, vision=msgspec.structs.replace(spec.vision, norm="rms_norm")),
        msgspec.structs.replace(spec, dtype="bfloat16"),
        msgspec.structs.replace(spec, opset=18),
        msgspec.structs.replace(spec, versions={"torch": "2", "onnx": "2"}),
        msgspec.structs.replace(spec, device="a GPU"),
        msgspec.structs.replace(spec, max_patches=64),
        msgspec.structs.replace(spec, form=spec.form + 1),
    ]
    assert len({spec.name, *(other.name for other in others)}) == 1 + len(others)
    assert msgspec.structs.replace(spec, versions={"onnx": "1", "torch": "2"}).name == spec.name
    assert spec.name.startswith("onnx-float32-")


def test_the_hash_is_of_the_towers_bytes_alone(directory: Path, tmp_path: Path) -> None:
    given = check_weight_files(directory)
    expected = weights_hash(given)
    sharded = make_checkpoint(tmp_path / "sharded", "test-qwen2-vl", dtype="float32", shard_bytes=500_000)
    files = check_weight_files(sharded)
    assert len({entry.file for entry in files.tensors.values()}) > 1
    assert weights_hash(files) == expected
    for name, changes in (("visual.merger.mlp.2.bias", True), ("model.norm.weight", False)):
        entry = next(entry for key, entry in files.tensors.items() if key.endswith(name.removeprefix("visual.")))
        content = bytearray(entry.file.read_bytes())
        content[entry.offsets[1] - 1] ^= 1
        entry.file.write_bytes(content)
        assert (weights_hash(files) != expected) == changes
        content[entry.offsets[1] - 1] ^= 1
        entry.file.write_bytes(content)


def test_a_tower_is_built_once_however_many_ask(spec: EngineSpec, tmp_path: Path) -> None:
    built: list[Path] = []
    directories: list[Path] = []

    def build(place: Path) -> None:
        assert not is_built(tmp_path / "cache" / spec.name)
        (place / "file").write_text("x")
        built.append(place)

    threads = [
        threading.Thread(target=lambda: directories.append(build_once(tmp_path / "cache", spec, build)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert set(directories) == {tmp_path / "cache" / spec.name}
    assert (directories[0] / "file").read_text() == "x"
    assert read_about(directories[0]) == spec
    assert not built[0].exists()
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


def test_a_build_that_fails_leaves_nothing_and_may_be_tried_again(spec: EngineSpec, tmp_path: Path) -> None:
    def fail(place: Path) -> None:
        (place / "half").write_text("x")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        build_once(tmp_path, spec, fail)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    (tmp_path / "building-by-a-killed-one").mkdir()
    build_once(tmp_path, spec, lambda place: None)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", spec.name}


def test_a_cache_that_cannot_be_written_is_named(spec: EngineSpec, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match=r"--engine-cache .*/file/cache: cannot be written"):
        build_once(tmp_path / "file" / "cache", spec, lambda place: None)
    with pytest.raises(StartupError, match=r"about\.json: cannot be read"):
        read_about(tmp_path)


def test_the_cache_is_where_the_user_has_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "vlmrt" / "engines"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert default_cache() == Path.home() / ".cache" / "vlmrt" / "engines"


def test_a_package_that_is_missing_names_the_extra() -> None:
    assert versions_of(("numpy",), "onnx", "--x").keys() == {"numpy"}
    with pytest.raises(StartupError, match=r"--x: the package no-such-package is not .* pip install 'vlmrt\[onnx\]'"):
        versions_of(("numpy", "no-such-package"), "onnx", "--x")
