"""The configuration in use as rows: value by name, and where it comes from.  Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from vlmrt.tools.admin.figures import aligned

BUILT_IN = "built in"  # no option sets it
OPTIONS: Mapping[str, str] = {  # of values that are not called as their option is
    "model.directory": "model",
    "model.served_names": "served-model-name",
    "server.api_keys": "api-key",
    "video.reader": "video-reader",
    "video.max_mib": "max-video-mib",
    "video.max_duration_s": "max-video-s",
    "video.max_frames": "max-video-frames",
    "scheduling.prefix_caching": "no-prefix-caching",
    "scheduling.embedding_caching": "no-embedding-caching",
    "parallel.num_media_workers": "media-workers",
    "parallel.vit_engine_directory": "engine-cache",
    "admin.address": "admin-address",
    "admin.keys": "admin-keys",
    "admin.token_file": "admin-token-file",
    "admin.profile_directory": "profile-dir",
}


class ConfigRow(msgspec.Struct, frozen=True):
    name: str
    value: Any
    origin: str


def config_rows(values: Mapping[str, Any], origins: Mapping[str, str]) -> list[ConfigRow]:
    """In the order of the values.  A default is also what was worked out from others."""
    return [ConfigRow(name, value, _origin(name, origins)) for name, value in values.items()]


def config_lines(rows: Sequence[ConfigRow]) -> list[str]:
    cells = [(row.name, _text(row.value), row.origin) for row in rows]
    return aligned([("name", "value", "origin"), *cells], left=(0, 1, 2))


def _origin(name: str, origins: Mapping[str, str]) -> str:
    option = OPTIONS.get(name, name.rpartition(".")[2].replace("_", "-"))
    if name == "server.api_keys" and origins.get("api-key-file", "default") != "default":
        option = "api-key-file"
    return origins.get(option, BUILT_IN)


def _text(value: Any) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "on" if value else "off"
        case list():
            return ", ".join(map(_text, value)) or "none"
        case _:
            return str(value)
