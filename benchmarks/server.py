"""A vlmrt server as a child process, the checkpoint it serves, and how long it took to answer."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

POLL_S = 0.02
STOP_S = 30.0
SHOWN_LINES = 30
READ_BYTES = 16 << 20


class Running(NamedTuple):
    """A server that has answered once."""

    url: str
    ready_s: float  # after the process was started
    first_answer_s: float


def make_checkpoint(directory: Path, preset: str, device: str) -> None:
    """A random-weight checkpoint in a directory that does not exist yet; complete, or not there at all."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "vlmrt.tools.checkpoint", str(partial), "--preset", preset, "--device", device]
    subprocess.run(command, check=True)
    partial.rename(directory)


def warm_file_cache(directory: Path) -> None:
    """Read every file once, so that the start is not the disk's."""

    def read(file: Path) -> None:
        buffer = bytearray(READ_BYTES)
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    with ThreadPoolExecutor(4) as readers:
        list(readers.map(read, (file for file in directory.iterdir() if file.is_file())))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(arguments: Sequence[str], log: Path, timeout_s: float) -> Iterator[Running]:
    """`vlmrt launch` with these arguments, from its start to its first answer; ended afterwards.

    Raises: RuntimeError with the end of its output if it does not get there.
    """
    port = free_port()
    command = [sys.executable, "-m", "vlmrt.tools.cli", "launch", "--port", str(port), *arguments]
    with log.open("wb") as output:
        began_s = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_until_ready(process, port, began_s + timeout_s, log)
        ready_s = time.monotonic() - began_s
        answer_once(port)
        yield Running(f"http://127.0.0.1:{port}", ready_s, time.monotonic() - began_s)
    finally:
        end(process)


def wait_until_ready(process: subprocess.Popen[bytes], port: int, deadline_s: float, log: Path) -> None:
    while not is_ready(port):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}:\n{last_lines(log)}")
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"the server was not ready in time:\n{last_lines(log)}")
        time.sleep(POLL_S)


def is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def answer_once(port: int) -> None:
    body = {"model": "model", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"the first answer was {answer.status}: {text[: SHOWN_LINES * 10].decode()}")
    finally:
        connection.close()


def end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_S)


def last_lines(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LINES:])


def stages(log: Path) -> list[str]:
    """What the server said of its start: which process was up when."""
    return [line.strip() for line in log.read_text(errors="replace").splitlines() if " is up after " in line]
