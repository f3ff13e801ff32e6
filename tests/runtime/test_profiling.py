"""Profiles of an actor: one at a time, for as long as was said, into a file."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from vlmrt.runtime.profiling import MAX_PROFILE_S, ProfileSession, StackSampler
from vlmrt.runtime.questions import Profiling, StartProfile, StopProfile, Unable


class FakeProfiler:
    """Writes when it is told to, or fails."""

    suffix = ".fake"

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.stopped = asyncio.Event()

    def start(self) -> None: ...

    def stop(self, path: Path) -> None:
        self.stopped.set()
        if self.error is not None:
            raise self.error
        path.write_text("profile")


async def test_a_profile_is_written_when_it_is_stopped(tmp_path: Path) -> None:
    session = ProfileSession(FakeProfiler)
    path = str(tmp_path / "new" / "vit-0")
    assert await session.answer(StartProfile(path, 60.0)) == Profiling(path + ".fake", 60.0)
    found = await session.answer(StartProfile(path, 60.0))
    assert isinstance(found, Unable)
    assert "is being made already" in found.message
    assert await session.answer(StopProfile()) == Profiling(path + ".fake", 0.0)
    assert (tmp_path / "new" / "vit-0.fake").read_text() == "profile"
    assert await session.answer(StopProfile()) == Unable("no profile is being made")


async def test_a_profile_that_nobody_stops_ends_by_itself_and_tells_its_file(tmp_path: Path) -> None:
    profiler = FakeProfiler()
    session = ProfileSession(lambda: profiler)
    await session.answer(StartProfile(str(tmp_path / "a"), 0.01))
    await asyncio.wait_for(profiler.stopped.wait(), 20)
    assert await session.answer(StopProfile()) == Profiling(str(tmp_path / "a.fake"), 0.0)
    assert await session.answer(StopProfile()) == Unable("no profile is being made")
    await session.answer(StartProfile(str(tmp_path / "b"), 60.0))  # there is room for another
    await session.answer(StopProfile())


@pytest.mark.parametrize("seconds", [0.0, -1.0, MAX_PROFILE_S + 1, float("nan")])
async def test_a_time_out_of_bounds_is_refused(seconds: float, tmp_path: Path) -> None:
    found = await ProfileSession(FakeProfiler).answer(StartProfile(str(tmp_path / "a"), seconds))
    assert isinstance(found, Unable)
    assert "at most 600 s" in found.message


async def test_a_file_that_cannot_be_written_is_named_and_the_next_profile_can_begin(tmp_path: Path) -> None:
    session = ProfileSession(lambda: FakeProfiler(OSError("no space left")))
    await session.answer(StartProfile(str(tmp_path / "a"), 60.0))
    assert await session.answer(StopProfile()) == Unable(f"{tmp_path / 'a.fake'} cannot be written: no space left")
    assert isinstance(await session.answer(StartProfile(str(tmp_path / "a"), 60.0)), Profiling)
    await session.answer(StopProfile())


async def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = await ProfileSession(FakeProfiler).answer(StartProfile(str(tmp_path / "file" / "a"), 60.0))
    assert isinstance(found, Unable)
    assert "cannot begin" in found.message


def test_the_sampler_sees_what_each_thread_does(tmp_path: Path) -> None:
    path, seen, go_on = tmp_path / "a.folded", threading.Event(), threading.Event()

    def a_function_with_a_name() -> None:
        seen.set()
        go_on.wait(60)

    thread = threading.Thread(target=a_function_with_a_name, name="worker;1")
    sampler = StackSampler(period_s=3600.0)
    thread.start()
    assert seen.wait(60)
    sampler.start()
    for _ in range(3):
        sampler.look()
    sampler.stop(path)
    go_on.set()
    thread.join(60)
    lines = path.read_text().splitlines()
    ours = [line for line in lines if line.startswith("worker,1;") and "a_function_with_a_name" in line]
    assert sum(int(line.rpartition(" ")[2]) for line in ours) == 3
    assert any(line.startswith("MainThread;") and "StackSampler.look" in line for line in lines)
    assert not any("StackSampler._run" in line for line in lines)


def test_the_sampler_looks_by_itself_until_it_is_stopped(tmp_path: Path) -> None:
    looked = threading.Event()

    class Sampler(StackSampler):
        def look(self) -> None:
            super().look()
            looked.set()

    sampler = Sampler(period_s=0.001)
    sampler.start()
    assert looked.wait(60)
    sampler.stop(tmp_path / "a.folded")
    assert not sampler._thread.is_alive()
    assert "MainThread;" in (tmp_path / "a.folded").read_text()
