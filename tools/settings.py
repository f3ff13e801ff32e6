"""The options of a launch from their four places: flags > environment > configuration file > defaults.

The parser is the one table of options.  A key of the file is a flag without its dashes, a variable is VLMRT_ and the
flag in capitals, and both are checked by what checks the flag.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlmrt.tools.arguments import Parser, closest_word, did_you_mean
from vlmrt.tools.settings_file import SUFFIXES, Entry, SettingsError, read_settings_file

PREFIX = "VLMRT_"
FILE_VARIABLE = "VLMRT_CONFIG"
KEYS_VARIABLE = "VLMRT_API_KEY"  # read where keys are (tools/api_keys.py): its keys join those of the flag
NO_FILE = "none"
FILE_FLAG = "config"
NOT_SETTINGS = ("help", FILE_FLAG, "show-config")  # of this command line alone
PATHS = ("DIR", "FILE", "DIR|HUB_ID")  # metavars of values in which a ~ is a home directory
# what Kubernetes sets in a pod beside a Service called vlmrt
LINK_VARIABLE, LINK = "VLMRT_PORT", re.compile(r"(tcp|udp|sctp)://")
LINK_NAME = re.compile(r"VLMRT_(SERVICE_|PORT_\d)")
SWITCH_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


class Settings(NamedTuple):
    """What a command runs with."""

    arguments: argparse.Namespace
    origins: dict[str, str]  # flag without dashes -> "default", "flag", "environment VLMRT_X" or "file /path"
    file: Path | None
    warnings: list[str]


def read_settings(parser: Parser, words: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """The options of a command line laid over those of the environment, of a file, and the defaults.

    Raises: SettingsError in one line that names the place, the key, its value and the bound.
    """
    actions = settings_of(parser)
    given = flags_given(parser, words)
    arguments = parser.parse_args(list(words))
    origins = dict.fromkeys(actions, "default")
    path = settings_path(given.get(FILE_FLAG), environment)
    if path is not None:
        for entry in read_settings_file(path):
            name = _name_of(entry, path, actions)
            if origins[name] != "default":
                raise SettingsError(f"{_place(path, entry)}: {name} is there twice")
            if entry.value is not None:
                setattr(arguments, actions[name].dest, _file_value(parser, actions[name], entry, path))
                origins[name] = f"file {path}"
    for name, variable, text in _variables(actions, environment):
        setattr(arguments, actions[name].dest, _variable_value(parser, actions[name], variable, text))
        origins[name] = f"environment {variable}"
    for name, action in actions.items():
        if action.dest in given:
            setattr(arguments, action.dest, given[action.dest])
            origins[name] = "flag"
    if environment.get(KEYS_VARIABLE) and "api-key" in origins:
        keys = f"environment {KEYS_VARIABLE}"
        origins["api-key"] = keys if origins["api-key"] == "default" else f"{origins['api-key']}, {keys}"
    return Settings(arguments, origins, path, [*_open_keys(path, origins), *_strays(actions, environment)])


def settings_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Flag without dashes -> its action, in the order of the help; without what belongs to one command line alone."""
    found = {}
    for action in parser._actions:
        name = action.option_strings[-1].removeprefix("--") if action.option_strings else ""
        if name and name not in NOT_SETTINGS and action.help != argparse.SUPPRESS:
            found[name] = action
    return found


def variable_of(name: str) -> str:
    """The environment variable of an option: max-num-seqs -> VLMRT_MAX_NUM_SEQS."""
    return PREFIX + name.replace("-", "_").upper()


def is_list(action: argparse.Action) -> bool:
    return action.nargs in ("+", "*")


def add_opposites(parser: argparse.ArgumentParser) -> None:
    """For every switch a hidden flag that turns it off, for a command line that disagrees with a file."""
    for name, action in settings_of(parser).items():
        if action.nargs == 0:
            opposite = name.removeprefix("no-") if name.startswith("no-") else f"no-{name}"
            parser.add_argument(
                f"--{opposite}",
                dest=action.dest,
                action="store_false",
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )


def settings_path(flag: str | None, environment: Mapping[str, str]) -> Path | None:
    """The file that --config or VLMRT_CONFIG names, else the one in the user's configuration directory; None: no file.

    Raises: SettingsError where the directory has two.
    """
    named = flag or environment.get(FILE_VARIABLE)
    if named:
        return None if named == NO_FILE else Path(named).expanduser().absolute()
    directory = default_directory(environment)
    if directory is None:
        return None
    there = [path for path in (directory / f"config{suffix}" for suffix in SUFFIXES) if path.exists()]
    if len(there) > 1:
        raise SettingsError(f"both {there[0]} and {there[1]} are there: give one of them as --config")
    return there[0] if there else None


def default_directory(environment: Mapping[str, str]) -> Path | None:
    base = environment.get("XDG_CONFIG_HOME") or (f"{home}/.config" if (home := environment.get("HOME")) else "")
    return Path(base) / "vlmrt" if os.path.isabs(base) else None


