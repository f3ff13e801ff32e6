"""How long a server takes to refuse each wrong request of tests/system/wrong_requests.py.

    python -m benchmarks.wrong_requests [--repeat 5] [--out FILE] [SERVER OPTIONS]

Prints the slowest first: the best of several tries, from a first byte sent to the last one read, over a connection on
this machine. Exits with 1 where one takes longer than the bound, or has not the status that it should have.
"""

from __future__ import annotations

import argparse
import http.client
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from benchmarks.server import serving
from tests.system.wrong_requests import WRONG, Wrong

BOUND_MS = 300.0
TIMEOUT_S = 60.0


class Refusal(NamedTuple):
    name: str
    status: int
    wanted: int
    best_ms: float
    num_bytes: int  # of the request

    @property
    def fails(self) -> bool:
        return self.status != self.wanted or self.best_ms > BOUND_MS


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.wrong_requests", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for the table")
    options, server_arguments = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as directory, serving(server_arguments, Path(directory) / "log", 300) as server:
        refusals = [refusal(server.url, name, wrong, options.repeat) for name, wrong in WRONG.items()]
    text = table(refusals)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 1 if any(found.fails for found in refusals) else 0


def refusal(url: str, name: str, wrong: Wrong, repeat: int) -> Refusal:
    """The best of so many tries; the status is that of the last."""
    times = []
    for _ in range(repeat):
        status, took_s = post(url, wrong)
        times.append(took_s)
    return Refusal(name, status, wrong.status, 1000 * min(times), len(wrong.content))


def post(url: str, wrong: Wrong) -> tuple[int, float]:
    """(status, seconds).  A server that refuses a body by its headers may hang up before all of it was sent."""
    target, content = urlsplit(url), wrong.content
    connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=TIMEOUT_S)
    headers = {"Content-Type": wrong.content_type} if wrong.content_type else {}
    try:
        connection.connect()
        began_s = time.perf_counter()
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", wrong.route, content, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status, time.perf_counter() - began_s
    finally:
        connection.close()


def table(refusals: Sequence[Refusal]) -> str:
    lines = [f"{'request':44} {'KiB':>9} {'status':>6} {'ms':>9}"]
    for found in sorted(refusals, key=lambda found: -found.best_ms):
        note = f"  not {found.wanted}" if found.status != found.wanted else "  too slow" if found.fails else ""
        size = found.num_bytes / 1024
        lines.append(f"{found.name[:44]:44} {size:9.1f} {found.status:6d} {found.best_ms:9.1f}{note}")
    num_failed = sum(found.fails for found in refusals)
    lines.append(f"{len(refusals)} requests, {num_failed} above {BOUND_MS:g} ms or with another status")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
