"""Checks of this machine that load nothing foreign: Python, packages, CPU, memory, files, ports, disks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from vlmrt.actors.vit.engines.engine_files import default_cache
from vlmrt.runtime.config import ServerOptions
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.host_memory import available_gib
from vlmrt.runtime.listener import bind_http
from vlmrt.runtime.run_dir import RunDir
from vlmrt.tools.doctor.findings import Finding, ok, problem, warning

OLDEST, NEWEST = (3, 11), (3, 13)
MAX_FILES = 65536
MIN_FILES = 4096  # a server with 1000 clients holds some more than 1000
MIN_MEMORY_GIB = 4.0  # the demo model on a CPU takes some 2
MIN_SHM_MIB = 256  # NCCL's buffers of a few ranks
MIN_DISK_GIB = 20.0  # a model of 7 billion parameters in 16 bits has 17
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
GIB = 1 << 30


def python() -> Iterator[Finding]:
    version = sys.version_info[:2]
    text = f"{platform.python_version()} ({sys.executable})"
    if version < OLDEST:
        yield problem("Python", text, f"use Python {_dotted(OLDEST)} to {_dotted(NEWEST)}")
    elif version > NEWEST:
        yield warning(
            "Python", f"{text}: newer than what is tested", f"use Python {_dotted(OLDEST)} to {_dotted(NEWEST)}"
        )
    else:
        yield ok("Python", text)
    if sys.platform != "linux":
        yield problem(
            "system", f"{platform.system()}: processes are tied by what only Linux has", "use Linux, or WSL 2"
        )
    else:
        yield ok("system", f"{platform.system()} {platform.release()} on {platform.machine()}")


def packages() -> Iterator[Finding]:
    """What pip was to install, and did."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("vlmrt") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield warning("packages", "vlmrt is not installed, only imported", "pip install . in its directory")
        return
    wrong = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        yield problem("packages", "; ".join(wrong), "pip install --upgrade vlmrt")
    else:
        yield ok("packages", "all that vlmrt requires are installed")


def processor() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    text = f"{cores} cores for this process"
    if cores < 2:
        yield warning("CPU", f"{cores} core: decoding, tokenizing and scheduling share it", "give it 4 cores or more")
    else:
        yield ok("CPU", text)


def memory(cgroup_limit: Path = CGROUP_LIMIT) -> Iterator[Finding]:
    available = available_gib()
    limit = _limit_gib(cgroup_limit)
    text = f"{available:.1f} GiB available" + ("" if limit is None else f"; this container may take {limit:.1f}")
    least = available if limit is None else min(available, limit)
    if least < MIN_MEMORY_GIB:
        yield warning(
            "memory", text, f"{MIN_MEMORY_GIB:g} GiB or more; --kv-cache-gib bounds what a server takes on a CPU"
        )
    else:
        yield ok("memory", text)


def _limit_gib(file: Path) -> float | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) / GIB if text.isdigit() else None


def shared_memory(directory: Path = Path("/dev/shm")) -> Iterator[Finding]:
    try:
        os.close(os.memfd_create("vlmrt-doctor", os.MFD_CLOEXEC))
    except (OSError, AttributeError) as error:
        yield problem("memfd", f"cannot be created: {error}", "allow memfd_create: pixels and embeddings lie there")
    if not directory.is_dir() or not os.access(directory, os.W_OK):
        yield warning(
            str(directory), "is not there or not writable", "mount it, for --tp over 1: docker run --shm-size 1g"
        )
        return
    free_mib = shutil.disk_usage(directory).free >> 20
    if free_mib < MIN_SHM_MIB:
        remedy = "docker run --shm-size 1g, or --ipc host; only --tp over 1 needs it"
        yield warning(str(directory), f"{free_mib} MiB free", remedy)
    else:
        yield ok(str(directory), f"{free_mib} MiB free")


def open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_FILES:
        possible = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
        remedy = f"ulimit -n {possible}, or LimitNOFILE= of its unit"
        yield warning("open files", f"at most {soft}: more clients than that are refused", remedy)
    else:
        yield ok("open files", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft}")


def port(host: str, number: int) -> Iterator[Finding]:
    """Whether a launch could listen there now."""
    subject = f"port {number}"
    try:
        listener = bind_http(ServerOptions(host=host, port=number))
    except StartupError as error:
        yield problem(subject, str(error), "end what listens there, or launch with another --port or --host")
        return
    except OSError as error:
        yield problem(subject, f"{host}: {error.strerror}", "launch with another --port or --host")
        return
    listener.close()
    yield ok(subject, f"free on {host}")


def loopback() -> Iterator[Finding]:
    """Ranks meet on the loopback interface."""
    try:
        socket.create_server(("127.0.0.1", 0)).close()
    except OSError as error:
        yield problem("loopback", f"127.0.0.1: {error.strerror}", "bring the interface lo up; --tp over 1 needs it")


def run_directory() -> Iterator[Finding]:
    """The place of the service's sockets: short enough, writable, and able to hold them."""
    try:
        made = RunDir()
    except StartupError as error:
        yield problem("sockets", str(error), "set TMPDIR")
        return
    try:
        path = made.path / "probe.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
        yield ok("sockets", f"in {made.path.parent}")
    except OSError as error:
        yield problem("sockets", f"{made.path.parent} holds no Unix sockets: {error.strerror}", "set TMPDIR elsewhere")
    finally:
        made.remove()


def disks(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Where models and exported towers are kept."""
    home = Path.home()
    hub = environment.get("HF_HUB_CACHE") or f"{environment.get('HF_HOME') or home / '.cache' / 'huggingface'}/hub"
    yield _disk("models", Path(hub).expanduser(), MIN_DISK_GIB, "HF_HOME: a disk with more room, for models of the hub")
    yield _disk("engines", default_cache(), 1.0, "--engine-cache DIR: only for --vit-engine onnxruntime or tensorrt")


def _disk(subject: str, directory: Path, least_gib: float, remedy: str) -> Finding:
    there = next(path for path in (directory, *directory.parents) if path.exists())
    if not os.access(there, os.W_OK):
        return warning(subject, f"{directory} cannot be written", remedy)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return warning(subject, f"{directory} cannot be written: {error.strerror}", remedy)
    free_gib = shutil.disk_usage(there).free / GIB
    text = f"{free_gib:.1f} GiB free for {directory}"
    return warning(subject, text, remedy) if free_gib < least_gib else ok(subject, text)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