def flags_given(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """What these words set, by destination, without any default."""
    defaults = {action: action.default for action in parser._actions}
    try:
        for action in parser._actions:
            action.default = argparse.SUPPRESS
        return vars(parser.parse_args(list(words)))
    finally:
        for action, default in defaults.items():
            action.default = default


# ---------------------------------------------------------------- the file


def _name_of(entry: Entry, path: Path, actions: Mapping[str, argparse.Action]) -> str:
    """Raises: SettingsError for a key that is no option."""
    name = entry.key.replace("_", "-")
    if name in actions:
        return name
    hint = did_you_mean(name, actions)
    if isinstance(entry.value, dict) and not hint:
        hint = "; keys are those of the flags, in no sections"
    raise SettingsError(f"{_place(path, entry)}: no such option: {entry.key}{hint}")


def _file_value(parser: Parser, action: argparse.Action, entry: Entry, path: Path) -> Any:
    """Raises: SettingsError for a value of another type, or beyond its bound."""
    place = f"{_place(path, entry)}: {entry.key}"
    if action.nargs == 0:
        if not isinstance(entry.value, bool):
            raise SettingsError(f"{place}: true or false is expected, not {_shown(action, entry.value)}")
        return entry.value
    if not is_list(action):
        return _checked(parser, action, _text(action, entry.value, place), place)
    values = entry.value if isinstance(entry.value, list) else [entry.value]
    return [_checked(parser, action, _text(action, value, place), place) for value in values]


def _open_keys(path: Path | None, origins: Mapping[str, str]) -> Iterator[str]:
    """A warning where the file has API keys and others may read it."""
    if path is not None and origins.get("api-key", "").startswith("file") and path.stat().st_mode & 0o044:
        yield f"{path} has API keys, and other users may read it: chmod 600 {path}"


def _place(path: Path, entry: Entry) -> str:
    return f"{path}, line {entry.line}" if entry.line else str(path)


def _text(action: argparse.Action, value: Any, place: str) -> str:
    """The value as a flag would be given it: numbers where numbers are expected, else text."""
    of_numbers = action.type is not None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and of_numbers:
        return repr(value)
    if isinstance(value, str) and not of_numbers:
        return value
    expected = "a number" if of_numbers else "text"
    hint = "; write it in quotes" if isinstance(value, (int, float)) and not of_numbers else ""
    raise SettingsError(f"{place}: {expected} is expected, not {_shown(action, value)}{hint}")


def _shown(action: argparse.Action, value: Any) -> str:
    if action.dest == "api_key":
        return "what is there"
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str():
            return f"the text {value[:64]!r}"
        case list():
            return "a list"
        case dict():
            return "a section"
        case _:
            return f"a {type(value).__name__}"


# ---------------------------------------------------------------- the environment


def _variables(
    actions: Mapping[str, argparse.Action], environment: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    """(option, variable, text) of those that are set; one that is empty is not."""
    for name in actions:
        variable = variable_of(name)
        text = environment.get(variable, "")
        is_link = variable == LINK_VARIABLE and LINK.match(text)
        if text and variable != KEYS_VARIABLE and not is_link:
            yield name, variable, text


def _variable_value(parser: Parser, action: argparse.Action, variable: str, text: str) -> Any:
    """Raises: SettingsError."""
    place = f"environment {variable}"
    if action.nargs == 0:
        if text.lower() not in SWITCH_WORDS:
            raise SettingsError(f"{place}: {text[:64]!r} is none of {', '.join(SWITCH_WORDS)}")
        return SWITCH_WORDS[text.lower()]
    if is_list(action):
        return [_checked(parser, action, part.strip(), place) for part in text.split(",")]
    return _checked(parser, action, text, place)


def _strays(actions: Mapping[str, argparse.Action], environment: Mapping[str, str]) -> Iterator[str]:
    """A warning for each variable that was probably meant to be an option."""
    known = [variable.removeprefix(PREFIX) for variable in (*map(variable_of, actions), FILE_VARIABLE)]
    for variable in sorted(environment):
        name = variable.removeprefix(PREFIX)
        if variable.startswith(PREFIX) and name not in known and not LINK_NAME.match(variable):
            closest = closest_word(name, known)
            if closest:
                yield f"{variable} in the environment is no option; did you mean {PREFIX}{closest}?"


# ---------------------------------------------------------------- both


def _checked(parser: Parser, action: argparse.Action, text: str, place: str) -> Any:
    """As the flag's own check.  Raises: SettingsError."""
    if action.metavar in PATHS:
        text = os.path.expanduser(text)
    try:
        value = parser._get_value(action, text)
        parser._check_value(action, value)
    except argparse.ArgumentError as error:
        raise SettingsError(f"{place}: {error.message}") from None
    return value
