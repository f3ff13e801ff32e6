"""How ViT and ranks share a GPU: under an MPS daemon of our own, or time-sliced where none is to be had.

One daemon serves all GPUs, and every actor on a GPU is its client as soon as one GPU is shared: memory that one process
exports to another wants both under the same daemon.  Pipes and logs are private, in the run directory; settings of the
device stay as they are.  The daemon carries a mark in its environment by which the sweeper ends it, whatever ended the
supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from vlmrt.runtime.config import ParallelOptions
from vlmrt.runtime.errors import StartupError, VlmrtError
from vlmrt.runtime.run_dir import RUN_DIR_VARIABLE
from vlmrt.runtime.sweeper import MPS_CONTROL, MPS_PREFIX, MPS_VARIABLE, stop_mps
from vlmrt.runtime.topology import ActorSpec

DAEMON_S = 10.0  # until the daemon is in the background, or has answered
CLIENT_S = 30.0  # until a first client has its contexts
_MAX_LINE = 200

# What a client does first; then it holds its contexts until its stdin ends.
CLIENT = """
import ctypes, sys
cuda = ctypes.CDLL("libcuda.so.1")
def check(call, status):
    if status != 0:
        print(f"{call} returned CUDA error {status}", flush=True)
        sys.exit(1)
check("cuInit", cuda.cuInit(0))
for ordinal in map(int, sys.argv[1:]):
    device, context = ctypes.c_int(), ctypes.c_void_p()
    check("cuDeviceGet", cuda.cuDeviceGet(ctypes.byref(device), ordinal))
    check("cuDevicePrimaryCtxRetain", cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
print("ready", flush=True)
sys.stdin.read()
"""


class MpsUnavailable(VlmrtError):
    """No MPS on this machine now; the message says why."""


def shared_vits(specs: tuple[ActorSpec, ...]) -> tuple[ActorSpec, ...]:
    """The ViTs on a GPU that a rank uses too."""
    of_ranks = {spec.device for spec in specs if spec.kind == "llm" and spec.device != "cpu"}
    return tuple(spec for spec in specs if spec.kind == "vit" and spec.device in of_ranks)


class GpuSharing:
    """The sharing of one service, from its first actor on a GPU to its last.

    A group of actors enters before it is spawned and leaves when all of it is gone.  After a fault nobody enters until
    all have left and the daemon was started anew.
    """

    def __init__(
        self, options: ParallelOptions, specs: tuple[ActorSpec, ...], run_dir: Path, announce: Callable[[str], None]
    ) -> None:
        """`announce` is told, in one line, how the GPUs are shared: at the start, and when that is done anew."""
        self._options = options
        self._run_dir = run_dir
        self._announce = announce
        self._capped = {spec.name for spec in shared_vits(specs)}
        on_gpu = [spec for spec in specs if spec.device != "cpu"] if self._capped else []
        self._groups = {spec.group for spec in on_gpu}
        self._ordinals = sorted({spec.device.removeprefix("cuda:") for spec in on_gpu}, key=int)
        self._inside: set[str] = set()
        self._settled = asyncio.Event()  # how the GPUs are shared is known
        self._num_daemons = 0
        self._pipes: Path | None = None  # of the daemon in use; None: time slicing
        self._failure: StartupError | None = None
        self._setting_up: asyncio.Task[None] | None = None
        self._is_closed = False

    def start(self) -> None:
        """Begin; who enters waits for it."""
        if self._groups:
            self._set_up()

    async def close(self) -> None:
        """Nobody waits any more.  The daemon is the sweeper's to end, after its clients."""
        self._is_closed = True
        if self._setting_up is not None:
            self._setting_up.cancel()
            await asyncio.gather(self._setting_up, return_exceptions=True)
        self._settled.set()

    async def enter(self, group: str) -> None:
        """Wait until this group may be spawned.  Raises StartupError if MPS was asked for and cannot be had."""
        if group in self._groups:
            await self._settled.wait()
            if self._failure is not None:
                raise self._failure
            self._inside.add(group)

    def leave(self, group: str) -> None:
        """Every process of the group is gone."""
        self._inside.discard(group)
        setting_up = self._setting_up is not None and not self._setting_up.done()
        if not self._inside and not self._settled.is_set() and not setting_up and self._pipes is not None:
            self._set_up()

    def fault(self, group: str) -> frozenset[str]:
        """A CUDA fault ended an actor of this group.  Returns the groups that must end now, for the daemon's sake."""
        if self._pipes is None or group not in self._inside or self._is_closed:
            return frozenset()
        self._settled.clear()
        return frozenset(self._inside)

    def environment(self, spec: ActorSpec) -> Mapping[str, str]:
        """Variables that make an actor a client, with its share of the SMs."""
        if self._pipes is None or spec.group not in self._groups:
            return {}
        share = {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(self._options.vit_sm_percent)}
        return {**_client_variables(self._pipes), **(share if spec.name in self._capped else {})}

    def _set_up(self) -> None:
        self._setting_up = asyncio.get_running_loop().create_task(self._choose(), name="GPU sharing")

    async def _choose(self) -> None:
        is_first, self._pipes = self._pipes is None, None
        try:
            if not is_first:
                await self._stop_daemon()
            self._pipes = await self._start_daemon()
            self._announce(self._mps_line())
        except (MpsUnavailable, OSError) as error:
            await self._stop_daemon()
            if is_first and self._options.gpu_sharing == "mps":
                self._failure = StartupError(f"--gpu-sharing mps: {error}")
            else:
                self._announce(f"time slicing: {error}")
        finally:
            self._settled.set()

    async def _stop_daemon(self) -> None:
        """To its end also when cancelled: no program that it runs outlives the service."""
        stopping = asyncio.create_task(asyncio.to_thread(stop_mps, str(self._run_dir)))
        try:
            await asyncio.shield(stopping)
        finally:
            await stopping

    def _mps_line(self) -> str:
        return f"MPS, {', '.join(sorted(self._capped))} on at most {self._options.vit_sm_percent} % of the SMs"

    async def _start_daemon(self) -> Path:
        """A daemon that a client has tried.  Returns its pipe directory.  Raises MpsUnavailable."""
        if self._options.gpu_sharing == "time-slice":
            raise MpsUnavailable("--gpu-sharing time-slice")
        if shutil.which(MPS_CONTROL) is None:
            raise MpsUnavailable(f"{MPS_CONTROL} is not installed")
        self._num_daemons += 1
        pipes = self._run_dir / f"{MPS_PREFIX}{self._num_daemons}"
        pipes.mkdir(mode=0o700)
        await self._control(pipes, "-d")
        async with self._client(pipes):
            if not (await self._control(pipes, command="get_server_list\n")).split():
                raise MpsUnavailable(f"{MPS_CONTROL} has no server for a client that has started")
        return pipes

    async def _control(self, pipes: Path, *arguments: str, command: str = "") -> str:
        """Run the control program: with -d it becomes the daemon, with a command it prints the daemon's answer."""
        environment = {**_without_marks(), **_directories(pipes), MPS_VARIABLE: str(self._run_dir)}
        answer = asyncio.subprocess.PIPE if command else asyncio.subprocess.DEVNULL  # a daemon would hold a pipe open
        process = await asyncio.create_subprocess_exec(
            MPS_CONTROL,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=answer,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment,
            process_group=0,
        )
        what = f"{MPS_CONTROL} {' '.join(arguments) or command.strip()}"
        try:
            async with asyncio.timeout(DAEMON_S):
                said, _ = await process.communicate(command.encode())
        except TimeoutError:
            raise MpsUnavailable(f"{what} did not return within {DAEMON_S:g} s") from None
        finally:
            await _end(process)
        if process.returncode != 0:
            raise MpsUnavailable(f"{what} failed (exit code {process.returncode}){_last_line(pipes / 'control.log')}")
        return said.decode(errors="replace") if said else ""

    @asynccontextmanager
    async def _client(self, pipes: Path) -> AsyncIterator[None]:
        """A small process with a context on every GPU in use.  Raises MpsUnavailable if it does not get them."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            "-c",
            CLIENT,
            *self._ordinals,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**_without_marks(), **_client_variables(pipes), RUN_DIR_VARIABLE: str(self._run_dir)},
            process_group=0,
        )
        try:
            assert process.stdout is not None
            try:
                async with asyncio.timeout(CLIENT_S):
                    said = (await process.stdout.readline()).decode(errors="replace").strip()
            except TimeoutError:
                raise MpsUnavailable(f"a first client was not ready within {CLIENT_S:g} s") from None
            if said != "ready":
                raise MpsUnavailable(f"a first client failed: {said[:_MAX_LINE] or 'it said nothing'}")
            yield
        finally:
            await _end(process)


def _directories(pipes: Path) -> dict[str, str]:
    return {"CUDA_MPS_PIPE_DIRECTORY": str(pipes), "CUDA_MPS_LOG_DIRECTORY": str(pipes)}


def _client_variables(pipes: Path) -> dict[str, str]:
    """A client counts among the devices that the daemon sees, which got the variable as it was set for us."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not visible:
        return _directories(pipes)
    return {**_directories(pipes), "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(len(visible.split(",")))))}


def _without_marks() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in (RUN_DIR_VARIABLE, MPS_VARIABLE)}


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    await process.wait()


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:
        return ""
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {last[-_MAX_LINE:]}" if last else ""
