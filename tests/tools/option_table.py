"""The tables of docs/configuration.md, made from the parser: `python -m tests.tools.option_table` writes them there."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlmrt.tools.arguments import Parser
from vlmrt.tools.launch_command import add_arguments
from vlmrt.tools.settings import is_list, settings_of, variable_of

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
BEGIN, END = "<!-- options: made by python -m tests.tools.option_table -->", "<!-- end of options -->"


def tables() -> str:
    """A table for each group of options."""
    parser = Parser(prog="vlmrt launch")
    add_arguments(parser)
    options = settings_of(parser)
    lines: list[str] = []
    for group in parser._action_groups:
        rows = [_row(name, action) for name, action in options.items() if action in group._group_actions]
        if rows:
            lines += [f"### {(group.title or '').capitalize() if group.title != 'HTTP' else 'HTTP'}", ""]
            lines += ["| flag, file key | environment | default | meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _row(name: str, action: argparse.Action) -> str:
    text, _, without = (action.help or "").partition("default: ")
    default = without if action.default is None else _shown(action.default)
    meaning = text.strip().rstrip(";").rstrip() or "see the default"
    cells = (f"`--{name}{_value(action)}`", f"`{variable_of(name)}`", default or "none", meaning)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells) + " |"


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices is not None:
        return " " + "|".join(map(str, action.choices))
    return f" {action.metavar}" + (" ..." if is_list(action) else "")


def _shown(default: object) -> str:
    if default is False:
        return "off"
    if default == []:
        return "none"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def replaced(page: str) -> str:
    """The page with the tables of now."""
    head, _, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2]
    return f"{head}{BEGIN}\n\n{tables()}\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text()))
