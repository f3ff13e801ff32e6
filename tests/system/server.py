"""A real server as a child process: what a user starts, with what a test needs to look at it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx
import openai
import psutil
from prometheus_client.parser import text_string_to_metric_families

Result = TypeVar("Result")

READY = re.compile(r"http://[\w.:\[\]]+:(\d+)")
SHARED_MEMORY = Path("/dev/shm")
SETTLED_S = 2.5  # longer than an actor takes to tell its figures, and the edge to show them


class ActorProcess(NamedTuple):
    name: str
    process: psutil.Process


class Server:
    """`vlmrt launch` with these arguments, ready to answer."""

    def __init__(self, process: subprocess.Popen[str], port: int, output: list[str]) -> None:
        self.process = process
        self.port = port
        self.output = output
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)
        # a connection for every request, but not a TLS context, which takes longer than most of them
        self.http = httpx.Client(base_url=self.url, timeout=120, limits=httpx.Limits(max_keepalive_connections=0))

    def chat(self, content: str | list[dict[str, Any]], **fields: Any) -> Any:
        """One chat completion about this user message; a ChatCompletion, or with stream=True a stream of chunks."""
        create: Any = self.client.chat.completions.create
        return create(model="model", messages=[{"role": "user", "content": content}], **fields)

    def actors(self) -> list[ActorProcess]:
        """The live actor processes, by the name in their command line."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                match = re.search(r"((?:edge|media|scheduler|vit|llm)[:-]\d+)", " ".join(child.cmdline()))
            except psutil.Error:
                continue
            if match is not None and child.status() != psutil.STATUS_ZOMBIE:
                found.append(ActorProcess(match.group(1).replace("-", ":"), child))
        return found

    def pid(self, name: str) -> int:
        pid: int = next(actor.process.pid for actor in self.actors() if actor.name == name)
        return pid

    def metrics(self) -> dict[str, float]:
        """Sums over labels and actors, by metric name."""
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(self.http.get("/metrics", timeout=5).text):
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        return totals

    def healthy(self) -> bool:
        try:
            return self.http.get("/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def wait_until(
        self, condition: Callable[[], bool], what: str, deadline_s: float = 60.0, every_s: float = 0.02
    ) -> float:
        """Seconds waited.  Fails the test with the server's output if the condition does not come true."""
        began = time.monotonic()
        while not condition():
            waited = time.monotonic() - began
            assert self.process.poll() is None, f"the server ended: {''.join(self.output)}"
            assert waited < deadline_s, f"{what} did not come true in {deadline_s} s: {''.join(self.output)}"
            time.sleep(every_s)
        return time.monotonic() - began

    def counted(self, names: Sequence[str]) -> dict[str, float]:
        """Figures, once nothing is added to them any more: an actor tells its own with its heartbeat."""
        last: dict[str, float] = {}
        unchanged_since_s = 0.0

        def settled() -> bool:
            nonlocal last, unchanged_since_s
            found = self.metrics()
            figures = {name: found.get(name, 0) for name in names}
            if figures != last:
                last, unchanged_since_s = figures, time.monotonic()
            return time.monotonic() - unchanged_since_s > SETTLED_S

        self.wait_until(settled, "the end of all work", every_s=0.1)
        return last

    def at_once(self, asks: Sequence[Callable[[], Result]]) -> list[Result]:
        """What these requests give, all of which the scheduler has before the first gets a token.

        The language model's process stands still meanwhile, for far less than a supervisor waits for a sign of life.
        """

        def all_there() -> bool:
            figures = self.metrics()
            return figures.get("vlmrt_requests_running", 0) + figures.get("vlmrt_requests_waiting", 0) >= len(asks)

        rank = psutil.Process(self.pid("llm:0"))
        with ThreadPoolExecutor(len(asks)) as pool:
            rank.suspend()
            try:
                futures = [pool.submit(ask) for ask in asks]
                self.wait_until(all_there, "all requests at the scheduler", deadline_s=20.0)
            finally:
                rank.resume()
            return [future.result() for future in futures]

    def wait_until_restarted(self, name: str, old_pid: int) -> float:
        """Until a new process of that name runs and the service is healthy again."""

        def restarted() -> bool:
            pids = [actor.process.pid for actor in self.actors() if actor.name == name]
            return bool(pids) and old_pid not in pids and self.healthy()

        return self.wait_until(restarted, f"{name} back")


def descendants(pid: int) -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
    return found


def left_over(processes: list[psutil.Process], deadline_s: float = 15.0) -> list[psutil.Process]:
    """Those still alive after the deadline."""
    _, alive = psutil.wait_procs(processes, timeout=deadline_s)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vlmrt.tools.cli", "launch", "--port", "0", *arguments]


@contextmanager
def launch(*arguments: str, run_root: Path, start_timeout_s: float = 120.0) -> Iterator[Server]:
    """Start, wait for the ready block, hand over, end with SIGTERM; then nothing may be left."""
    environment = {
        **os.environ,
        "TMPDIR": str(run_root),
        "XDG_RUNTIME_DIR": "",
        "PYTHONUNBUFFERED": "1",
        "VLMRT_CONFIG": "none",
    }
    shared_before = set(SHARED_MEMORY.iterdir())
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    output: list[str] = []
    port: list[int] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            match = READY.search(line)
            if match is not None and not port:
                port.append(int(match.group(1)))
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    children: list[psutil.Process] = []
    try:
        assert ready.wait(start_timeout_s), f"not ready in {start_timeout_s} s: {''.join(output)}"
        assert port, f"the server ended before it was ready: {''.join(output)}"
        yield Server(process, port[0], output)
        if process.poll() is None:
            children = descendants(process.pid)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, "".join(output)
    finally:
        if process.poll() is None:
            children = descendants(process.pid)
            process.kill()
            process.wait(10)
        assert not left_over(children), "".join(output)
        reader.join(10)
        if process.stdout is not None:
            process.stdout.close()
    assert set(SHARED_MEMORY.iterdir()) <= shared_before
    assert list(run_root.iterdir()) == [], f"left in the run directory: {list(run_root.iterdir())}"
