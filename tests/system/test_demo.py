"""What README shows, as it is written there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from openai.types.chat import ChatCompletion

from tests.system.server import Server

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
