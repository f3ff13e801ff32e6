"""The three programs of the DashInfer-VLM notebook, as users wrote them but for the URLs of their pictures."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.clips import make_clip
from tests.system.server import Server, launch

ROOT = Path(__file__).parents[2]

TWO_IMAGES = """
from openai import OpenAI

client = OpenAI(api_key="EMPTY", base_url="http://127.0.0.1:8000/v1")
model = client.models.list().data[0].id

response = client.chat.completions.create(
    model=model,
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Are these images different?"},
                {"type": "image_url", "image_url": {"url": "https://images.example/circle.png"}},
                {"type": "image_url", "image_url": {"url": "https://images.example/square.png"}},
            ],
        }
    ],
    stream=True,
    max_completion_tokens=1024,
    temperature=0.1,
)
for chunk in response:
    print(chunk.choices[0].delta.content, end="", flush=True)
"""

VIDEO = """
from openai import OpenAI

client = OpenAI(api_key="EMPTY", base_url="http://127.0.0.1:8000/v1")

response = client.chat.completions.create(
    model="model",
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Generate a compelling description that I can upload along with the video."},
                {"type": "video_url", "video_url": {"url": "https://images.example/clip.mp4", "fps": 2}},
            ],
        }
    ],
    max_completion_tokens=1024,
    top_p=0.5,
    temperature=0.1,
    frequency_penalty=1.05,
    stream=True,
)
for chunk in response:
    print(chunk.choices[0].delta.content, end="", flush=True)
"""

BENCHMARK = """
import time
from concurrent.futures import ThreadPoolExecutor

from openai import OpenAI

client = OpenAI(api_key="EMPTY", base_url="http://127.0.0.1:8000/v1")


def ask(number):
    response = client.chat.completions.create(
        model="model",
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Describe the image."},
                    {"type": "image_url", "image_url": {"url": "https://images.example/shapes.png"}},
                ],
            }
        ],
        max_completion_tokens=1024,
        temperature=0.1,
    )
    return response.usage.completion_tokens


began = time.time()
with ThreadPoolExecutor(max_workers=10) as executor:
    tokens = list(executor.map(ask, range(100)))
took = time.time() - began
print(f"{len(tokens)} requests, {sum(tokens)} tokens, {len(tokens) / took:.2f} requests/s, {sum(tokens) / took:.2f} tokens/s")
"""  # noqa: E501 - a user's line


class Place(NamedTuple):
    """A server that may fetch media, and where those are."""

    server: Server
    pictures: str


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The pictures of the README and a clip by HTTP from this machine, whose address is allowed."""
    root, files = (tmp_path_factory.mktemp(name, numbered=True) for name in ("r", "files"))
    for picture in (ROOT / "docs").glob("*.png"):
        shutil.copy(picture, files)
    (files / "clip.mp4").write_bytes(make_clip())
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(files))) as pictures:
        thread = threading.Thread(target=pictures.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        address = f"127.0.0.1:{pictures.server_port}"
        try:
            with launch("--allowed-media-domains", address, run_root=root) as server:
                yield Place(server, f"http://{address}")
        finally:
            pictures.shutdown()
            thread.join()


def run(program: str, place: Place, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "program.py"
    script.write_text(
        program.replace("http://127.0.0.1:8000", place.server.url).replace("https://images.example", place.pictures)
    )
    return subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240, check=False)


def test_two_images_are_compared_in_a_stream(place: Place, tmp_path: Path) -> None:
    done = run(TWO_IMAGES, place, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "circle" in done.stdout
    assert "square" in done.stdout


def test_a_video_is_described_in_a_stream(place: Place, tmp_path: Path) -> None:
    done = run(VIDEO, place, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    place.server.wait_until(lambda: place.server.metrics().get("vlmrt_videos_total") == 1, "the clip in the metrics")


@pytest.mark.timeout(300)
def test_a_hundred_requests_of_ten_threads_are_all_answered(place: Place, tmp_path: Path) -> None:
    done = run(BENCHMARK, place, tmp_path)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("100 requests, ")
    # One picture, seen a hundred times, beside the two of the other program; groups of clips are not counted there.
    assert place.server.metrics().get("vlmrt_images_decoded_total", 0) <= 3
