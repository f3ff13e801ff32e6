"""A server whose vision tower runs on another engine than torch."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import pytest

from tests.system.server import Server, launch
from vlmrt.tools.demo.evaluate import ask_server, questions, scenery
from vlmrt.tools.demo.tasks import KINDS

NUM_QUESTIONS = 48


def answers(server: Server) -> list[str]:
    dialogues = questions(NUM_QUESTIONS, [kind for kind in KINDS if kind != "motion"], scenery(None), seed=11)
    results = asyncio.run(ask_server(f"{server.url}/v1", None, dialogues, 8, stream=False))
    return [result.answer for result in results]


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra onnx",
)
def test_the_demo_model_answers_equally_on_onnxruntime(demo_server: Server, run_root: Path, tmp_path: Path) -> None:
    options = ("--vit-engine", "onnxruntime", "--engine-cache", str(tmp_path))
    with launch(*options, run_root=run_root, start_timeout_s=280) as server:
        assert any("exporting the vision tower of checkpoint to ONNX" in line for line in server.output)
        assert any(f"vision     onnxruntime, from {tmp_path}" in line for line in server.output)
        assert answers(server) == answers(demo_server)
        server.wait_until(lambda: server.metrics().get("vlmrt_images_encoded_total", 0) > 0, "images are counted")
    with launch(*options, run_root=run_root) as server:
        assert not any("exporting" in line for line in server.output)
