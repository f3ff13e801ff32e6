"""What README shows, as it is written there."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from tests.system.server import Server
from vlmrt.tools.demo.evaluate import ask_server, questions, scenery, summary
from vlmrt.tools.demo.tasks import KINDS

README = Path(__file__).parents[2] / "README.md"


def test_the_curl_line_of_the_ready_block_answers(demo_server: Server) -> None:
    line = next(line for line in demo_server.output if "curl " in line)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    answer = ChatCompletion.model_validate_json(done.stdout)
    assert answer.choices[0].message.content == "Red."


def test_the_programs_of_the_readme_run(demo_server: Server, tmp_path: Path) -> None:
    programs = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(programs) >= 2
    for number, program in enumerate(programs):
        script = tmp_path / f"program{number}.py"
        script.write_text(program.replace("http://127.0.0.1:8000", demo_server.url))
        done = subprocess.run(
            [sys.executable, script], capture_output=True, text=True, timeout=120, cwd=README.parent, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def accuracy(server: Server, num_questions: int, stream: bool) -> dict[str, Any]:
    """Held-out questions of every kind, eight at a time, by the openai client."""
    dialogues = questions(num_questions, list(KINDS), scenery(None))
    return summary(asyncio.run(ask_server(f"{server.url}/v1", None, dialogues, 8, stream)))


def test_the_demo_model_is_right_through_the_server(demo_server: Server) -> None:
    report = accuracy(demo_server, 90, stream=True)
    assert report["all"]["percent"] >= 93, report


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_the_demo_model_is_right_on_five_hundred_questions(stream: bool, demo_server: Server) -> None:
    report = accuracy(demo_server, 500, stream)
    print(report)
    assert report["all"]["percent"] >= 95
    assert min(kind["percent"] for kind in report["kinds"].values()) >= 85
    compared = questions(120, ["compare"], scenery(None), seed=7)
    two_images = summary(asyncio.run(ask_server(f"{demo_server.url}/v1", None, compared, 8, stream)))
    print(two_images)
    assert two_images["all"]["percent"] >= 95
