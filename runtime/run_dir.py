"""The service's private run directory: sockets and specs live here, and nothing of it outlives the service."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.transport import MAX_SOCKET_PATH_BYTES

PREFIX = "vlmrt-"
RUN_DIR_VARIABLE = "VLMRT_RUN_DIR"  # in the environment of every child: how the sweeper finds them
_LONGEST_NAME_BYTES = len("/vlmrt-12345678/scheduler-100.1000000.sock")

logger = logging.getLogger(__name__)


class RunDir:
    """A new directory, mode 0700, locked while this process lives."""

    def __init__(self, base: Path | None = None) -> None:
        """Raises StartupError if no folder for temporary files is both writable and short enough."""
        bases = [base] if base is not None else candidate_bases()
        self.path = _make_directory(bases)
        self._lock_fd = _lock(self.path)
        _remove_stale(self.path.parent)

    def remove(self) -> None:
        """Remove it with all it holds; nothing happens if it is gone."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def candidate_bases() -> list[Path]:
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR")
    bases = [Path(runtime_dir)] if runtime_dir else []
    return [*bases, Path(tempfile.gettempdir()), Path("/tmp")]


def _make_directory(bases: list[Path]) -> Path:
    for base in bases:
        if len(bytes(base)) + _LONGEST_NAME_BYTES > MAX_SOCKET_PATH_BYTES:
            continue
        with contextlib.suppress(OSError):
            return Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    tried = ", ".join(map(str, bases))
    raise StartupError(f"no folder for the service's sockets in {tried}: set TMPDIR to a writable path below 36 bytes")


def _lock(path: Path) -> int:
    """A locked descriptor of path/lock.  The file gets its name only once it is locked: unlocked means stale."""
    descriptor = os.open(path / "lock.new", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.rename(path / "lock.new", path / "lock")
    return descriptor


def _remove_stale(base: Path) -> None:
    """Remove what services left whose sweeper was killed too (a lost machine, an out-of-memory killer)."""
    for lock in base.glob(f"{PREFIX}*/lock"):
        try:
            if lock.parent.lstat().st_uid != os.geteuid():
                continue
            descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # in use
        else:
            logger.warning("removing %s, which an earlier service left", lock.parent)
            shutil.rmtree(lock.parent, ignore_errors=True)
        finally:
            os.close(descriptor)
