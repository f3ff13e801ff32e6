"""At which token rate one client process of `vlmrt bench` is busy for all of a core.

    python -m benchmarks.bench_client

A server in a process of its own (paced_server.py) streams to one client process, every token in a chunk of its own. The
CPU time of the client for each token does not depend on what else the machine does; the gaps that the client saw stand
beside those that the server made.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence

from vlmrt.tools.bench.asks import Ask, Target
from vlmrt.tools.bench.pool import ClientPool
from vlmrt.tools.bench.replies import Load
from vlmrt.tools.bench.summary import summary

ITL_MS = 20.0


@contextlib.contextmanager
def paced_server(num_tokens: int) -> Iterator[str]:
    """Its URL."""
    command = [sys.executable, "-m", "benchmarks.paced_server", "--itl-ms", str(ITL_MS), "--tokens", str(num_tokens)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def row(url: str, num_streams: int, num_tokens: int) -> list[str]:
    """One line of the table."""
    with ClientPool(Target(url), num_processes=1) as pool:
        replies = pool.play(Load(tuple((Ask(f"stream {index}", num_tokens),) for index in range(num_streams))))
    if replies.errors:
        raise RuntimeError(replies.errors[0])
    seen = summary(replies, {}, (99.0,))
    with urllib.request.urlopen(f"{url}/truth", timeout=60) as answer:
        made = json.load(answer)
    us_per_token = 1e6 * replies.client_cpu / seen["output_throughput"]
    return [
        f"{num_streams}",
        f"{seen['output_throughput']:,.0f}",
        f"{replies.client_cpu:.0%}",
        f"{us_per_token:.0f}",
        f"{1e6 / us_per_token:,.0f}",
        f"{made['median_itl_ms']:.2f} / {seen['median_itl_ms']:.2f}",
        f"{made['p99_itl_ms']:.2f} / {seen['p99_itl_ms']:.2f}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_client")
    streams = [10, 50, 100, 200, 400, 800]
    parser.add_argument("--streams", type=int, nargs="+", default=streams, help="at once, 50 tokens/s each")
    parser.add_argument("--tokens", type=int, default=400, help="of each stream")
    options = parser.parse_args(argv)
    print(f"Python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores, {platform.platform()}")
    head = "streams, tokens/s, of a core, us of CPU per token, tokens/s of a whole core"
    head += ", median ITL made / seen (ms), p99 ITL made / seen (ms)"
    print(f"| {' | '.join(head.split(', '))} |\n|{'---|' * 7}")
    for num_streams in options.streams:
        with paced_server(options.tokens) as url:
            print(f"| {' | '.join(row(url, num_streams, options.tokens))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
