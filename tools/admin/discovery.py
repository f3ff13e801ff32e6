"""Which services of this user run on this machine, and how each is reached."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vlmrt.runtime.run_dir import PREFIX, candidate_bases
from vlmrt.runtime.service_file import ServiceFile, read_service_file
from vlmrt.tools.admin.client import AdminError


class FoundService(NamedTuple):
    run_dir: Path
    file: ServiceFile

    @property
    def address(self) -> str:
        return self.file.admin[0]


def running_services(bases: Sequence[Path] | None = None) -> list[FoundService]:
    """The services of this user whose run directories lie there, the newest first."""
    found = {}
    for base in candidate_bases() if bases is None else bases:
        for run_dir in base.glob(f"{PREFIX}*"):
            service = _service_in(run_dir)
            if service is not None:
                found[run_dir.resolve()] = service
    return sorted(found.values(), key=lambda service: service.file.started_at, reverse=True)


def find_address(address: str | None, pid: int | None) -> str:
    """Where to connect: as given, or to the one service that runs.

    Raises: AdminError where there is none, or several to choose from.
    """
    if address is not None:
        return address
    services = running_services()
    if pid is not None:
        services = [service for service in services if service.file.pid == pid] or _services_of_process(pid)
        if not services:
            raise AdminError(f"--pid {pid}: no service of yours has that process as its supervisor")
    if not services:
        raise AdminError(
            "no service of yours runs here; for one elsewhere, or with another TMPDIR, give --address or --pid"
        )
    if len(services) > 1:
        listed = "\n".join(
            f"  --pid {service.file.pid}  {service.file.model} at {service.file.url}" for service in services
        )
        raise AdminError(f"{len(services)} services run; say which:\n{listed}")
    return services[0].address


def _service_in(run_dir: Path) -> FoundService | None:
    """None unless it is this user's, private, and its supervisor lives."""
    try:
        status = run_dir.lstat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o077 or not _is_locked(run_dir / "lock"):
            return None
    except OSError:
        return None
    file = read_service_file(run_dir)
    return None if file is None or not file.admin else FoundService(run_dir, file)


def _is_locked(lock: Path) -> bool:
    descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _services_of_process(pid: int) -> list[FoundService]:
    """By the lock that the process holds open, wherever its run directory lies."""
    found = []
    try:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            lock = Path(os.readlink(descriptor))
            if lock.name == "lock" and lock.parent.name.startswith(PREFIX):
                service = _service_in(lock.parent)
                if service is not None and service.file.pid == pid:
                    found.append(service)
    except OSError:
        return []
    return found
