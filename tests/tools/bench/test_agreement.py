"""Timed, so left to `make soak`: what the client says beside what a server really did."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlmrt.tools.cli import main

NUM_REQUESTS = 120
FIGURES = [
    f"{statistic}_{name}_ms"
    for name in ("ttft", "tpot", "itl", "e2el")
    for statistic in ("mean", "median", "p90", "p99")
]
WITHIN = 0.05


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A scripted server in a process of its own."""
    command = [sys.executable, "-m", "tests.tools.bench.scripted_server", "--ttft-ms", "200", "--itl-ms", "20"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


@pytest.mark.soak
@pytest.mark.parametrize(
    "traffic", [("--max-concurrency", "8"), ("--request-rate", "6")], ids=["closed loop", "open loop"]
)
def test_every_latency_is_within_5_percent_of_the_truth(url: str, traffic: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    options = ["--num-prompts", str(NUM_REQUESTS), "--output-len", "64", "--num-warmups", "0", "--output", str(out)]
    assert main(["bench", "serve", "--base-url", url, *options, *traffic]) == 0
    seen = json.loads(out.read_text())
    with urllib.request.urlopen(f"{url}/truth?last={NUM_REQUESTS}", timeout=30) as answer:
        truth = json.load(answer)
    print({name: (truth[name], seen[name]) for name in FIGURES})
    for name in FIGURES:
        assert seen[name] == pytest.approx(truth[name], rel=WITHIN), name
    assert seen["output_throughput"] == pytest.approx(64 * seen["request_throughput"])
    if "--request-rate" in traffic:
        assert seen["request_throughput"] == pytest.approx(6.0, rel=0.15)  # the tail of the last answers included
