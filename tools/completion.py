"""`vlmrt completion SHELL`: a script by which a shell completes commands, options and their values."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from vlmrt.tools.arguments import Parser

Expects = Literal["", "file", "directory", "word"]  # what follows a flag: nothing, or a value of this kind
_KINDS: dict[str, Expects] = {"FILE": "file", "FILE|URL": "file", "DIR": "directory", "DIR|HUB_ID": "directory"}


class Option(NamedTuple):
    flags: tuple[str, ...]
    help: str
    expects: Expects
    choices: tuple[str, ...] = ()


class Level(NamedTuple):
    """What may stand behind some words."""

    words: tuple[str, ...]  # of commands, "admin", "stats"
    commands: dict[str, str]  # their help
    options: tuple[Option, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Print a script for a shell. For this shell: eval "$(vlmrt completion bash)", or the same with zsh; in fish '
        "vlmrt completion fish | source. For every one: put the line into ~/.bashrc or ~/.zshrc, or the script into "
        "~/.config/fish/completions/vlmrt.fish."
    )
    parser.add_argument("shell", choices=tuple(SCRIPTS), help="bash, zsh or fish")


def run(arguments: argparse.Namespace) -> int:
    from vlmrt.tools.cli import build_parser

    print(SCRIPTS[arguments.shell](list(levels(build_parser()))), end="")
    return 0


def levels(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[Level]:
    """Of a parser and, behind it, of its commands."""
    if isinstance(parser, Parser):
        parser.load()
    commands: dict[str, str] = {}
    children: dict[str, argparse.ArgumentParser] = {}
    options = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            commands = {command.dest: command.help or "" for command in action._get_subactions()}
            children = {name: child for name, child in action.choices.items() if name in commands}
        elif action.option_strings and action.help != argparse.SUPPRESS:
            options.append(_option(action))
    yield Level(words, commands, tuple(options))
    for name, child in children.items():
        yield from levels(child, (*words, name))


def _option(action: argparse.Action) -> Option:
    flags, text = tuple(action.option_strings), " ".join((action.help or "").split())
    if action.nargs == 0:
        return Option(flags, text, "")
    if action.choices is not None:
        return Option(flags, text, "word", tuple(map(str, action.choices)))
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    return Option(flags, text, _KINDS.get(metavar, "word"))


# ---------------------------------------------------------------- bash


def _bash(found: Sequence[Level]) -> str:
    paths = "|".join(_quoted(" ".join(level.words)) for level in found if level.words)
    values, words = [], []
    for level in found:
        path = " ".join(level.words)
        for option in level.options:
            patterns = "|".join(_quoted(f"{path} {flag}") for flag in option.flags)
            if option.choices:
                values.append(f'{patterns}) _vlmrt_words "{" ".join(option.choices)}"; return ;;')
            elif option.expects == "word":
                values.append(f"{patterns}) return ;;")
            elif option.expects:
                values.append(f"{patterns}) _vlmrt_paths {'-d' if option.expects == 'directory' else '-f'}; return ;;")
        listed = [*level.commands, *(flag for option in level.options for flag in option.flags if flag != "-h")]
        words.append(f'{_quoted(path)}) _vlmrt_words "{" ".join(listed)}" ;;')
    gap = "\n        "
    return f"""# bash completion of vlmrt
_vlmrt_words() {{ mapfile -t COMPREPLY < <(compgen -W "$1" -- "$cur"); }}
_vlmrt_paths() {{ compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen "$1" -- "$cur"); }}
_vlmrt() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} path="" word
    [[ $cur == "=" ]] && cur=""
    [[ $prev == "=" ]] && prev=${{COMP_WORDS[COMP_CWORD-2]}}
    COMPREPLY=()
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "${{path:+$path }}$word" in {paths}) path="${{path:+$path }}$word" ;; esac
    done
    case "$path $prev" in
        {gap.join(values)}
    esac
    case "$path" in
        {gap.join(words)}
    esac
    [[ ${{#COMPREPLY[@]}} == 0 && -n $path && $cur != -* ]] && _vlmrt_paths -f
}}
complete -F _vlmrt vlmrt
"""


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# ---------------------------------------------------------------- zsh


def _zsh(found: Sequence[Level]) -> str:
    cases = []
    for level in found:
        specs = [spec for option in level.options for spec in _zsh_specs(option)]
        rest = [] if level.commands else ["'*:file:_files'"]
        flags = " \\\n                ".join(["_arguments -s -S", *map(_quoted, specs), *rest])
        if level.commands:
            entries = " ".join(_quoted(f"{name}:{_zsh_text(text)}") for name, text in level.commands.items())
            flags = (
                f"if [[ $PREFIX == -* ]]; then\n                {flags}\n            else\n"
                f"                local -a commands=({entries}); _describe command commands\n            fi"
            )
        cases.append(f"{_quoted(' '.join(level.words))})\n            {flags}\n            ;;")
    paths = "|".join(_quoted(" ".join(level.words)) for level in found if level.words)
    gap = "\n        "
    return f"""#compdef vlmrt
_vlmrt() {{
    local path_="" word
    local -i depth=0
    for word in "${{(@)words[2,CURRENT-1]}}"; do
        case "${{path_:+$path_ }}$word" in {paths}) path_="${{path_:+$path_ }}$word"; depth+=1 ;; esac
    done
    words=(vlmrt "${{(@)words[2+depth,-1]}}"); CURRENT=$((CURRENT - depth))
    case "$path_" in
        {gap.join(cases)}
    esac
}}
compdef _vlmrt vlmrt
"""


def _zsh_specs(option: Option) -> Iterator[str]:
    value = ""
    if option.choices:
        value = f":value:({' '.join(option.choices)})"
    elif option.expects:
        value = {"file": ":file:_files", "directory": ":directory:_files -/", "word": ":value: "}[option.expects]
    for flag in option.flags:
        yield f"*{flag}[{_zsh_text(option.help)}]{value}"


def _zsh_text(text: str) -> str:
    return text.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")


# ---------------------------------------------------------------- fish


def _fish(found: Sequence[Level]) -> str:
    paths = " ".join(_fish_quoted(" ".join(level.words)) for level in found if level.words)
    lines = [
        "# fish completion of vlmrt",
        "function __vlmrt_at",
        "    set -l path",
        "    for word in (commandline -opc)[2..]",
        "        set -l longer (string join -- ' ' $path $word)",
        f"        if contains -- $longer {paths}",
        "            set -a path $word",
        "        end",
        "    end",
        '    test "$path" = "$argv[1]"',
        "end",
    ]
    for level in found:
        condition = f"-n {_fish_quoted('__vlmrt_at ' + _fish_quoted(' '.join(level.words)))}"
        for name, text in level.commands.items():
            lines.append(f"complete -c vlmrt {condition} -f -a {name} -d {_fish_quoted(text)}")
        for option in level.options:
            flags = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags)
            value = (
                f"-x -a {_fish_quoted(' '.join(option.choices))}" if option.choices else _FISH_VALUES[option.expects]
            )
            lines.append(
                f"complete -c vlmrt {condition} {flags} {value} -d {_fish_quoted(option.help)}".replace("  ", " ")
            )
    return "\n".join(lines) + "\n"


_FISH_VALUES: dict[Expects, str] = {
    "": "",
    "word": "-x",
    "file": "-r -F",
    "directory": "-x -a '(__fish_complete_directories)'",
}


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SCRIPTS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
