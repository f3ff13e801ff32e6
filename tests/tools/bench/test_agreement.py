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

NUM_REQUESTS = 96
NUM_TOKENS = 32
TTFT_MS, ITL_MS = 600.0, 60.0
STATISTICS = ("mean", "median", "p90", "p99")
FIGURES = [f"{statistic}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for statistic in STATISTICS]
WITHIN = 0.05
NUM_TRIES = 3


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A scripted server in a process of its own."""
    options = ["--ttft-ms", str(TTFT_MS), "--itl-ms", str(ITL_MS)]
    command = [sys.executable, "-m", "tests.tools.bench.scripted_server", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


def measured(url: str, traffic: tuple[str, str], out: Path) -> tuple[dict[str, float], dict[str, float]]:
    """(what the server did, what the client says of it)"""
    options = ["--num-prompts", str(NUM_REQUESTS), "--output-len", str(NUM_TOKENS), "--num-warmups", "0"]
    assert main(["bench", "serve", "--base-url", url, *options, "--output", str(out), *traffic]) == 0
    with urllib.request.urlopen(f"{url}/truth?last={NUM_REQUESTS}", timeout=30) as answer:
        return json.load(answer), json.loads(out.read_text())


@pytest.mark.soak
@pytest.mark.parametrize(
    "traffic", [("--max-concurrency", "8"), ("--request-rate", "3")], ids=["closed loop", "open loop"]
)
def test_every_latency_is_within_5_percent_of_the_truth(url: str, traffic: tuple[str, str], tmp_path: Path) -> None:
    for _ in range(NUM_TRIES):
        truth, seen = measured(url, traffic, tmp_path / "result.json")
        if truth["p99_itl_ms"] < 1.6 * ITL_MS:  # 1.5 by its script; more, and the machine held it up
            break
    else:
        pytest.fail("the machine is too busy to time anything: the server itself did not keep to its times")
    print({name: (truth[name], seen[name]) for name in FIGURES})
    for name in FIGURES:
        assert seen[name] == pytest.approx(truth[name], rel=WITHIN), name
    assert seen["output_throughput"] == pytest.approx(NUM_TOKENS * seen["request_throughput"])
    if "--request-rate" in traffic:
        sending_s = (NUM_REQUESTS - 1) / 3
        assert sending_s < seen["duration"] < sending_s + 2 * truth["p99_e2el_ms"] / 1e3
