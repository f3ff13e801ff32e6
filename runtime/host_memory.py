"""How much memory the host has to give."""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
KIB_PER_GIB = 1 << 20


def available_gib(meminfo: Path = MEMINFO) -> float:
    """Memory of the host that processes can have without swapping; on Linux an allocation alone does not tell."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) / KIB_PER_GIB
