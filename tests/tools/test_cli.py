"""The command line: help at once, errors that say what was meant, exit statuses."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlmrt.tools.arguments import MAX_WIDTH, Parser, did_you_mean
from vlmrt.tools.cli import COMMANDS, SYNONYMS, Command, build_parser, main

HEAVY = "torch transformers numpy numba aiohttp zmq msgspec uvloop PIL rich textual yaml prometheus_client"
NAMES = [command.name for command in COMMANDS]


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of commands, and of their sub-commands."""
    if isinstance(parser, Parser):
        parser.load()
    if parser._subparsers is None:
        yield parser
        return
    for action in parser._subparsers._group_actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from leaves(child)


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", [[], *([name] for name in NAMES)], ids=lambda words: " ".join(words) or "vlmrt")
def test_help_imports_nothing_that_takes_long(words: list[str]) -> None:
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY.split()}))\n"
        f"from vlmrt.tools.cli import main; main([*{words}, '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: vlmrt")


def test_the_modules_of_other_commands_are_not_imported() -> None:
    program = (
        "import sys; from vlmrt.tools.cli import COMMANDS, Command, build_parser\n"
        "build_parser().parse_args(['launch'])\n"
        "print([command.name for command in COMMANDS if command.module in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "['launch']"


def test_the_list_of_commands_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys)
    for command in COMMANDS:
        assert any(line.split()[:1] == [command.name] for line in text.splitlines()), command.name
    assert main([]) == 2
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_command_has_a_module_with_options_and_a_run(command: Command) -> None:
    module = importlib.import_module(command.module)
    assert callable(module.add_arguments)
    assert callable(module.run)


def test_every_option_of_every_command_says_what_it_does() -> None:
    for parser in leaves(build_parser()):
        for action in parser._actions:
            assert action.help, f"{parser.prog} {'/'.join(action.option_strings) or action.dest} has no help"


@pytest.mark.parametrize("columns", [64, 80, 100, 200])
def test_help_fits_the_terminal_and_is_not_wider_than_can_be_read(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in NAMES:
        lines = help_of(capsys, name).splitlines()
        widest = max(lines, key=len)
        # a flag is not broken, however long its choices are
        assert len(widest) <= min(columns, MAX_WIDTH) or widest.lstrip().startswith("-"), widest


def test_help_breaks_no_flag_in_two(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in range(60, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert not any(line.endswith("-") for line in help_of(capsys, "launch").splitlines())


def test_defaults_are_shown_once_and_only_where_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_of(capsys, "launch").split())
    assert "None" not in text
    assert "False" not in text
    assert "any free port (default: 8000)" in text
    assert "(default: 8)" in text  # not 8.0
    assert "0: none (default: 0)" in text


def test_the_usage_of_a_command_is_short_and_has_what_cannot_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert help_of(capsys, "launch").splitlines()[0] == "usage: vlmrt launch [options]"
    assert (
        help_of(capsys, "generate").splitlines()[0] == "usage: vlmrt generate [options] (--input FILE | --prompt TEXT)"
    )


def test_what_others_call_a_command_means_one_that_there_is() -> None:
    assert set(SYNONYMS.values()) <= set(NAMES)
    assert not set(SYNONYMS) & set(NAMES)


def test_help_is_a_command_too(capsys: pytest.CaptureFixture[str]) -> None:
    asked = help_of(capsys, "export")
    with pytest.raises(SystemExit):
        main(["help", "export"])
    assert capsys.readouterr().out == asked


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["lanch"], "vlmrt: error: no such command: lanch; did you mean launch?"),
        (["quux"], "vlmrt: error: no such command: quux; there are launch, "),
        (["--verson"], "vlmrt: error: no such option: --verson; did you mean --version?"),
        (["launch", "--max-num-seq", "3"], "vlmrt launch: error: no such option: --max-num-seq"),
        (["launch", "--max_num_seqs=3"], "no such option: --max_num_seqs; did you mean --max-num-seqs?"),
        (["launch", "--quux"], "vlmrt launch: error: no such option: --quux\n"),
        (["launch", "--device", "cud"], "invalid choice: 'cud' (choose from auto, cuda, cpu); did you mean cuda"),
        (["launch", "--max-waiting", "9" * 20], "--max-waiting: 99999999999999999999 is not within 64 bits"),
        (["launch", "--tp", "x"], "vlmrt launch: error: --tp: 'x' is not a whole number"),
        (["launch", "--tp", "0"], "--tp: 0 is not at least 1"),
        (["launch", "--port", "65536"], "--port: 65536 is not within 0..65535"),
        (["launch", "--vit-quantum-ms", "soon"], "--vit-quantum-ms: 'soon' is not a number"),
        (["launch", "model"], "vlmrt launch: error: unexpected arguments: model; did you mean --model model?"),
        (["launch", "a", "b"], "vlmrt launch: error: unexpected arguments: a b\n"),
        (["serve"], "vlmrt: error: no such command: serve; did you mean launch?"),
        (["generate", "--imput", "x"], "no such option: --imput; did you mean --input?"),
        (["generate"], "one of the arguments --input --prompt is required"),
        (["generate", "--prompt", "x", "--top-k", "1.5"], "--top-k: '1.5' is not a whole number"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_said_in_a_line_and_is_status_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert says in shown.err
    assert shown.out == ""
    first, second = shown.err.splitlines()
    assert second == f"Try '{first.partition(':')[0]} --help'."


def test_a_hidden_option_works_and_is_never_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    assert build_parser().parse_args(["launch", "--fault-hooks"]).fault_hooks
    with pytest.raises(SystemExit):
        main(["launch", "--fault-hook"])
    assert "did you mean" not in capsys.readouterr().err


def test_abbreviations_are_refused_with_what_they_may_be_short_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["launch", "--max-model", "100"])
    assert "did you mean --max-model-len?" in capsys.readouterr().err


def test_a_proposal_is_close_or_there_is_none() -> None:
    assert did_you_mean("cude", ["cuda", "cpu"]) == "; did you mean cuda?"
    assert did_you_mean("CUDA", ["cuda", "cpu"]) == "; did you mean cuda?"
    assert did_you_mean("x", ["cuda", "cpu"]) == ""
    assert did_you_mean("x", []) == ""


@pytest.mark.parametrize("words", [["completion", "bash"], ["bench", "compare", "RESULT", "RESULT"]])
def test_a_reader_that_has_seen_enough_gets_no_traceback(words: list[str], tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"request_throughput": 1.0, "max_concurrency": None, "request_rate": "inf"}))
    words = [str(result) if word == "RESULT" else word for word in words]
    command = [sys.executable, "-m", "vlmrt", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(60) == 1
    assert process.stderr.read() == b""
    process.stderr.close()


def test_ctrl_c_in_a_command_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlmrt.tools.doctor.command.run", interrupted)
    assert main(["doctor"]) == 130


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("vlmrt 0.")
