"""Log lines: for a person, or an object each; of every process the same."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.runtime.services import fake_config, service
from vlmrt.runtime.logs import JsonFormatter, TextFormatter, wants_colour


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(message: str, *arguments: object, level: int = logging.WARNING, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("vlmrt.some.module", level, "file.py", 1, message, arguments, None)
    made.created = 1_700_000_000.1236
    vars(made).update(extra)
    return made


def test_a_json_line_is_one_object_with_the_actor_and_the_request() -> None:
    formatter = JsonFormatter("vit:0", 3)
    line = formatter.format(record("no memory\nfor %d rows", 7, request_id="abc", fields={"status": 200}))
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "2023-11-14T22:13:20.123Z",
        "level": "warning",
        "logger": "vlmrt.some.module",
        "actor": "vit:0",
        "epoch": 3,
        "message": "no memory\nfor 7 rows",
        "request_id": "abc",
        "status": 200,
    }
    assert "request_id" not in json.loads(formatter.format(record("of no request")))


def test_a_json_line_holds_what_utf8_cannot_say_and_what_json_has_no_form_for() -> None:
    line = JsonFormatter("edge:0", 1).format(record("file %s", "a\udcff", fields={"size": {1, 2}.__class__}))
    assert json.loads(line)["message"] == "file a\udcff"
    assert line.isascii()


def test_a_json_line_holds_its_traceback() -> None:
    failed = record("failed")
    try:
        raise ValueError("deep")
    except ValueError:
        failed.exc_info = sys.exc_info()
    line = JsonFormatter("edge:0", 1).format(failed)
    assert "\n" not in line
    assert json.loads(line)["exception"].endswith("ValueError: deep")


def test_a_text_line_has_actor_level_and_request() -> None:
    formatter = TextFormatter("vit:0", in_colour=False)
    line = formatter.format(record("no memory for %d rows", 7, request_id="abc"))
    assert re.fullmatch(r"2023-11-14 \d\d:\d\d:20,\d{3} WARNING vit:0: no memory for 7 rows \[abc\]", line)
    assert formatter.format(record("plain")).endswith("WARNING vit:0: plain")


def test_colour_is_of_the_level_alone_and_only_from_warnings_on() -> None:
    formatter = TextFormatter("vit:0", in_colour=True)
    assert "\x1b[31mERROR\x1b[0m vit:0: x" in formatter.format(record("x", level=logging.ERROR))
    assert "\x1b" not in formatter.format(record("x", level=logging.INFO))


@pytest.mark.parametrize(
    ("stream", "environment", "wanted"),
    [
        (Terminal(), {"TERM": "xterm"}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (Terminal(), {}, False),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": ""}, True),
        (io.StringIO(), {"TERM": "xterm"}, False),
        (io.StringIO(), {"FORCE_COLOR": "1"}, True),
        (io.StringIO(), {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_colour_is_for_terminals_unless_the_environment_says(
    stream: io.StringIO, environment: dict[str, str], wanted: bool
) -> None:
    assert wants_colour(stream, environment) is wanted


def test_a_process_writes_objects_only_warnings_and_the_access_log_among_them() -> None:
    program = """
import logging, warnings
from vlmrt.runtime.logs import ACCESS_LOGGER, set_up_logging
set_up_logging("warning", "json", "media:1", 2)
logging.getLogger("vlmrt.x").info("not told")
logging.getLogger("vlmrt.x").error("told")
logging.getLogger(ACCESS_LOGGER).info("asked for")
warnings.warn("old")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["message"] for line in lines[:2]] == ["told", "asked for"]
    assert "UserWarning: old" in lines[2]["message"]
    assert {(line["actor"], line["epoch"]) for line in lines} == {("media:1", 2)}
    assert done.stdout == ""


async def test_an_actor_writes_objects_with_its_name_and_epoch_traceback_and_all(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = msgspec.structs.replace(fake_config(tmp_path), log_format="json", log_level="warning")
    async with service(
        config, {"edge": "Recorder", "media": "Recorder", "scheduler": "Unstartable"}, tmp_path
    ) as running:
        await running.until(lambda: bool(running.observer.of("failed")), "the failure")
    async with service(config, {"edge": "Pinger", "scheduler": "Crasher"}, tmp_path) as running:
        await running.until(lambda: bool(running.observer.of("down")), "the loss")
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    refused = next(line for line in lines if line["message"].startswith("start failed"))
    assert (refused["actor"], refused["epoch"], refused["level"]) == ("scheduler:0", 1, "error")
    crashed = next(line for line in lines if "exception" in line)
    assert crashed["actor"] == "scheduler:0"
    assert crashed["exception"].startswith(("Traceback", "  + Exception Group Traceback"))
