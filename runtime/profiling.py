"""A profile of one actor into a file, at its operator's word and never for longer than was said."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType
from typing import Protocol

from vlmrt.runtime.questions import Finding, Profiling, StartProfile, StopProfile, Unable

MAX_PROFILE_S = 600.0  # what is recorded stays in memory until it is written
SAMPLE_PERIOD_S = 0.01
MAX_STACKS = 50_000


class Profiler(Protocol):
    """Records what one thread does, and is called in that thread only."""

    suffix: str  # of the file that it writes

    def start(self) -> None: ...

    def stop(self, path: Path) -> None:
        """End the recording and write it.  Raises: OSError where that cannot be."""
        ...


class StackSampler:
    """Looks a hundred times a second at what every thread of this process is doing; slows them down by no more.

    Writes one line for each stack it saw, outermost function first, and how often: speedscope.app, flamegraph.pl and
    inferno read that.
    """

    suffix = ".folded"

    def __init__(self, period_s: float = SAMPLE_PERIOD_S) -> None:
        self._period_s = period_s
        self._counts: Counter[str] = Counter()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stack sampler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, path: Path) -> None:
        self._ended.set()
        self._thread.join()
        path.write_text("".join(f"{stack} {count}\n" for stack, count in self._counts.most_common()))

    def _run(self) -> None:
        while not self._ended.wait(self._period_s):
            self.look()

    def look(self) -> None:
        """Count what each thread is doing now."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            if ident != self._thread.ident:
                stack = folded(frame, names.get(ident, "?"))
                if stack in self._counts or len(self._counts) < MAX_STACKS:
                    self._counts[stack] += 1


def folded(frame: FrameType | None, thread: str) -> str:
    """thread;module:function;module:function of the stack that ends in this frame."""
    places = []
    while frame is not None:
        module = frame.f_globals.get("__name__", "?")
        places.append(f"{module}:{frame.f_code.co_qualname}".replace(";", ","))
        frame = frame.f_back
    return ";".join((thread.replace(";", ","), *reversed(places))).replace("\n", " ")


RunInThread = Callable[[Callable[[], None]], Awaitable[None]]


async def run_here(work: Callable[[], None]) -> None:
    """In the event loop's thread."""
    work()


class ProfileSession:
    """The profile of an actor, if one is being made.

    Args: `make` makes a profiler; `run` calls something in the thread to be profiled and waits for its end.
    """

    def __init__(self, make: Callable[[], Profiler] = StackSampler, run: RunInThread = run_here) -> None:
        self._make = make
        self._run = run
        self._turn = asyncio.Lock()
        self._profiler: Profiler | None = None
        self._path = Path()
        self._written: Path | None = None  # by itself, and nobody has been told
        self._timer: asyncio.TimerHandle | None = None
        self._stopping: asyncio.Task[Finding] | None = None

    async def answer(self, question: StartProfile | StopProfile) -> Finding:
        async with self._turn:
            match question:
                case StartProfile():
                    return await self._start(question)
                case StopProfile():
                    return await self._stop()

    async def _start(self, question: StartProfile) -> Finding:
        if self._profiler is not None:
            return Unable(f"a profile is being made already, for {self._path}")
        if not 0 < question.seconds <= MAX_PROFILE_S:
            return Unable(f"a profile of {question.seconds:g} s: at most {MAX_PROFILE_S:g} s can be recorded")
        profiler = self._make()
        path = Path(question.path + profiler.suffix)
        try:
            await asyncio.to_thread(path.parent.mkdir, mode=0o700, parents=True, exist_ok=True)
            await self._run(profiler.start)
        except (OSError, ValueError, RuntimeError) as error:
            return Unable(f"the profile cannot begin: {error}")
        self._profiler, self._path, self._written = profiler, path, None
        self._timer = asyncio.get_running_loop().call_later(question.seconds, self._time_is_up)
        return Profiling(str(path), question.seconds)

    async def _stop(self) -> Finding:
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            written, self._written = self._written, None
            return Unable("no profile is being made") if written is None else Profiling(str(written), 0.0)
        if self._timer is not None:
            self._timer.cancel()
        try:
            await self._run(lambda: profiler.stop(self._path))
        except (OSError, ValueError, RuntimeError) as error:
            return Unable(f"{self._path} cannot be written: {error}")
        return Profiling(str(self._path), 0.0)

    def _time_is_up(self) -> None:
        self._stopping = asyncio.get_running_loop().create_task(self._stop_by_itself(), name="profile ends")

    async def _stop_by_itself(self) -> Finding:
        async with self._turn:
            finding = await self._stop()
            if isinstance(finding, Profiling):
                self._written = Path(finding.path)
        return finding
