"""How much memory the host has to give, and how much of it a process has taken."""

from __future__ import annotations

import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
KIB_PER_GIB = 1 << 20
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")


def available_gib(meminfo: Path = MEMINFO) -> float:
    """Memory of the host that processes can have without swapping; on Linux an allocation alone does not tell."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) / KIB_PER_GIB


def resident_memory_bytes() -> int:
    """Of this process; pages that it shares with others are counted in each of them."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE_BYTES
