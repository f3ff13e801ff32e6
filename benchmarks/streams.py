"""Concurrent streams beside a peer server: aggregate tokens/s, time to first token, time from start to ready.

Both servers get the same checkpoint, the same requests (a generated picture and a question each, fixed output length)
and the same client; they run in turn, A B A B, and medians over the pairs are reported, since machines are noisy.

    python -m benchmarks.streams --peer '/path/to/vllm serve {model} --host 127.0.0.1 --port {port} \\
        --dtype float32 --max-model-len 2048 --max-num-seqs 16 --enforce-eager --served-model-name model'
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from benchmarks.server import free_port
from tests.pictures import encode, noise
from vlmrt.tools import demo

QUESTION = "Describe the image."


class Run(NamedTuple):
    """One load against one server."""

    ready_s: float
    tokens_per_s: float
    ttft_p50_ms: float
    itl_p50_ms: float


def body(index: int, num_tokens: int) -> dict[str, Any]:
    picture = encode(noise(224, 168, index), "PNG", "")
    content = [picture.part, {"type": "text", "text": QUESTION}]
    return {
        "model": "model",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }


async def stream(session: aiohttp.ClientSession, url: str, request: dict[str, Any]) -> tuple[float, list[float]]:
    """Seconds to the first token, and the arrival time of every chunk with text."""
    began = time.perf_counter()
    arrivals = []
    async with session.post(f"{url}/v1/chat/completions", json=request) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                arrivals.append(time.perf_counter())
    return arrivals[0] - began, arrivals


async def load(url: str, num_streams: int, num_rounds: int, num_tokens: int, seed: int) -> tuple[float, float, float]:
    """Tokens/s over all streams, TTFT p50 in s, inter-token p50 in s."""
    firsts: list[float] = []
    gaps: list[float] = []

    async def client(index: int, session: aiohttp.ClientSession) -> None:
        for number in range(num_rounds):
            first, arrivals = await stream(session, url, body(seed + index * num_rounds + number, num_tokens))
            firsts.append(first)
            gaps.extend(b - a for a, b in itertools.pairwise(arrivals))

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(client(index, session) for index in range(num_streams)))
        seconds = time.perf_counter() - began
    tokens = num_streams * num_rounds * num_tokens
    return tokens / seconds, statistics.median(firsts), statistics.median(gaps)


async def ready(url: str, process: subprocess.Popen[bytes], timeout_s: float) -> None:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}")
            try:
                async with session.get(f"{url}/health") as answer:
                    if answer.status == 200:
                        return
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(0.05)
    raise SystemExit(f"not ready in {timeout_s} s")


def measure(command: str, arguments: argparse.Namespace, seed: int) -> Run:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = shlex.split(command.format(model=arguments.model, port=port))
    began = time.perf_counter()
    with Path(arguments.log or os.devnull).open("ab") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
    try:
        asyncio.run(ready(url, process, 600))
        ready_s = time.perf_counter() - began
        asyncio.run(load(url, arguments.streams, 1, 16, seed + 10_000))  # warm-up, other pictures
        tokens_per_s, ttft_s, itl_s = asyncio.run(
            load(url, arguments.streams, arguments.rounds, arguments.tokens, seed)
        )
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
    return Run(ready_s, tokens_per_s, 1e3 * ttft_s, 1e3 * itl_s)


def summary(runs: list[Run]) -> dict[str, float]:
    return {name: round(statistics.median(getattr(run, name) for run in runs), 3) for name in Run._fields}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--ours", default=f"{sys.executable} -m vlmrt.tools.cli launch --model {{model}} --port {{port}}"
    )
    parser.add_argument("--peer", help="command of the peer server with {model} and {port}; default: ours alone")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="requests of one stream, one after the other")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--model", default=str(demo.CHECKPOINT), help="directory of the checkpoint")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--log", help="file for the servers' output")
    arguments = parser.parse_args()
    commands = {"vlmrt": arguments.ours} | ({"peer": arguments.peer} if arguments.peer else {})
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for pair in range(arguments.pairs):
        for name, command in commands.items():
            runs[name].append(measure(command, arguments, seed=1000 * pair))
            print(name, runs[name][-1], flush=True)
    medians = {name: summary(found) for name, found in runs.items()}
    result: dict[str, Any] = {name: {"median": medians[name], "runs": runs[name]} for name in runs}
    if arguments.peer:
        ours, peer = medians["vlmrt"], medians["peer"]
        result["ratio"] = {
            "tokens_per_s": round(ours["tokens_per_s"] / peer["tokens_per_s"], 2),
            "start": round(peer["ready_s"] / ours["ready_s"], 2),
        }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
