"""`vlmrt completion`: scripts made of the parser, tried in the shells that are there."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

import pytest

from vlmrt.tools.arguments import Parser
from vlmrt.tools.cli import COMMANDS, build_parser, main
from vlmrt.tools.completion import SCRIPTS, levels


def script_of(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def said_by(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def bash_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "vlmrt.bash"
    path.write_text(script_of("bash", capsys))
    return path


def bash(script: Path, *words: str) -> set[str]:
    """What bash would offer for the last of these words."""
    program = (
        f"""source {script}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _vlmrt; printf '%s\\n' "${{COMPREPLY[@]}}" """
    )
    return set(said_by("bash", "-c", program, "bash", "vlmrt", *words).split("\n")) - {""}


@pytest.mark.parametrize("shell", SCRIPTS)
def test_a_script_has_every_command_and_option(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = script_of(shell, capsys)
    for level in levels(build_parser()):
        for name in level.commands:
            assert name in script
        for option in level.options:
            for flag in option.flags:
                assert (
                    f"-l {flag[2:]} " if shell == "fish" and flag.startswith("--") else flag
                ) in script or flag == "-h"
    assert "--fault-hooks" not in script
    assert "fault-hooks" not in script


def test_commands_of_commands_have_levels_of_their_own() -> None:
    parser = Parser(prog="x")
    commands = parser.add_subparsers(dest="command")
    inner = commands.add_parser("admin", help="steer").add_subparsers(dest="what")
    inner.add_parser("stats", help="figures").add_argument("--json", action="store_true", help="as JSON")
    inner.add_parser("hidden", help=argparse.SUPPRESS)
    found = {level.words: level for level in levels(parser)}
    assert found[()].commands == {"admin": "steer"}
    assert "stats" in found[("admin",)].commands
    assert [option.flags for option in found[("admin", "stats")].options] == [("-h", "--help"), ("--json",)]
    assert "'admin stats'" in SCRIPTS["bash"](list(found.values()))


def test_bash_completes_commands_options_and_values(bash_script: Path, tmp_path: Path) -> None:
    names = {command.name for command in COMMANDS}
    assert names <= bash(bash_script, "")
    assert bash(bash_script, "lau") == {"launch"}
    assert bash(bash_script, "launch", "--log-") == {"--log-level", "--log-format", "--log-requests"}
    assert bash(bash_script, "launch", "--device", "") == {"auto", "cuda", "cpu"}
    assert bash(bash_script, "launch", "--device", "=", "c") == {"cuda", "cpu"}
    assert bash(bash_script, "launch", "--tp", "") == set()
    assert bash(bash_script, "chat", "--log-") == set()  # of another command
    (tmp_path / "a b.toml").touch()
    (tmp_path / "a c").mkdir()
    assert bash(bash_script, "launch", "--config", f"{tmp_path}/a") == {f"{tmp_path}/a b.toml", f"{tmp_path}/a c"}
    assert bash(bash_script, "launch", "--allowed-media-root", f"{tmp_path}/a") == {f"{tmp_path}/a c"}
    assert bash(bash_script, "chat", f"{tmp_path}/a b") == {f"{tmp_path}/a b.toml"}


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes_commands_options_and_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vlmrt.fish"
    path.write_text(script_of("fish", capsys))

    def offered(line: str) -> set[str]:
        said = said_by("fish", "--no-config", "-c", f"source {path}; complete -C $argv", line)
        return {text.partition("\t")[0] for text in said.splitlines()}

    assert offered("vlmrt lau") == {"launch"}
    assert offered("vlmrt launch --tp 2 --log-f") == {"--log-format"}
    assert offered("vlmrt launch --device ") == {"auto", "cuda", "cpu"}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_takes_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "_vlmrt"
    path.write_text(script_of("zsh", capsys))
    assert said_by("zsh", "-f", "-n", str(path)) == ""
    loaded = f"autoload -Uz compinit; compinit -u -D; source {path}; whence -w _vlmrt; print $_comps[vlmrt]"
    assert said_by("zsh", "-f", "-c", loaded).split("\n")[:2] == ["_vlmrt: function", "_vlmrt"]


def test_another_shell_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["completion", "bsh"])
    assert "(choose from bash, zsh, fish); did you mean bash?" in capsys.readouterr().err
