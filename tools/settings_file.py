"""A configuration file, TOML or YAML: its keys with their values and lines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

MAX_FILE_BYTES = 1 << 20
SUFFIXES = (".toml", ".yaml", ".yml")


class SettingsError(Exception):
    """What a configuration file or the environment cannot mean, in one line."""


class Entry(NamedTuple):
    key: str
    value: Any
    line: int  # from 1; 0: not known


def read_settings_file(path: Path) -> list[Entry]:
    """The entries of a file, in its order.  Raises: SettingsError naming the file, and the line where it is known."""
    if path.suffix not in SUFFIXES:
        raise SettingsError(f"{path}: a configuration file ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        text = content.decode()
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: not a text file in UTF-8") from None
    if len(content) > MAX_FILE_BYTES:
        raise SettingsError(f"{path}: more than {MAX_FILE_BYTES >> 20} MiB")
    return _toml(path, text) if path.suffix == ".toml" else _yaml(path, text)


def _toml(path: Path, text: str) -> list[Entry]:
    import tomllib

    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # besides TOMLDecodeError, an int of too many digits
        raise SettingsError(f"{path}: {error}") from None
    return [Entry(key, value, _line_of(key, text)) for key, value in values.items()]


def _line_of(key: str, text: str) -> int:
    """Where a key or table of this name begins: tomllib does not say."""
    begins = re.compile(rf"""\s*\[*\s*["']?{re.escape(key)}["']?\s*[=.\]]""")
    return next((number for number, line in enumerate(text.splitlines(), 1) if begins.match(line)), 0)


def _yaml(path: Path, text: str) -> list[Entry]:
    import yaml

    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        raise SettingsError(f"{path}: {' '.join(str(error).split())}") from None
    try:
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise SettingsError(f"{path}: lines of KEY: VALUE are expected")
        entries: list[Entry] = []
        for key_node, value_node in root.value:
            line = key_node.start_mark.line + 1
            key = loader.construct_object(key_node, deep=True)
            if key in [entry.key for entry in entries]:
                raise SettingsError(f"{path}, line {line}: {key} is there twice")
            value = loader.construct_object(value_node, deep=True)
            entries.append(Entry(str(key), value, line))
        return entries
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise SettingsError(f"{path}{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()
