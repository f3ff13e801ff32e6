"""Lines of a person at a terminal: with history, completion, and texts of several lines."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

PROMPT, MORE = ">>> ", "... "
MAX_HISTORY = 1000
QUOTE = '"""'


def history_file(environment: Mapping[str, str]) -> Path:
    base = environment.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "vlmrt" / "chat_history"


def read_lines(commands: Sequence[str], history: Path) -> Iterator[str]:
    """Until Ctrl-D; Ctrl-C begins the line anew.  The history is kept for the next time, for its owner's eyes only."""
    with _editing(commands, history):
        while True:
            try:
                yield _text()
            except KeyboardInterrupt:
                print()
            except EOFError:
                print()
                return


def _text() -> str:
    """A line, or the lines between two triple quotes."""
    line = input(PROMPT)
    if not line.startswith(QUOTE):
        return line
    lines = [line.removeprefix(QUOTE)]
    while not lines[-1].rstrip().endswith(QUOTE):
        lines.append(input(MORE))
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTE)
    return "\n".join(lines).strip()


@contextlib.contextmanager
def _editing(commands: Sequence[str], history: Path) -> Iterator[None]:
    try:
        import readline
    except ImportError:  # a Python without it reads lines all the same
        yield
        return
    _set_up(readline, commands)
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(history, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.write_history_file(history)


def _set_up(readline: ModuleType, commands: Sequence[str]) -> None:
    def complete(text: str, state: int) -> str | None:
        begun = readline.get_line_buffer()[: readline.get_endidx()]
        found = completions(text, begun, commands)
        return found[state] if state < len(found) else None

    readline.set_history_length(MAX_HISTORY)
    readline.set_auto_history(True)
    readline.set_completer_delims(" \t\n")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")


def completions(word: str, line: str, commands: Sequence[str]) -> list[str]:
    """What a word may become: a command at the beginning of a line, else a path."""
    if line.startswith("/") and line == word and "/" not in line[1:]:
        return [command + " " for command in commands if command.startswith(word)]
    found = sorted(glob.glob(glob.escape(os.path.expanduser(word)) + "*"))
    return [path + "/" if os.path.isdir(path) else path + " " for path in found]
