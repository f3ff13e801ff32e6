"""Outlives a killed supervisor just long enough to leave nothing behind.

Run as a script with the standard library's smallest modules only: `python -I -S sweeper.py PIPE_FD RUN_DIR`.  It
waits for the end of the pipe that the supervisor holds open, ends every process that has VLMRT_RUN_DIR=RUN_DIR in its
environment, and removes RUN_DIR.  A process is checked through its pidfd and killed through it, so a recycled pid is
never hit.
"""

import contextlib
import os
import signal
import sys
import time

_SWEEP_S = 5.0
_PAUSE_S = 0.02
_EMPTY_SWEEPS = 3  # a process between fork and exec does not carry the mark yet


def marked_processes(mark: bytes) -> list[int]:
    """Pids of the live processes whose environment holds this entry."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and _is_marked(int(entry), mark)]


def _is_marked(pid: int, mark: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as environ:
            return mark in environ.read().split(b"\0")
    except OSError:
        return False


def _kill(pid: int, mark: bytes) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if _is_marked(pid, mark):  # asked again: the descriptor now pins which process the pid means
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except OSError:
        pass
    finally:
        os.close(pidfd)


def sweep(run_dir: str) -> None:
    """End the service's processes and remove its directory."""
    mark = b"VLMRT_RUN_DIR=" + os.fsencode(run_dir)
    deadline = time.monotonic() + _SWEEP_S
    empty = 0
    while empty < _EMPTY_SWEEPS and time.monotonic() < deadline:
        pids = marked_processes(mark)
        empty = 0 if pids else empty + 1
        for pid in pids:
            _kill(pid, mark)
        time.sleep(_PAUSE_S)
    _remove_tree(run_dir)


def _remove_tree(path: str) -> None:
    try:
        entries = list(os.scandir(path))
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            _remove_tree(entry.path)
        else:
            with contextlib.suppress(OSError):
                os.unlink(entry.path)
    with contextlib.suppress(OSError):
        os.rmdir(path)


def main(pipe_fd: int, run_dir: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    while True:
        if not os.read(pipe_fd, 64):
            break
    sweep(run_dir)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
