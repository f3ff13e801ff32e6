"""`vlmrt chat` with a real server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.system.server import Server

PICTURE = Path(__file__).parents[2] / "docs" / "shapes.png"


def chat(*words: str, asked: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vlmrt.tools.cli", "chat", *words]
    return subprocess.run(command, input=asked, capture_output=True, text=True, timeout=120)


def test_a_question_about_a_picture_is_answered_as_the_api_answers_it(demo_server: Server) -> None:
    asked = chat("--url", demo_server.url, "--image", str(PICTURE), "--stats", "How many shapes are there?")
    assert (asked.returncode, asked.stdout) == (0, "Three.\n")
    assert " prompt tokens" in asked.stderr
    piped = chat("--url", demo_server.url, asked=f"How many shapes are there? {PICTURE}\n")
    assert (piped.returncode, piped.stdout) == (0, "Three.\n")


def test_what_the_server_refuses_is_said_in_its_words(demo_server: Server, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    asked = chat("--url", demo_server.url, "--image", str(broken), "What is it?")
    assert asked.returncode == 1
    assert asked.stderr.startswith("error: ")
    assert "(status 400)" in asked.stderr
