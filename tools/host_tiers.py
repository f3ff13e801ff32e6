"""The sizes of the host tiers: what was asked for, what there is."""

from __future__ import annotations

import argparse

from vlmrt.runtime.config import Config, Device
from vlmrt.runtime.errors import StartupError

DEFAULT_EMBEDDING_HOST_CACHE_GIB: dict[Device, float] = {"cpu": 0.0, "cuda": 2.0}


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


def check_host_memory(config: Config, available: float) -> None:
    """Refuse caches that take more than the available GiB of the host, all ranks and ViTs together.

    On a CPU that is the first tiers as well, as far as they have a size.  Raises: StartupError.
    """
    memory, parallel = config.memory, config.parallel
    of_ranks = {"--kv-host-cache-gib": memory.kv_host_cache_gib}
    of_vits = {"--embedding-host-cache-gib": memory.embedding_host_cache_gib}
    if parallel.device == "cpu":
        of_ranks["--kv-cache-gib"] = 0.0 if memory.num_kv_blocks is not None else memory.kv_cache_gib or 0.0
        of_vits["--embedding-cache-gib"] = memory.embedding_cache_gib
    wanted = {
        **{
            f"{option} {gib:g} (for each of {parallel.tp} ranks)": gib * parallel.tp for option, gib in of_ranks.items()
        },
        **{
            f"{option} {gib:g} (for each of {parallel.num_vits} ViTs)": gib * parallel.num_vits
            for option, gib in of_vits.items()
        },
    }
    total = sum(wanted.values())
    if total > available:
        said = " and ".join(option for option, gib in wanted.items() if gib)
        raise StartupError(f"{said}: {total:.2f} GiB of host memory, of which {available:.2f} GiB are available")
