"""`vlmrt`: the table of commands.  A command's module is imported when it runs, or when its own help is asked for.

Such a module has `add_arguments(parser)` and `run(arguments) -> int` (tools/arguments.py), and imports at its top what
its options need and no more: help is instant because `run` imports the rest.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple, cast

from vlmrt import __version__
from vlmrt.tools.arguments import CommandModule, Parser


class Command(NamedTuple):
    name: str
    help: str  # one line
    module: str


COMMANDS = (
    Command("launch", "serve a model behind an OpenAI-compatible HTTP API", "vlmrt.tools.launch_command"),
    Command("chat", "chat with a model on the terminal", "vlmrt.tools.chat.command"),
    Command("admin", "see and steer a running service", "vlmrt.tools.admin.command"),
    Command("generate", "answer a file of requests, or one question, without a server", "vlmrt.tools.offline.command"),
    Command("bench", "load any OpenAI-compatible server, and say how fast it answers", "vlmrt.tools.bench.command"),
    Command("export", "make the vision tower's files for another engine", "vlmrt.tools.export_command"),
    Command("doctor", "look whether this machine has what a launch needs", "vlmrt.tools.doctor.command"),
    Command("completion", "print a script by which a shell completes commands and options", "vlmrt.tools.completion"),
)
# what other servers call them
SYNONYMS = {
    "serve": "launch",
    "server": "launch",
    "start": "launch",
    "run": "chat",
    "batch": "generate",
    "check": "doctor",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.  Returns the exit status: 0 clean, 1 a failure said in one line, 2 usage, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if not words:
        parser.print_help(sys.stderr)
        return 2
    if words[0] == "help":
        words = [*words[1:], "--help"]
    arguments = parser.parse_args(words)
    modules = {command.name: command.module for command in COMMANDS}
    module = cast(CommandModule, importlib.import_module(modules[arguments.command]))
    try:
        status = module.run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough; nothing may be left to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


def build_parser() -> Parser:
    """The parser of all commands; it fills that of a command when it comes to it."""
    parser = Parser(
        prog="vlmrt",
        usage="%(prog)s COMMAND [options]",
        description="An inference server for vision-language models (Qwen2-VL, Qwen2.5-VL).",
        synonyms=SYNONYMS,
        epilog="'vlmrt COMMAND --help' lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"vlmrt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands", prog="vlmrt")
    for command in COMMANDS:
        description = command.help[0].upper() + command.help[1:] + "."
        commands.add_parser(command.name, help=command.help, description=description, module=command.module)
    return parser


if __name__ == "__main__":
    sys.exit(main())
