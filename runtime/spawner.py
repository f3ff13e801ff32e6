"""How a process starts, and nothing else knows: the Spawner interface and the one for this machine."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import msgspec

from vlmrt.runtime.config import Config
from vlmrt.runtime.messages import Epoch
from vlmrt.runtime.run_dir import RUN_DIR_VARIABLE
from vlmrt.runtime.topology import ActorSpec, thread_environment
from vlmrt.runtime.transport import actor_stem

START_FAILED = 78  # exit code of an actor that sent StartFailed (EX_CONFIG)
DEVICE_FAULT = 76  # exit code after an error of the CUDA driver: the device's state is lost


class ProcessSpec(msgspec.Struct, frozen=True):
    """All that one incarnation of an actor is told before its first words."""

    actor: ActorSpec
    epoch: Epoch
    config: Config
    run_dir: str
    control_address: str
    inbox_address: str
    memory_path: str  # socket of the descriptor server
    parent_pid: int
    lifeline_fd: int  # a pipe: its end is the supervisor's end
    listen_fd: int | None = None  # bound and listening; only edges
    environment: dict[str, str] = {}  # beside what every actor gets


class ProcessHandle(Protocol):
    pid: int

    def kill(self) -> None:
        """SIGKILL; nothing if it has ended."""
        ...

    async def wait(self) -> int:
        """Reap it.  Exit code, or minus the signal's number."""
        ...


class Spawner(Protocol):
    def spawn(self, spec: ProcessSpec) -> ProcessHandle: ...


class LocalSpawner:
    """Child processes on this machine, each in a process group of its own: a Ctrl-C reaches the supervisor only."""

    def spawn(self, spec: ProcessSpec) -> ProcessHandle:
        spec_path = Path(spec.run_dir) / f"{actor_stem(spec.actor.name)}.{spec.epoch}.spec"
        spec_path.write_bytes(msgspec.msgpack.encode(spec))
        inherited = (spec.lifeline_fd,) if spec.listen_fd is None else (spec.lifeline_fd, spec.listen_fd)
        process = subprocess.Popen(
            [sys.executable, "-m", "vlmrt.runtime.process", str(spec_path)],
            stdin=subprocess.DEVNULL,
            pass_fds=inherited,
            env={**os.environ, **thread_environment(spec.actor), **spec.environment, RUN_DIR_VARIABLE: spec.run_dir},
            process_group=0,
        )
        return LocalProcess(process)


class LocalProcess:
    """Waited for through its pidfd: no signal handler, no thread."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid = process.pid
        self._process = process
        self._ended = asyncio.Event()
        try:
            self._pidfd = os.pidfd_open(process.pid)
        except OSError:  # out of descriptors: nobody would learn of its end
            process.kill()
            process.wait()
            raise
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_end)

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.wait()  # it has ended: this only reaps it
        self._ended.set()

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGKILL)

    async def wait(self) -> int:
        await self._ended.wait()
        return self._process.returncode
