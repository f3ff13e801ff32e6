"""Wrong input gets a clear 4xx or a one-line start-up error; every actor lives on and nothing leaks."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.pictures import encode, noise
from tests.system.server import Server, command
from vlmrt.tools import demo
from vlmrt.tools.checkpoint import make_checkpoint

QUESTION = {"type": "text", "text": "What is in the image?"}


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims this size and has next to no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def about(url: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, QUESTION]}]}


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hello"}], **fields}


GOOD_PNG = encode(noise(60, 60, 1), "PNG", "good").data
GOOD_JPEG = encode(noise(300, 200, 1), "JPEG", "good").data
ONE_PIXEL = encode(noise(1, 1, 1), "PNG", "one").data

WRONG: dict[str, dict[str, Any]] = {
    "broken png": about(data_url(GOOD_PNG[: len(GOOD_PNG) // 2])),
    "broken jpeg": about(data_url(GOOD_JPEG[: len(GOOD_JPEG) // 3], "image/jpeg")),
    "flipped bytes": about(data_url(GOOD_PNG[:60] + bytes(200) + GOOD_PNG[260:])),
    "not an image": about(data_url(b"hello, this is text", "image/png")),
    "empty image": about(data_url(b"")),
    "svg": about(data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml")),
    "huge header dimensions": about(data_url(png_header(100_000, 100_000))),
    "bomb in one direction": about(data_url(png_header(2_000_000_000, 1))),
    "zero width": about(data_url(png_header(0, 10))),
    "1x20000": about(data_url(png_header(1, 20_000))),
    "20000x1": about(data_url(png_header(20_000, 1))),
    "header without pixels": about(data_url(png_header(50, 50))),
    "wrong base64": about("data:image/png;base64,@@@@"),
    "data url without base64": about("data:image/png,abc"),
    "data url without comma": about("data:image/png;base64"),
    "empty url": about(""),
    "url is null": about(None),
    "url is a number": about(7),
    "unknown scheme": about("ftp://example.org/a.png"),
    "fetching is off": about("http://example.org/a.png"),
    "private address": about("http://10.0.0.1/a.png"),
    "loopback address": about("http://127.0.0.1:1/a.png"),
    "link-local address": about("http://169.254.169.254/latest/meta-data"),
    "file outside the root": about("file:///etc/passwd"),
    "file with dots": about("file:///tmp/../etc/passwd"),
    "unknown model": chat(model="gpt-nothing"),
    "model is a number": chat(model=5),
    "no messages": {},
    "messages empty": {"messages": []},
    "messages is a string": {"messages": "Hello"},
    "message without role": {"messages": [{"content": "Hello"}]},
    "unknown role": {"messages": [{"role": "wizard", "content": "Hello"}]},
    "unknown part type": {"messages": [{"role": "user", "content": [{"type": "smell", "smell": "rose"}]}]},
    "audio part": {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
    "video part": {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}]},
    "part without its field": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    "content is a number": {"messages": [{"role": "user", "content": 3}]},
    "too long": {"messages": [{"role": "user", "content": "red circle " * 20_000}]},
    "too many images": {
        "messages": [{"role": "user", "content": [about(data_url(GOOD_PNG))["messages"][0]["content"][0]] * 65}]
    },
    "negative temperature": chat(temperature=-1),
    "temperature 3": chat(temperature=3),
    "temperature is a string": chat(temperature="hot"),
    "top_p 0": chat(top_p=0),
    "top_p 2": chat(top_p=2),
    "top_k -5": chat(top_k=-5),
    "max_tokens 0": chat(max_tokens=0),
    "max_tokens negative": chat(max_tokens=-3),
    "max_completion_tokens a float": chat(max_completion_tokens=1.5),
    "frequency_penalty 5": chat(frequency_penalty=5),
    "presence_penalty -5": chat(presence_penalty=-5),
    "repetition_penalty 0": chat(repetition_penalty=0),
    "stop with 100 strings": chat(stop=["x"] * 100),
    "stop is a number": chat(stop=4),
    "seed is a string": chat(seed="luck"),
    "seed beyond int64": chat(seed=2**70),
    "n 0": chat(n=0),
    "stream is a string": chat(stream="yes"),
    "stream_options is a list": chat(stream=True, stream_options=[]),
    "logprobs is a number": chat(logprobs=3),
    "response_format unknown": chat(response_format={"type": "poem"}),
    "tools not a list": chat(tools="hammer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_refused_clearly(name: str, demo_server: Server) -> None:
    body = {"model": "model", **WRONG[name]}
    answer = httpx.post(f"{demo_server.url}/v1/chat/completions", json=body, timeout=30)
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert 10 < len(error["message"]) < 500
    assert "Traceback" not in error["message"]


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b"{", "application/json", 400),
        (b"", "application/json", 400),
        (b"[1, 2]", "application/json", 400),
        (b'{"messages": ' + b"[" * 100_000, "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"messages=hello", "application/x-www-form-urlencoded", 415),
        (b'{"pad": "' + b"x" * (65 << 20) + b'"}', "application/json", 413),
    ],
    ids=["cut", "empty", "a list", "deep", "not utf-8", "a form", "too large"],
)
def test_a_wrong_body_is_refused_clearly(content: bytes, content_type: str, status: int, demo_server: Server) -> None:
    answer = httpx.post(
        f"{demo_server.url}/v1/chat/completions", content=content, headers={"content-type": content_type}, timeout=30
    )
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_picture_of_one_pixel_is_answered(demo_server: Server) -> None:
    answer = httpx.post(
        f"{demo_server.url}/v1/chat/completions", json={"model": "model", **about(data_url(ONE_PIXEL))}, timeout=30
    )
    assert answer.status_code == 200, answer.text


def test_all_actors_outlive_every_wrong_request(demo_server: Server) -> None:
    before = {actor.name: actor.process.pid for actor in demo_server.actors()}
    for body in WRONG.values():
        httpx.post(f"{demo_server.url}/v1/chat/completions", json={"model": "model", **body}, timeout=30)
    assert {actor.name: actor.process.pid for actor in demo_server.actors()} == before
    assert demo_server.metrics()["vlmrt_requests_running"] == 0
    assert demo_server.chat("Hello", max_tokens=8).choices[0].message.content


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
