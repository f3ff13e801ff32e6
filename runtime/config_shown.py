"""A Config as values by dotted name, for people: nothing in them lets anybody in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from vlmrt.runtime.config import Config


def config_values(config: Config) -> dict[str, Any]:
    """{"scheduling.max_num_seqs": 64, ...}: numbers, texts, lists and None.  Of API keys only the tenants are told."""
    tenants = [key.tenant or "(none)" for key in config.server.api_keys]
    bare = msgspec.structs.replace(config, server=msgspec.structs.replace(config.server, api_keys=()), origins={})
    values = dict(_flat("", msgspec.to_builtins(bare)))
    del values["origins"]
    values["server.api_keys"] = tenants
    return values


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        yield prefix, value
        return
    for name, inner in value.items():
        yield from _flat(f"{prefix}.{name}" if prefix else name, inner)
