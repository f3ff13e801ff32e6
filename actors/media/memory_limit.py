"""A bound on what a media worker allocates: a file may promise more than any machine holds."""

from __future__ import annotations

import resource
from pathlib import Path


def limit_memory(num_bytes: int) -> None:
    """Let this process allocate num_bytes more than it has; allocations beyond them fail, in whatever library.

    Memory shared with others, such as the arena, does not count.
    """
    status = Path("/proc/self/status").read_text()
    used_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:"))
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = (used_kib << 10) + num_bytes
    if most != resource.RLIM_INFINITY:
        wanted = min(wanted, most)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, most))
