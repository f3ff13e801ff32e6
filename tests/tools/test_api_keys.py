"""API keys: where they come from, what is refused, and that no text of ours ever shows one."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from tests.support import make_config
from vlmrt.actors.models.registry import load_model_config
from vlmrt.runtime.config import ApiKey, Config, ServerOptions
from vlmrt.runtime.errors import StartupError
from vlmrt.tools import demo
from vlmrt.tools.api_keys import read_api_keys
from vlmrt.tools.cli import build_parser
from vlmrt.tools.launch import build_config
from vlmrt.tools.launch_report import LaunchReport

SECRET = "sk-a-secret-1"


def key_file(directory: Path, text: str) -> str:
    file = directory / "keys"
    file.write_text(text)
    return str(file)


def test_flags_file_and_environment_add_up_and_comments_are_none(tmp_path: Path) -> None:
    file = key_file(tmp_path, "# mine\n\nk3 \tteam-a  # theirs\n  k#4\nk5 team-b\n")
    environment = {"VLMRT_API_KEY": "k1, k6", "HOME": "/"}
    keys = read_api_keys(["k1", "k2"], file, environment)
    assert set(keys) == {
        *(ApiKey.of(key) for key in ("k1", "k2", "k6", "k#4")),
        ApiKey.of("k3", "team-a"),
        ApiKey.of("k5", "team-b"),
    }
    assert len(keys) == 6
    assert environment == {"HOME": "/"}  # child processes inherit what is left
    assert read_api_keys(None, None, {}) == read_api_keys(None, None, {"VLMRT_API_KEY": ""}) == ()


@pytest.mark.parametrize(
    ("flags", "text", "variable", "says"),
    [
        ([""], None, "", "--api-key, number 1"),
        (["ok", "a b"], None, "", "--api-key, number 2"),
        (["kéy"], None, "", "printable ASCII"),
        (["k" * 513], None, "", "1 to 512"),
        (None, None, "k1,,k2", "VLMRT_API_KEY, number 2"),
        (None, "", "", "holds no key"),
        (None, "# k\n", "", "holds no key"),
        (None, f"{SECRET} a b\n", "", "line 1: more than KEY and TENANT"),
        (None, f"\n{SECRET} a/b\n", "", "line 2: the tenant 'a/b'"),
        (None, f"{SECRET} a\n{SECRET} b\n", "", "line 2: the key belongs to the tenant 'a' already"),
        ([SECRET], f"{SECRET} a\n", "", "line 1: the key belongs to the tenant 'none' already"),
    ],
)
def test_what_is_no_key_ends_the_start_by_a_line_without_it(
    flags: list[str] | None, text: str | None, variable: str, says: str, tmp_path: Path
) -> None:
    file = None if text is None else key_file(tmp_path, text)
    with pytest.raises(StartupError) as refused:
        read_api_keys(flags, file, {"VLMRT_API_KEY": variable})
    assert says in str(refused.value)
    assert SECRET not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(StartupError, match=r"--api-key-file .*keys: "):
        read_api_keys(None, str(file), {})


def config_of(*arguments: str) -> Config:
    return build_config(build_parser().parse_args(["launch", "--device", "cpu", *arguments]))[0]


def test_no_key_is_in_what_processes_are_told_or_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMRT_API_KEY", f"{SECRET}-2")
    file = key_file(tmp_path, f"{SECRET}-3 team\n")
    config = config_of("--api-key", SECRET, "--api-key-file", file)
    assert len(config.server.api_keys) == 3
    assert SECRET not in repr(config)
    assert config.server.api_keys[0].digest.hex()[:8] not in repr(config)
    spec = msgspec.msgpack.encode(config)
    assert SECRET.encode() not in spec
    assert msgspec.msgpack.decode(spec, type=Config) == config
    assert "VLMRT_API_KEY" not in os.environ


def ready_block(server: ServerOptions, capsys: pytest.CaptureFixture[str], **model: object) -> str:
    config = make_config(demo.CHECKPOINT, server=server)
    config = msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, **model))
    LaunchReport(config, load_model_config(demo.CHECKPOINT)).ready("http://127.0.0.1:1", 1.0)
    return capsys.readouterr().out


def test_the_ready_block_counts_keys_and_tenants(capsys: pytest.CaptureFixture[str]) -> None:
    keys = (ApiKey.of("a"), ApiKey.of("b", "x"), ApiKey.of("c", "y"), ApiKey.of("d", "y"))
    block = ready_block(ServerOptions(host="0.0.0.0", api_keys=keys), capsys)
    assert "API key    on (4 keys, 2 tenants)" in block
    assert 'curl http://127.0.0.1:1/v1/chat/completions -H "authorization: Bearer $VLMRT_API_KEY"' in block
    assert "warning" not in block
    assert "API key    on (1 key)" in ready_block(ServerOptions(api_keys=keys[:1]), capsys)


@pytest.mark.parametrize(
    ("host", "warned"),
    [("127.0.0.1", False), ("localhost", False), ("::1", False), ("0.0.0.0", True), ("10.0.0.5", True), ("h", True)],
)
def test_an_address_that_others_reach_without_a_key_is_warned_of(
    host: str, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    block = ready_block(ServerOptions(host=host), capsys)
    assert (f"warning    {host} can be reached from other machines" in block) == warned
    assert "API key    none" in block


def test_the_ready_block_has_every_name_of_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    block = ready_block(ServerOptions(), capsys, served_names=("org/a", "b"))
    assert 'model      org/a (qwen2_vl); the names "b", "model" work too' in block
    assert 'the name "model" works too' in ready_block(ServerOptions(), capsys, served_names=("org/a",))


def test_names_of_the_model_are_taken_once_and_none_is_empty() -> None:
    config = config_of("--served-model-name", "a", "b", "--served-model-name", "a", "c")
    assert config.model.served_names == ("a", "b", "c")
    for wrong in ("", " ", "a\nb"):
        with pytest.raises(StartupError, match="--served-model-name"):
            config_of("--served-model-name", wrong)
