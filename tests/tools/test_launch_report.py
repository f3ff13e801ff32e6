"""What a launch tells: lines for a person, records for a collector, and no bars in a pipe whatever FORCE_COLOR says."""

from __future__ import annotations

import io
import logging
import re

import msgspec
import pytest

from tests.support import make_config
from vlmrt.actors.models.registry import load_model_config
from vlmrt.runtime.config import Config, ServerOptions
from vlmrt.runtime.control_messages import LlmReady, MediaReady
from vlmrt.runtime.logs import LAUNCH_LOGGER
from vlmrt.runtime.messages import ActorName, Epoch
from vlmrt.tools import demo
from vlmrt.tools.chat.command import URL as CHAT_URL
from vlmrt.tools.cli import build_parser
from vlmrt.tools.launch_report import LaunchReport, LoggedReport
from vlmrt.tools.loading_bars import LoadingBars
from vlmrt.tools.ready_block import Started, ready_entries
from vlmrt.tools.terminal import console_for

URL = "http://127.0.0.1:1"
LLM, MEDIA, FIRST = ActorName("llm:0"), ActorName("media:0"), Epoch(1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def config(**options: object) -> Config:
    return make_config(demo.CHECKPOINT, **options)


def life(report: LaunchReport | LoggedReport) -> None:
    """A start, a loss, and the end."""
    report.progress(LLM, "loading weights", 0, 2 << 20)
    report.progress(LLM, "loading weights", 1 << 20, 2 << 20)
    report.progress(LLM, "loading weights", 2 << 20, 2 << 20)
    report.actor_up(MEDIA, FIRST, MediaReady(1))
    report.actor_up(LLM, FIRST, LlmReady(1000, 0, 1 << 20))
    report.gpu_sharing("time-sliced")
    report.ready(URL, 1.25)
    report.actor_down(MEDIA, FIRST, "killed")
    report.restarting(MEDIA, Epoch(2), 0.5)
    report.ready(URL, 0.5)
    report.stopping("a signal")


def test_a_pipe_gets_a_line_for_each_stage_and_one_block(capsys: pytest.CaptureFixture[str]) -> None:
    life(LaunchReport(config(), load_model_config(demo.CHECKPOINT)))
    text = capsys.readouterr().out
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0].startswith("vlmrt: starting test-model on cpu in float32")
    assert lines[1:3] == ["  llm:0: loading weights 0.0/2.0 MiB", "  llm:0: loading weights 2.0/2.0 MiB"]
    assert "  sharing    time-sliced" in lines
    assert "  KV cache   16000 tokens (0.98 GiB), prefix caching on" in lines
    assert f"  chat       {URL}/ in a browser; vlmrt chat --url {URL}" in lines
    assert f"  figures    vlmrt admin top, vlmrt admin stats; {URL}/metrics for Prometheus" in lines
    assert text.count("is ready at") == 1
    assert lines[-3:-1] == ["vlmrt: media:0 restarts in 0.5 s", "vlmrt: ready again after 0.5 s"]


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_terminal_gets_lines_that_it_need_not_break(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout", stream)
    LaunchReport(config(), load_model_config(demo.CHECKPOINT)).ready(URL, 1.0)
    text = re.sub(r"\x1b\[[0-9;?]*\w", "", stream.getvalue())
    block = text.partition("is ready at")[2].partition("Try it")[0].splitlines()[1:]
    assert max(map(len, block)) < columns
    assert " ".join(" ".join(block).split()).count("this is the demo model: a toy that knows coloured shapes") == 1


def test_a_collector_gets_records_with_the_block_as_one_of_them(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=LAUNCH_LOGGER)
    server = ServerOptions(host="0.0.0.0")
    life(LoggedReport(config(server=server), load_model_config(demo.CHECKPOINT)))
    assert capsys.readouterr() == ("", "")
    first, second = (record for record in caplog.records if record.getMessage().startswith("ready"))
    fields = first.fields  # type: ignore[attr-defined]
    assert (fields["url"], fields["start_s"]) == (URL, 1.25)
    assert fields["ready"]["KV cache"].startswith("16000 tokens")
    assert fields["ready"]["sharing"] == "time-sliced"
    assert "ready" not in second.fields  # type: ignore[attr-defined]
    levels = {record.getMessage()[:20]: record.levelname for record in caplog.records}
    assert levels["0.0.0.0 can be reach"] == "WARNING"
    assert levels["media:0 is down: kil"] == "WARNING"
    assert levels["stopping: a signal"] == "INFO"
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_a_server_without_a_page_names_none() -> None:
    for server, chat in (
        (ServerOptions(page=False), "vlmrt chat"),
        (ServerOptions(), f"{CHAT_URL}/ in a browser; vlmrt chat"),
    ):
        entries = ready_entries(
            config(server=server), load_model_config(demo.CHECKPOINT), CHAT_URL, Started(LlmReady(1000))
        )
        assert dict(entries)["chat"] == chat


def test_the_commands_of_the_block_are_there() -> None:
    for words in (["chat", "--url", URL], ["admin", "top"], ["admin", "stats"]):
        build_parser().parse_args(words)


def test_the_block_says_from_where_options_came_that_the_command_line_does_not_show() -> None:
    plain = {"tp": "flag", "port": "default"}

    def of(origins: dict[str, str]) -> dict[str, str]:
        made = msgspec.structs.replace(config(), origins=origins)
        return dict(ready_entries(made, load_model_config(demo.CHECKPOINT), URL, Started(LlmReady(1000))))

    assert "options" not in of(plain)
    elsewhere = {**plain, "host": "file /c.toml", "dtype": "file /c.toml", "max-waiting": "environment VLMRT_X"}
    assert of(elsewhere)["options"] == "flags, file /c.toml, environment VLMRT_X (--show-config)"


@pytest.mark.parametrize(
    ("stream", "environment", "bars", "colour"),
    [
        (Terminal(), {"TERM": "xterm-256color"}, True, True),
        (Terminal(), {"TERM": "xterm-256color", "NO_COLOR": "1"}, True, False),
        (Terminal(), {"TERM": "dumb"}, False, False),
        (io.StringIO(), {"TERM": "xterm-256color"}, False, False),
        (io.StringIO(), {"TERM": "xterm-256color", "FORCE_COLOR": "1"}, False, True),
    ],
)  # fmt: skip
def test_bars_are_for_terminals_and_colours_as_the_environment_says(
    stream: io.StringIO, environment: dict[str, str], bars: bool, colour: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TERM", "NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    console = console_for(stream)
    shown = LoadingBars(console)
    shown.show("llm:0", "loading weights", 1, 2)
    assert shown.shown is bars
    shown.stop()
    assert ("\x1b[?25l" in stream.getvalue()) is bars
    stream.seek(0)
    stream.truncate()
    console.print("[red]x[/red]")
    assert ("\x1b[31m" in stream.getvalue()) is colour
