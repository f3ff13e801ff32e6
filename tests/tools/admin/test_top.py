"""The live view in Textual's own terminal, of a service whose actors the test plays."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from textual.pilot import Pilot

from tests.runtime.admin_world import AdminWorld, open_answer, running_request
from vlmrt.runtime.messages import ActorName
from vlmrt.runtime.metrics import Metrics
from vlmrt.runtime.questions import CancelRequest
from vlmrt.tools.admin.client import AdminError
from vlmrt.tools.admin.top.app import TopApp
from vlmrt.tools.admin.top.confirm import Confirm
from vlmrt.tools.admin.top.feed import GONE, Feed

NARROW, WIDE = (80, 24), (200, 50)


def busy(world: AdminWorld, num_requests: int = 3) -> None:
    """Something of everything to be shown."""
    world.open_answers = [
        open_answer(f"user-{i}", f"chatcmpl-{i}", f"chatcmpl-{i}", age_s=100.0 - i) for i in range(num_requests)
    ]
    world.requests = [running_request(f"chatcmpl-{i}", num_output_tokens=i + 1) for i in range(num_requests)]

    def edge(metrics: Metrics) -> None:
        for value in (0.02, 0.04, 0.3):
            metrics.observe("time_to_first_token_seconds", value)
        metrics.observe("inter_token_latency_seconds", 0.012)
        metrics.set("resident_memory_bytes", 76 << 20)

    def scheduler(metrics: Metrics) -> None:
        metrics.set("requests_running", num_requests)
        metrics.set("kv_cache_usage_ratio", 0.5)
        metrics.add("generation_tokens_total", 500)

    def tower(metrics: Metrics) -> None:
        metrics.add("images_encoded_total", 25)
        metrics.set("device_memory_bytes", 5 << 30)

    world.count("edge:0", edge)
    world.count("scheduler:0", scheduler)
    world.count("vit:0", tower)
    world.table.processes[ActorName("llm:0")].num_restarts = 2
    world.beat(5.0)


@asynccontextmanager
async def top(world: AdminWorld, size: tuple[int, int] = NARROW) -> AsyncIterator[tuple[TopApp, Pilot[None]]]:
    def find() -> str:
        if world.server is None:
            raise AdminError("no service of yours runs here")
        return world.address

    world.desk._requests._period_s = 0.0  # actors are asked at every look
    app = TopApp(Feed(find, look_timeout_s=2.0), period_s=3600.0)
    async with app.run_test(size=size) as pilot:
        await until(pilot, lambda: app.last_look.stats is not None or bool(app.last_look.problem))
        yield app, pilot


async def until(pilot: Pilot[None], condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await pilot.pause(0.005)


async def look(app: TopApp, pilot: Pilot[None]) -> None:
    """Until what has changed by now is shown."""
    await pilot.pause()
    num_looks = app.num_looks
    app.look_soon()
    await until(pilot, lambda: app.num_looks > num_looks)
    await pilot.pause()


def shown(app: TopApp) -> list[str]:
    """The lines of the screen."""
    return [strip.text.rstrip() for strip in app.screen._compositor.render_strips()]


@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["80x24", "200x50"])
async def test_everything_is_on_the_screen_and_within_it(world: AdminWorld, size: tuple[int, int]) -> None:
    busy(world)
    async with top(world, size) as (app, pilot):
        await look(app, pilot)
        lines = shown(app)
    assert len(lines) == size[1]
    assert max(map(len, lines)) <= size[0]
    text = "\n".join(lines)
    assert lines[0].startswith(" test-model  http://127.0.0.1:8000")
    assert lines[0].endswith("ready   up 5.50 s")
    assert "requests  3 running, 0 waiting; 0 done, 0 failed, 0 aborted" in text
    assert "100 tokens/s, 0 of prompt, 5 images/s" in text
    assert "KV cache  ██████░░░░░░  50 % in use" in text
    assert "first token" in text
    assert "3 in 5 s" in text
    for actor in world.table.processes:
        assert any(line.strip().startswith(actor) for line in lines)
    vit = next(line for line in lines if line.strip().startswith("vit:0"))
    assert "5.0 GiB" in vit
    assert next(line for line in lines if "llm:0" in line).split()[8] == "2"
    requests = [line.split() for line in lines if line.strip().startswith("user-")]
    assert [cells[:2] for cells in requests] == [["user-0", "decode"], ["user-1", "decode"], ["user-2", "decode"]]
    assert requests[0][8:11] == ["1/64", "1", "64"]
    assert ("chatcmpl-0" in text) == (size == WIDE)
    assert ("output tokens/s  100" in text) == (size == WIDE)
    assert "c Cancel request  d Drain or undrain  q Quit" in lines[-1]
    assert not any(line.endswith(("▌", "▏")) or "▃▃" in line for line in lines)  # no bar to scroll sideways


async def test_the_request_under_the_cursor_is_cancelled_when_that_is_confirmed(world: AdminWorld) -> None:
    busy(world)
    async with top(world) as (app, pilot):
        await look(app, pilot)
        await pilot.press("down", "c")
        assert isinstance(app.screen, Confirm)
        assert any("Cancel the request user-1? Its client gets an error." in line for line in shown(app))
        await pilot.press("n")
        assert not isinstance(app.screen, Confirm)
        assert cancelled(world) == []
        await pilot.press("c", "y")
        await until(pilot, lambda: cancelled(world) == ["chatcmpl-1"])
        await look(app, pilot)
        assert [line.split()[0] for line in shown(app) if "user-" in line] == ["user-0", "user-2"]


def cancelled(world: AdminWorld) -> list[str]:
    return [question.id for _, question in world.asked if isinstance(question, CancelRequest)]


async def test_the_cursor_stays_on_its_request_while_others_come_and_go(world: AdminWorld) -> None:
    busy(world)
    async with top(world) as (app, pilot):
        await look(app, pilot)
        await pilot.press("down", "down")
        world.open_answers = world.open_answers[1:]
        await look(app, pilot)
        await pilot.press("c")
        assert any("user-2" in line for line in shown(app))
        await pilot.press("escape")
        world.open_answers = []
        await look(app, pilot)
        await pilot.press("c")
        assert not isinstance(app.screen, Confirm)


async def test_draining_is_asked_first_and_shown_and_taken_back_by_the_same_key(world: AdminWorld) -> None:
    async with top(world) as (app, pilot):
        await pilot.press("d", "escape")
        assert not world.desk.draining
        await pilot.press("d", "enter")
        await until(pilot, lambda: world.desk.draining)
        world.beat()
        await look(app, pilot)
        assert "draining" in shown(app)[0]
        await pilot.press("d")
        assert any("Take new requests again?" in line for line in shown(app))
        await pilot.press("y")
        await until(pilot, lambda: not world.desk.draining)


async def test_a_service_that_is_gone_is_said_to_be_and_found_again(world: AdminWorld) -> None:
    busy(world)
    async with top(world) as (app, pilot):
        await look(app, pilot)
        world.stop()
        await look(app, pilot)
        assert "gone, looking for it" in shown(app)[0]
        assert any("user-0" in line for line in shown(app))  # what was last known
        await pilot.press("c", "y")  # an order that nobody takes
        await pilot.pause()
        world.start()
        await look(app, pilot)
        assert "ready" in shown(app)[0]
        assert cancelled(world) == []


async def test_an_order_to_a_service_that_is_found_gone_meanwhile_is_an_error_in_words(short_dir: Path) -> None:
    feed = Feed(lambda: f"ipc://{short_dir}/no.sock", look_timeout_s=0.05)
    order = asyncio.create_task(feed.cancel("mine"))
    await asyncio.sleep(0)  # it waits for a connection
    assert (await feed.look()).problem == GONE
    with pytest.raises(AdminError, match=r"no answer from ipc://.*: it was given up"):
        await order


async def test_a_service_that_is_not_there_yet_is_waited_for(world: AdminWorld) -> None:
    world.stop()
    async with top(world) as (app, pilot):
        assert "no service of yours runs here" in shown(app)[0]
        await pilot.press("d", "c")
        world.start()
        await look(app, pilot)
        assert "ready" in shown(app)[0]


async def test_an_actor_that_is_down_is_named(world: AdminWorld) -> None:
    process = world.table.processes[ActorName("vit:0")]
    process.end("restarting")
    async with top(world) as (app, pilot):
        world.desk.update(world.table.status(world.now_s + 1, False))
        await look(app, pilot)
        assert "not ready (vit:0 restarting)" in shown(app)[0]


async def test_a_wider_terminal_shows_more_and_a_narrower_one_less(world: AdminWorld) -> None:
    busy(world)
    async with top(world) as (app, pilot):
        await look(app, pilot)
        for size, is_wide in ((WIDE, True), (NARROW, False)):
            await pilot.resize_terminal(*size)
            await look(app, pilot)
            assert ("chatcmpl-0" in "\n".join(shown(app))) == is_wide


async def test_more_requests_than_lines_can_be_scrolled(world: AdminWorld) -> None:
    busy(world, 40)
    async with top(world) as (app, pilot):
        await look(app, pilot)
        assert any("40 open requests" in line for line in shown(app))
        await pilot.press("ctrl+end")
        await look(app, pilot)
        assert any("user-39" in line for line in shown(app))


async def views(world: AdminWorld, count: int) -> None:
    for _ in range(count):
        async with top(world) as (app, pilot):
            await look(app, pilot)


async def test_views_that_come_and_go_leave_no_descriptor(world: AdminWorld) -> None:
    process = psutil.Process()
    await views(world, 2)  # what is made once
    gc.collect()
    num_before = process.num_fds()
    await views(world, 3)
    async with asyncio.timeout(20):
        while process.num_fds() > num_before:  # noqa: ASYNC110 - ZeroMQ's threads close them
            await asyncio.sleep(0.01)
    assert len(world.asks) == 0
