"""A probe in a process of its own: what it loads may crash or hang, and then that is what was found.

`python -m vlmrt.tools.doctor.child MODULE:FUNCTION [ARGUMENT ...]` writes a JSON list of findings to standard output.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import msgspec

from vlmrt.tools.doctor.findings import Finding, problem

DEADLINE_S = 60.0  # torch alone takes seconds to import from a cold disk
KILLED_S = 10.0
MAX_SHOWN = 300  # characters of what a probe said last

_decode = msgspec.json.Decoder(list[Finding]).decode


def run_probe(
    subject: str, function: str, arguments: Sequence[str] = (), deadline_s: float = DEADLINE_S
) -> list[Finding]:
    """What the probe at "package.module:function" finds; that it dies or does not end is a problem of its subject."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, function, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # what it starts ends with it
    )
    try:
        output, errors = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        return [problem(subject, f"its probe did not end within {deadline_s:g} s", "see what loading it waits for")]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=KILLED_S)
    if process.returncode == 0:
        with contextlib.suppress(msgspec.DecodeError):
            return _decode(output)
    said = errors.decode(errors="replace").strip().splitlines()
    last = f": {said[-1][:MAX_SHOWN]}" if said else ""
    return [problem(subject, f"its probe {_end(process.returncode)}{last}", "reinstall what is named, or vlmrt")]


def _end(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"failed with exit code {code}"


def main(function: str, arguments: Sequence[str]) -> None:
    """Find, and write what was found; a library that prints does so on standard error."""
    sys.stdout.flush()
    result_fd = os.dup(1)
    os.dup2(2, 1)
    module, _, name = function.partition(":")
    findings = getattr(importlib.import_module(module), name)(*arguments)
    with os.fdopen(result_fd, "wb") as result:
        result.write(msgspec.json.encode(findings))
    sys.stdout.flush()
    os._exit(0)  # a library's clean-up must not change what was found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
