"""Wrong input gets a clear 4xx or a one-line start-up error; every actor lives on and nothing leaks."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.system.server import Server, command
from tests.system.wrong_requests import ONE_PIXEL, WRONG, Wrong, about, data_url
from vlmrt.tools import demo
from vlmrt.tools.checkpoint import make_checkpoint

COUNTED = (
    "vlmrt_images_encoded_total", "vlmrt_step_seconds_count", "vlmrt_prompt_tokens_total",
    "vlmrt_generation_tokens_total", "vlmrt_images_decoded_total",
)  # fmt: skip


class Refusals(NamedTuple):
    """What the server said to every wrong request, what that cost it, and its processes."""

    answers: dict[str, httpx.Response]
    spent: dict[str, float]
    pids_before: dict[str, int]
    pids_after: dict[str, int]
    num_running: float


@pytest.fixture(scope="module")
def refusals(demo_server: Server) -> Refusals:
    def pids() -> dict[str, int]:
        return {actor.name: actor.process.pid for actor in demo_server.actors()}

    pids_before, before = pids(), demo_server.counted(COUNTED)
    answers = {name: post(demo_server, wrong) for name, wrong in WRONG.items()}
    spent = {name: value - before[name] for name, value in demo_server.counted(COUNTED).items()}
    return Refusals(answers, spent, pids_before, pids(), demo_server.metrics()["vlmrt_requests_running"])


def post(server: Server, wrong: Wrong) -> httpx.Response:
    headers = {"content-type": wrong.content_type} if wrong.content_type else {}
    return server.http.post(wrong.route, content=wrong.content, headers=headers)


def test_the_table_is_long_enough() -> None:
    assert len(WRONG) >= 200


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_refused_clearly(name: str, refusals: Refusals) -> None:
    answer = refusals.answers[name]
    assert answer.status_code == WRONG[name].status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert 10 < len(error["message"]) < 500
    assert "Traceback" not in error["message"]


def test_a_picture_of_one_pixel_is_answered(demo_server: Server) -> None:
    answer = demo_server.http.post("/v1/chat/completions", json={"model": "model", **about(data_url(ONE_PIXEL))})
    assert answer.status_code == 200, answer.text


def test_wrong_requests_cost_no_step_and_all_actors_outlive_them(refusals: Refusals) -> None:
    """A sound header with a broken body costs one decode."""
    spent = dict(refusals.spent)
    assert spent.pop("vlmrt_images_decoded_total") <= sum(wrong.num_decodes for wrong in WRONG.values())
    assert set(spent.values()) == {0}, spent
    assert refusals.pids_after == refusals.pids_before
    assert refusals.num_running == 0


# ---------------------------------------------------------------- start-up


def edit_config(checkpoint: Path, **fields: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def failed_start(*arguments: str) -> str:
    """The one line that a failing start prints."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("vlmrt: error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return errors[0]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "test-qwen2-vl", dtype="float32", shard_bytes=1 << 20)


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    shard = sorted(checkpoint.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in failed_start("--model", str(checkpoint))


def test_a_truncated_shard_is_named(checkpoint: Path) -> None:
    shard = sorted(checkpoint.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert shard.name in failed_start("--model", str(checkpoint))


def test_a_tensor_of_the_wrong_shape_is_named(checkpoint: Path) -> None:
    edit_config(checkpoint, intermediate_size=384)
    assert "mlp" in failed_start("--model", str(checkpoint))


def test_an_unknown_architecture_is_named(checkpoint: Path) -> None:
    edit_config(checkpoint, model_type="llava", architectures=["LlavaForConditionalGeneration"])
    assert "Llava" in failed_start("--model", str(checkpoint))


def test_a_quantised_checkpoint_is_refused_by_its_method(checkpoint: Path) -> None:
    edit_config(checkpoint, quantization_config={"quant_method": "awq"})
    assert "awq" in failed_start("--model", str(checkpoint))


def test_a_tp_that_does_not_divide_is_refused() -> None:
    assert "3" in failed_start("--tp", "3")


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in failed_start("--port", str(port))


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    copy = shutil.copytree(demo.CHECKPOINT, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    assert "tokenizer.json" in failed_start("--model", str(copy))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--model", "/no/such/directory"], "/no/such/directory"),
        (["--model", __file__], "file"),
        (["--device", "cuda"], "cuda"),
        (["--max-model-len", "99999999"], "max-model-len"),
        (["--embedding-cache-gib", "0.000001"], "embedding-cache-gib"),
        (["--kv-host-cache-gib", "0.0000001"], "--kv-host-cache-gib 1e-07"),
        (["--kv-host-cache-gib", "999999"], "--kv-host-cache-gib 999999"),
        (["--embedding-host-cache-gib", "999999"], "--embedding-host-cache-gib 999999"),
        (["--kv-host-cache-gib", "1", "--no-prefix-caching"], "--kv-host-cache-gib 1"),
        (["--allowed-media-root", "/no/such/root"], "allowed-media-root"),
        (["--chat-template", "/no/such/template"], "chat-template"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:40],
)
def test_a_wrong_argument_is_named(arguments: list[str], word: str) -> None:
    assert word in failed_start(*arguments)
