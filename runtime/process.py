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
from pathlib import Path
from typing import NoReturn

import msgspec
import uvloop

from vlmrt.runtime.actor import ActorFactory, ActorProcess
from vlmrt.runtime.errors import StartupError, is_device_fault
from vlmrt.runtime.logs import set_up_logging
from vlmrt.runtime.spawner import DEVICE_FAULT, ProcessSpec

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
CRASHED = 70  # exit code after an exception (EX_SOFTWARE)

logger = logging.getLogger(__name__)


def main(spec_path: str) -> NoReturn:
    """Run the actor of this spec to its end.

    The process leaves by `os._exit`: a thread that still loads or computes, or a library's clean-up, must not keep it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the supervisor's Shutdown decides
    spec = msgspec.msgpack.decode(Path(spec_path).read_bytes(), type=ProcessSpec)
    Path(spec_path).unlink()
    _die_with_parent(spec.parent_pid, spec.actor.name)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    set_up_logging(spec.config.log_level, spec.config.log_format, spec.actor.name, spec.epoch)
    listen_socket = None if spec.listen_fd is None else socket.socket(fileno=spec.listen_fd)
    code = CRASHED
    try:
        code = asyncio.Runner(loop_factory=uvloop.new_event_loop).run(_run(spec, listen_socket))
    except BaseException as error:
        logger.exception("epoch %d ends by an exception", spec.epoch)
        if is_device_fault(error):
            code = DEVICE_FAULT
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


async def _run(spec: ProcessSpec, listen_socket: socket.socket | None) -> int:
    return await ActorProcess(spec, load_factory).run(listen_socket)


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


if __name__ == "__main__":
    main(sys.argv[1])
