"""Probes that do what a library might."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from vlmrt.tools.doctor.findings import Finding, ok


def well(*words: str) -> list[Finding]:
    print("what a library prints")
    os.system("echo what a library in C prints")
    return [ok("subject", " ".join(words))]


def crash() -> list[Finding]:
    print("deep in C", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    signal.pause()
    return []


def fail() -> list[Finding]:
    raise ImportError("libcudart.so.12: no such file")


def leave() -> list[Finding]:
    os._exit(0)


def hang(pid_file: str) -> list[Finding]:
    """With a child of its own, that must not stay either."""
    child = subprocess.Popen(["sleep", "3600"])
    with open(pid_file, "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    signal.pause()
    return []
