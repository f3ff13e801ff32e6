"""API keys from flags, a file and the environment."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path

from vlmrt.runtime.config import ApiKey
from vlmrt.runtime.errors import StartupError

VARIABLE = "VLMRT_API_KEY"
_KEY = re.compile(r"[\x21-\x7e]{1,512}")
_TENANT = re.compile(r"[\w.:-]{1,64}", re.ASCII)


def read_api_keys(
    flags: Sequence[str] | None, file: str | None, environment: MutableMapping[str, str]
) -> tuple[ApiKey, ...]:
    """All keys of the server, with the variable taken out of the environment: child processes have no use for it.

    Raises: StartupError for a key or tenant that no header can bring, or a key of two tenants; it never shows the key.
    """
    keys: dict[str, str] = {}
    for source, key, tenant in (*_of_flags(flags), *_of_environment(environment), *_of_file(file)):
        if not _KEY.fullmatch(key):
            raise StartupError(f"{source}: a key is 1 to 512 printable ASCII characters without spaces")
        if tenant and not _TENANT.fullmatch(tenant):
            raise StartupError(f"{source}: the tenant {tenant[:64]!r} is not 1 to 64 of letters, digits and _.:-")
        if keys.setdefault(key, tenant) != tenant:
            raise StartupError(f"{source}: the key belongs to the tenant {keys[key] or 'none'!r} already")
    return tuple(ApiKey.of(key, tenant) for key, tenant in keys.items())


def first_key(file: str | None, environment: Mapping[str, str]) -> str:
    """The key that a client sends: the file's first, else the variable's; empty where there is none.

    Raises: StartupError for a file that cannot be read, or holds no key.
    """
    keys = _of_file(file) if file is not None else _of_environment(dict(environment))
    return next((key for _, key, _ in keys), "")


def _of_flags(flags: Sequence[str] | None) -> Iterator[tuple[str, str, str]]:
    for number, key in enumerate(flags or (), 1):
        yield f"--api-key, number {number}", key, ""


def _of_environment(environment: MutableMapping[str, str]) -> Iterator[tuple[str, str, str]]:
    value = environment.pop(VARIABLE, "").strip()
    for number, key in enumerate(value.split(",") if value else (), 1):
        yield f"{VARIABLE}, number {number}", key.strip(), ""


def _of_file(file: str | None) -> Iterator[tuple[str, str, str]]:
    """Lines of KEY or KEY TENANT; a # begins a comment at the start of a line or behind a space."""
    if file is None:
        return
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"--api-key-file {file}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    num_keys = 0
    for number, line in enumerate(lines, 1):
        words = re.sub(r"(^|\s)#.*", "", line).split()
        if len(words) > 2:
            raise StartupError(f"--api-key-file {file}, line {number}: more than KEY and TENANT")
        if words:
            num_keys += 1
            yield f"--api-key-file {file}, line {number}", words[0], words[1] if len(words) == 2 else ""
    if not num_keys:
        raise StartupError(f"--api-key-file {file}: holds no key")
