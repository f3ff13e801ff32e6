"""Outlives a killed supervisor just long enough to leave nothing behind.

Run as a script with the standard library's smallest modules only: `python -I -S sweeper.py PIPE_FD RUN_DIR`.  It
waits for the end of the pipe that the supervisor holds open, ends every process that has VLMRT_RUN_DIR=RUN_DIR in its
environment, then the MPS daemon, which has VLMRT_MPS_OF=RUN_DIR there, and removes RUN_DIR.  A process is checked
through its pidfd and killed through it, so a recycled pid is never hit.
"""

import contextlib
import os
import signal
import sys
import time

_SWEEP_S = 5.0
_PAUSE_S = 0.02
_EMPTY_SWEEPS = 3  # a process between fork and exec does not carry the mark yet
_MPS_QUIT_S = 5.0

MPS_CONTROL = "nvidia-cuda-mps-control"
MPS_VARIABLE = "VLMRT_MPS_OF"  # in the environment of the daemon and its servers, which must outlive their clients
MPS_PREFIX = "mps-"  # directories of pipes in RUN_DIR


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
    _kill_all(b"VLMRT_RUN_DIR=" + os.fsencode(run_dir))
    stop_mps(run_dir)
    _remove_tree(run_dir)


def _kill_all(mark: bytes) -> None:
    """Kill whoever carries this mark, until nobody does."""
    deadline = time.monotonic() + _SWEEP_S
    empty = 0
    while empty < _EMPTY_SWEEPS and time.monotonic() < deadline:
        pids = marked_processes(mark)
        empty = 0 if pids else empty + 1
        for pid in pids:
            _kill(pid, mark)
        time.sleep(_PAUSE_S)


def stop_mps(run_dir: str) -> None:
    """End the service's MPS daemon, whose clients are gone: ask it to quit, then kill what is left of it."""
    mark = MPS_VARIABLE.encode() + b"=" + os.fsencode(run_dir)
    if not marked_processes(mark):
        return
    deadline = time.monotonic() + _MPS_QUIT_S
    with contextlib.suppress(OSError):
        for name in os.listdir(run_dir):
            if name.startswith(MPS_PREFIX):
                _ask_to_quit(os.path.join(run_dir, name), deadline)
    while marked_processes(mark) and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)
    _kill_all(mark)


def _ask_to_quit(pipes: str, deadline: float) -> None:
    import subprocess  # only where there was a daemon

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(
            [MPS_CONTROL],
            input=b"quit\n",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "CUDA_MPS_PIPE_DIRECTORY": pipes},
            timeout=max(0.1, deadline - time.monotonic()),
            check=False,
        )


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
