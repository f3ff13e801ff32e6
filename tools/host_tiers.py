"""The sizes of the host tiers: what was asked for, what there is."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlmrt.runtime.config import Config, Device
from vlmrt.runtime.errors import StartupError

DEFAULT_EMBEDDING_HOST_CACHE_GIB: dict[Device, float] = {"cpu": 0.0, "cuda": 2.0}
MEMINFO = Path("/proc/meminfo")
KIB_PER_GIB = 1 << 20


def embedding_host_cache_gib(arguments: argparse.Namespace, device: Device) -> float:
    """As asked, else the device's default, where rows of images are kept at all."""
    asked: float | None = arguments.embedding_host_cache_gib
    if not arguments.no_embedding_caching:
        return DEFAULT_EMBEDDING_HOST_CACHE_GIB[device] if asked is None else asked
    if asked:
        raise StartupError(f"--embedding-host-cache-gib {asked:g}: --no-embedding-caching leaves nothing to keep there")
    return 0.0


def kv_host_cache_gib(arguments: argparse.Namespace) -> float:
    """As asked, where KV blocks are kept at all."""
    asked: float = arguments.kv_host_cache_gib
    if asked and arguments.no_prefix_caching:
        raise StartupError(f"--kv-host-cache-gib {asked:g}: --no-prefix-caching leaves nothing to keep there")
    return asked


def available_gib(meminfo: Path = MEMINFO) -> float:
    """Memory of the host that processes can have without swapping."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) / KIB_PER_GIB


def check_host_tiers(config: Config, available: float) -> None:
    """Refuse host tiers that take more than the available GiB, all ranks and ViTs together.  Raises: StartupError."""
    memory, parallel = config.memory, config.parallel
    wanted = {
        f"--kv-host-cache-gib {memory.kv_host_cache_gib:g} (for each of {parallel.tp} ranks)": (
            memory.kv_host_cache_gib * parallel.tp
        ),
        f"--embedding-host-cache-gib {memory.embedding_host_cache_gib:g} (for each of {parallel.num_vits} ViTs)": (
            memory.embedding_host_cache_gib * parallel.num_vits
        ),
    }
    total = sum(wanted.values())
    if total > available:
        said = " and ".join(option for option, gib in wanted.items() if gib)
        raise StartupError(f"{said}: {total:.2f} GiB of host memory, of which {available:.2f} GiB are available")
