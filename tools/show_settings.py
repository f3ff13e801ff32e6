"""What `vlmrt launch --show-config` prints: options with values and origins, as a file that --config would take."""

from __future__ import annotations

import argparse
import json
from typing import Any

from vlmrt.tools.arguments import Parser
from vlmrt.tools.settings import PREFIX, Settings, settings_of

MAX_ALIGNED = 40  # columns before a comment


def shown_settings(parser: Parser, settings: Settings) -> str:
    """TOML; an option without a value is a comment that says what its absence means.  No API key is shown."""
    actions = settings_of(parser)
    lines = [
        f"# The options of this launch: flags, then {PREFIX}*, then "
        f"{settings.file or 'a file (none is read)'}, then defaults.",
    ]
    for group in parser._action_groups:
        of_group = [(name, action) for name, action in actions.items() if action in group._group_actions]
        if of_group:
            lines += ["", f"# {group.title}"]
            lines += [_line(name, action, settings) for name, action in of_group]
    return "\n".join(lines) + "\n"


def _line(name: str, action: argparse.Action, settings: Settings) -> str:
    value, origin = getattr(settings.arguments, action.dest), settings.origins[name]
    if action.dest == "api_key":
        return f"# {name}: {_keys_text(value, origin)}"
    if value is None:
        _, is_said, without = (action.help or "").rpartition("default: ")
        return f"# {name}: {without if is_said else 'none'}"
    assignment = f"{name} = {_toml(value)}"
    return f"{assignment:<{MAX_ALIGNED}}  # {origin}"


def _keys_text(value: Any, origin: str) -> str:
    if origin == "default":
        return "none but those of api-key-file"
    return f"not shown ({origin})"


def _toml(value: Any) -> str:
    """JSON's text, which is TOML's for booleans, finite numbers, strings and lists of strings."""
    return json.dumps(value, ensure_ascii=False)
