"""The sub-commands of `vlmrt admin`, against a service whose actors the test plays."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime.admin_world import AdminWorld, open_answer, running_request
from vlmrt.runtime.metrics import Metrics
from vlmrt.runtime.questions import EmptyCaches
from vlmrt.runtime.timeline import Span, Timeline
from vlmrt.tools.admin import commands
from vlmrt.tools.admin.client import AdminError
from vlmrt.tools.cli import build_parser, main


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - of the other side's state
            await asyncio.sleep(0.001)


async def run(world: AdminWorld, *words: str) -> int:
    arguments = build_parser().parse_args(["admin", *words])
    return await commands._connected(arguments, world.address, None)


async def test_stats_are_printed_for_people_or_as_json(world: AdminWorld, capsys: pytest.CaptureFixture[str]) -> None:
    def fill(metrics: Metrics) -> None:
        metrics.set("requests_running", 3)

    world.count("scheduler:0", fill)
    world.beat()
    await run(world, "stats")
    assert "requests  3 running" in capsys.readouterr().out
    await run(world, "stats", "--json")
    (line,) = capsys.readouterr().out.splitlines()
    stats = json.loads(line)
    assert stats["requests"]["running"] == 3
    assert [actor["actor"] for actor in stats["actors"]] == list(world.table.processes)
    assert stats["total"]["inter_token"] == {"count": 0, "mean_s": None, "p50_s": None, "p90_s": None, "p99_s": None}


async def test_watching_goes_on_until_it_is_stopped(world: AdminWorld, capsys: pytest.CaptureFixture[str]) -> None:
    watching = asyncio.create_task(run(world, "stats", "--watch", "--interval", "0.001", "--json"))
    text = ""
    async with asyncio.timeout(20):
        while text.count("\n") < 3:
            await asyncio.sleep(0.001)
            text += capsys.readouterr().out
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert all(json.loads(line)["ready"] for line in text.splitlines())


async def test_requests_are_listed_and_cancelled(world: AdminWorld, capsys: pytest.CaptureFixture[str]) -> None:
    world.open_answers = [open_answer("mine", "a1", "a1")]
    world.requests = [running_request("a1")]
    await run(world, "requests")
    assert "mine     decode" in capsys.readouterr().out
    await run(world, "requests", "--json")
    assert json.loads(capsys.readouterr().out)["num_prompt_tokens"] == 100
    await run(world, "cancel", "mine")
    assert capsys.readouterr().out == "cancelled 1 request\n"
    with pytest.raises(AdminError, match="no open request has the id mine"):
        await run(world, "cancel", "mine")


async def test_a_trace_is_drawn_or_printed_as_json(world: AdminWorld, capsys: pytest.CaptureFixture[str]) -> None:
    spans = (Span("queue", "scheduler:0", 5.0, 6.0),)
    world.timelines["mine"] = Timeline("mine", "/v1/x", 5.0, 1.7e9, end_s=7.0, outcome="stop", spans=spans)
    await run(world, "trace", "mine")
    assert "queue  scheduler:0" in capsys.readouterr().out
    await run(world, "trace", "mine", "--json")
    assert json.loads(capsys.readouterr().out)["spans"][0]["end_s"] == 1.0


async def test_caches_are_shown_and_reset_by_kind(world: AdminWorld, capsys: pytest.CaptureFixture[str]) -> None:
    await run(world, "cache", "show")
    await run(world, "cache", "reset")
    await run(world, "cache", "reset", "prefix")
    assert "0 names under which" in capsys.readouterr().out
    emptied = [question for _, question in world.asked if isinstance(question, EmptyCaches)]
    assert emptied == [EmptyCaches(("prefix", "embedding")), EmptyCaches(("prefix",))]


async def test_a_drain_is_begun_waited_for_and_taken_back(
    world: AdminWorld, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "POLL_S", 0.001)
    world.open_answers = [open_answer("mine")]
    await run(world, "drain")
    assert capsys.readouterr().out == (
        "draining: new requests are refused, 1 open; `vlmrt admin undrain` takes it back\n"
    )
    waiting = asyncio.create_task(run(world, "drain", "--wait"))
    num_looks = len(world.asked)
    await until(lambda: len(world.asked) >= num_looks + 3)
    assert not waiting.done()
    world.open_answers = []
    assert await asyncio.wait_for(waiting, 20) == 0
    assert "0 open" in capsys.readouterr().out
    await run(world, "undrain")
    assert capsys.readouterr().out == "new requests are taken\n"
    assert not world.desk.draining


async def test_waiting_for_a_drain_does_not_begin_it_again_once_it_was_taken_back(
    world: AdminWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "POLL_S", 0.001)
    world.open_answers = [open_answer("mine")]
    waiting = asyncio.create_task(run(world, "drain", "--stop", "--wait"))
    await until(lambda: world.desk.draining)
    await run(world, "undrain")
    with pytest.raises(AdminError, match="the drain was taken back"):
        await asyncio.wait_for(waiting, 20)
    assert not world.desk.draining


async def test_a_drain_that_stops_ends_with_the_service(
    world: AdminWorld, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "POLL_S", 0.001)
    world.open_answers = [open_answer("mine")]
    waiting = asyncio.create_task(run(world, "drain", "--stop", "--wait", "--timeout", "0.3"))
    printed: list[str] = []

    def has_begun() -> bool:
        printed.append(capsys.readouterr().out)
        return "the service ends when none is\n" in printed[-1]

    await until(has_begun)
    world.stop()
    assert await asyncio.wait_for(waiting, 20) == 0
    assert capsys.readouterr().out == "the service has ended\n"


async def test_config_levels_and_profiles(world: AdminWorld, capsys: pytest.CaptureFixture[str]) -> None:
    await run(world, "config", "show", "--json")
    shown = json.loads(capsys.readouterr().out)
    assert shown["scheduling.max_num_seqs"] == {"value": 64, "origin": "built in"}
    await run(world, "config", "show")
    assert "scheduling.max_num_seqs" in capsys.readouterr().out
    await run(world, "log-level", "debug", "--actor", "vit:0")
    assert capsys.readouterr().out == "vit:0 from now on: debug\n"
    await run(world, "profile", "start", "vit:0", "--seconds", "5")
    assert capsys.readouterr().out.startswith("recording vit:0 for 5 s, into vlmrt-profiles/vit-0-")
    await run(world, "profile", "stop", "vit:0")
    assert capsys.readouterr().out == "written: /somewhere.folded\n"


# ---------------------------------------------------------------- the command line


def test_errors_are_one_line_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    silent = f"ipc://{tmp_path}/no.sock"
    assert main(["admin", "stats", "--address", silent, "--timeout", "0.05"]) == 1
    assert capsys.readouterr().err == f"vlmrt admin: error: no answer from {silent} within 0.05 s\n"
    assert main(["admin", "stats", "--address", "nonsense"]) == 1
    assert capsys.readouterr().err.startswith("vlmrt admin: error: --address nonsense: ")
    assert main(["admin", "stats", "--address", "tcp://127.0.0.1:1"]) == 1
    assert "needs --keys or --token-file" in capsys.readouterr().err
    assert main(["admin", "stats", "--address", silent, "--token-file", str(tmp_path / "no")]) == 1
    assert "--token-file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "bound"),
    [
        (("cancel", ""), "ID '': must be 1 to 256"),
        (("cancel", "x" * 257), "must be 1 to 256"),
        (("trace", "\udcff"), r"ID '\udcff': must be 1 to 256 ASCII characters"),
        (("log-level", "info", "--actor", "x" * 65), "--actor 'x"),
        (("profile", "stop", ""), "ACTOR '': must be 1 to 64"),
    ],
)
async def test_what_the_service_would_not_answer_is_said_at_once(
    words: tuple[str, ...], bound: str, world: AdminWorld
) -> None:
    with pytest.raises(AdminError, match=re.escape(bound)):
        await run(world, *words, "--timeout", "0.3")
    assert world.bad_frames() == 0


def test_top_without_a_terminal_says_what_does_not_need_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["admin", "top", "--address", "ipc:///nowhere"]) == 1
    assert "top needs a terminal; `vlmrt admin stats --watch` does not" in capsys.readouterr().err


def test_keys_are_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["admin", "keygen", str(tmp_path / "keys")]) == 0
    assert f"--admin-keys {tmp_path}/keys/server" in capsys.readouterr().out
    assert main(["admin", "keygen", str(tmp_path / "keys")]) == 1
    assert "File exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--admin-address", "tcp://127.0.0.1:0"), "give --admin-keys DIR"),
        (("--admin-token-file", "/nowhere"), "--admin-token-file /nowhere: is for --admin-address"),
        (("--admin-address", "tcp://127.0.0.1:0", "--admin-keys", "/nowhere"), "/nowhere/server.secret: No such file"),
    ],
)
def test_a_launch_with_an_open_door_ends_before_it_begins(
    words: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "--config", "none", "--port", "0", *words]) == 1
    assert message in capfd.readouterr().err


@pytest.mark.parametrize("command", ["stats", "top"])
def test_a_key_that_is_missing_or_has_no_use_is_said_at_once(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    assert main(["admin", command, "--address", "tcp://127.0.0.1:1"]) == 1
    assert "needs --keys or --token-file" in capsys.readouterr().err
    assert main(["admin", command, "--address", f"ipc://{tmp_path}/no.sock", "--token-file", str(token)]) == 1
    assert "are for an --address tcp://HOST:PORT" in capsys.readouterr().err
