"""What a run directory says of its service, for those who look for one to administer."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

FILE = "service.json"


class ServiceFile(msgspec.Struct, frozen=True):
    pid: int  # of the supervisor
    url: str
    model: str  # its first served name
    started_at: float  # seconds since 1970
    admin: tuple[str, ...]  # addresses; the first is in the run directory


def write_service_file(run_dir: Path, service: ServiceFile) -> None:
    """Whole or not at all."""
    new = run_dir / f"{FILE}.new"
    new.write_bytes(msgspec.json.encode(service))
    os.replace(new, run_dir / FILE)


def read_service_file(run_dir: Path) -> ServiceFile | None:
    """None where there is none, or nothing that can be read."""
    try:
        return msgspec.json.decode((run_dir / FILE).read_bytes(), type=ServiceFile)
    except (OSError, msgspec.MsgspecError):
        return None
