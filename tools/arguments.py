"""The parser of every command: short usage, plain errors that say what may have been meant, options on demand."""

from __future__ import annotations

import argparse
import difflib
import importlib
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, Protocol, cast

MAX_WIDTH = 100  # of help on a wide terminal
MAX_FLAG_WIDTH = 28  # longer flags have a line of their own
SHORT_USAGE = 8  # optional arguments; more are said as [options]


class CommandModule(Protocol):
    """What the module of a command has."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Give the parser its options and, where one line does not say enough, a description."""
        ...

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it.  Returns the exit status: 0 clean, 1 a failure said in one line, 2 usage, 130 interrupted."""
        ...


class HelpFormatter(argparse.HelpFormatter):
    """Defaults where there are any, a usage that fits in two lines, and lines that can be read."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=MAX_FLAG_WIDTH, width=min(MAX_WIDTH, terminal_width()) - 2)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if not action.option_strings or default is None or default is False or default in (argparse.SUPPRESS, "", []):
            return text
        shown = f"{default:g}" if isinstance(default, float) else str(default).replace("%", "%%")
        return f"{text} (default: {shown})"

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Flags keep their hyphens on one line."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = textwrap.wrap(
            " ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
        return "\n".join(lines)

    def _format_action(self, action: argparse.Action) -> str:
        """Commands without a line that says COMMAND above them."""
        if isinstance(action, argparse._SubParsersAction):
            return "".join(map(super()._format_action, action._get_subactions()))
        return super()._format_action(action)

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[argparse._MutuallyExclusiveGroup],
        prefix: str | None = None,
    ) -> None:
        actions, groups = list(actions), list(groups)
        if usage is None and sum(bool(action.option_strings) for action in actions) > SHORT_USAGE:
            usage = " ".join(["%(prog)s", "[options]", *self._required(actions, groups)])
        super().add_usage(usage, actions, groups, prefix)

    def _required(
        self, actions: Sequence[argparse.Action], groups: Sequence[argparse._MutuallyExclusiveGroup]
    ) -> list[str]:
        """What a command line cannot leave out."""
        words = []
        for group in groups:
            if group.required:
                words.append("(" + " | ".join(self._invocation(action) for action in group._group_actions) + ")")
        words += [self._invocation(action) for action in actions if action.option_strings and action.required]
        words += [self._invocation(action) for action in actions if not action.option_strings]
        return [word.replace("%", "%%") for word in words if word]

    def _invocation(self, action: argparse.Action) -> str:
        if action.help == argparse.SUPPRESS:
            return ""
        if not action.option_strings:
            return self._format_args(action, self._get_default_metavar_for_positional(action))
        if action.nargs == 0:
            return action.option_strings[-1]
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[-1]} {value}"


def terminal_width() -> int:
    """Columns: what COLUMNS says, or the terminal; 80 where there is none."""
    return max(40, shutil.get_terminal_size().columns)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that explains itself in two lines, and may be given a module that fills it when it is used."""

    def __init__(
        self, *arguments: Any, module: str | None = None, synonyms: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        """Args: module: has this parser's arguments; synonyms: what others call its commands."""
        options.setdefault("formatter_class", HelpFormatter)
        options.setdefault("allow_abbrev", False)  # what is short for one option today is ambiguous tomorrow
        super().__init__(*arguments, **options)
        self._positionals.title = "arguments"
        self._module = module
        self._synonyms = synonyms or {}

    def load(self) -> None:
        """Import the command's module and let it add its options, once."""
        if self._module is not None:
            module = cast(CommandModule, importlib.import_module(self._module))
            self._module = None
            module.add_arguments(self)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but what is not known is an error here, where the options are, and not in the caller."""
        self.load()
        if args is not None:
            self._check_flags(args)
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            meant = f"; did you mean --model {rest[0]}?" if "--model" in self._option_string_actions else ""
            self.error(f"unexpected arguments: {' '.join(rest)}{meant if len(rest) == 1 else ''}")
        if self._subparsers is None:
            found.command_line = tuple(args or ())  # what a command sees of where its values come from
        return found, rest

    def _check_flags(self, words: Sequence[str]) -> None:
        """A misspelt option is named before a required one is missed."""
        for word in words:
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                return
            flag = word.partition("=")[0]
            if flag.startswith("--") and " " not in flag and flag not in self._option_string_actions:
                shown = [
                    text for text, action in self._option_string_actions.items() if action.help != argparse.SUPPRESS
                ]
                self.error(f"no such option: {flag}{did_you_mean(flag.replace('_', '-'), shown)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        if isinstance(action, argparse._SubParsersAction):
            synonym = f"; did you mean {self._synonyms[value]}?" if value in self._synonyms else ""
            hint = synonym or did_you_mean(value, choices) or f"; there are {', '.join(choices)}"
            self.error(f"no such command: {value}{hint}")
        hint = did_you_mean(str(value), choices)
        raise argparse.ArgumentError(action, f"invalid choice: {value!r} (choose from {', '.join(choices)}){hint}")

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where to read on, and leave with status 2."""
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')}\nTry '{self.prog} --help'.\n")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the closest of the known words; empty where none is close."""
    closest = closest_word(word, known)
    return f"; did you mean {closest}?" if closest else ""


def closest_word(word: str, known: Iterable[str]) -> str:
    """The only word that goes on as this one does, else the one most like it; empty where none is close."""
    known = list(known)
    lowered = {text.lower(): text for text in known}
    longer = [text for text in known if len(word) > 3 and text.startswith(word)]
    if len(longer) == 1:
        return longer[0]
    close = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return lowered[close[0]] if close else (longer or [""])[0]
