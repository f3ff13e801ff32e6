"""Child entry point, `python -m vlmrt.runtime.process SPEC_FILE`: die with the parent, run one actor."""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import importlib
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import msgspec
import uvloop

from vlmrt.runtime.actor import ActorFactory, ActorProcess
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.spawner import ProcessSpec

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_EXIT_S = 3.0  # for threads that still load or compute; then the process ends anyway

logger = logging.getLogger(__name__)


def main(spec_path: str) -> int:
    """Run the actor of this spec to its end.  Returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the supervisor's Shutdown decides
    spec = msgspec.msgpack.decode(Path(spec_path).read_bytes(), type=ProcessSpec)
    _die_with_parent(spec.parent_pid, spec.actor.name)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    _set_up_logging(spec)
    listen_socket = None if spec.listen_fd is None else socket.socket(fileno=spec.listen_fd)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_run(spec, listen_socket))
    except BaseException:
        logger.exception("%s epoch %d ends by an exception", spec.actor.name, spec.epoch)
        return 70


async def _run(spec: ProcessSpec, listen_socket: socket.socket | None) -> int:
    try:
        return await ActorProcess(spec, load_factory).run(listen_socket)
    finally:
        _end_soon()


def load_factory(path: str) -> ActorFactory:
    """The class or function at "package.module:name"."""
    module, _, name = path.partition(":")
    factory: ActorFactory = getattr(importlib.import_module(module), name)
    return factory


def _die_with_parent(parent_pid: int, name: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise StartupError(f"prctl(PR_SET_PDEATHSIG) failed: errno {ctypes.get_errno()}")
    if os.getppid() != parent_pid:
        sys.exit(0)  # it died before the line above
    libc.prctl(_PR_SET_NAME, f"vlmrt {name}".encode()[:15], 0, 0, 0)


def _set_up_logging(spec: ProcessSpec) -> None:
    logging.basicConfig(
        level=spec.config.log_level.upper(),
        format=f"%(asctime)s %(levelname)s {spec.actor.name}: %(message)s",
    )


def _end_soon() -> None:
    """The event loop is done; a thread that is stuck in a library must not keep the process."""
    timer = threading.Timer(_EXIT_S, os._exit, (75,))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
