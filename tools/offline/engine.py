"""A service as a child process, and the thread whose event loop speaks to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import aiohttp

from vlmrt.runtime.errors import StartupError
from vlmrt.tools.api_keys import VARIABLE as API_KEYS_VARIABLE
from vlmrt.tools.loading_bars import LoadingBars
from vlmrt.tools.offline.client import Client
from vlmrt.tools.offline.errors import EngineDeadError
from vlmrt.tools.offline.progress import stderr_console
from vlmrt.tools.offline.reports import Loading, ServiceFailed, ServiceNews, ServiceReady, decode_report

T = TypeVar("T")

SERVICE = "vlmrt.tools.offline.service"
_MAX_REPORT_BYTES = 1 << 20
_NUM_THREADS = 4  # that encode pictures
_SEQS_AHEAD = 2  # requests at the service for each one that runs: the next is tokenized while one ends
_CANCEL_S = 10.0
_EXIT_S = 30.0
_KILLED_S = 10.0

logger = logging.getLogger("vlmrt")


class Engine:
    """Runs from the constructor to `close`.  Belongs to the process that made it."""

    def __init__(self, arguments: Sequence[str], *, show_loading: bool = True, service: str = SERVICE) -> None:
        """Start, and wait until every actor is up.  Raises: StartupError.

        `arguments` are those of `vlmrt launch`; `service` is the module that is run with them.
        """
        self._owner_pid = os.getpid()
        self._lock = threading.RLock()  # of _closed, and of what is handed to the loop before it is set
        self._closed = False
        self._client: Client | None = None
        self._calls: set[asyncio.Task[Any]] = set()
        self._started: Future[None] = Future()
        self._ended = asyncio.Event()
        self._url = ""
        self._why = ""  # it ended, in the service's own words
        self._stopping = asyncio.Event()
        self._bars = LoadingBars(stderr_console()) if show_loading else None
        self._loop = asyncio.new_event_loop()
        reader_fd, writer_fd = os.pipe2(os.O_CLOEXEC)
        try:
            self._process = _spawn(service, arguments, writer_fd)
        except BaseException:
            self._loop.close()
            os.close(reader_fd)
            raise
        finally:
            os.close(writer_fd)
        self._thread = threading.Thread(target=self._run, args=(reader_fd,), name="vlmrt-engine", daemon=True)
        self._thread.start()
        try:
            self._started.result()
        except BaseException:
            self.close()
            raise
        finally:
            if self._bars is not None:
                self._bars.stop()

    @property
    def url(self) -> str:
        """Of the service: unix:PATH."""
        return self._url

    @property
    def pid(self) -> int:
        """Of the supervisor."""
        return self._process.pid

    def call(self, work: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
        """Run this with the client in the engine's thread and wait for it; a KeyboardInterrupt cancels it.

        Raises: EngineDeadError, also where the service ends in the middle; RuntimeError in another process.
        """
        if os.getpid() != self._owner_pid:
            raise RuntimeError(f"this LLM belongs to process {self._owner_pid}: make one in process {os.getpid()}")
        if threading.current_thread() is self._thread:
            raise RuntimeError("a callback of an LLM cannot wait for it")
        future: Future[T] = Future()
        task: list[asyncio.Task[T]] = []

        def begin() -> None:
            task.append(self._loop.create_task(self._while_it_lives(work)))
            self._calls.add(task[0])
            task[0].add_done_callback(end)

        def end(task: asyncio.Task[T]) -> None:
            self._calls.discard(task)
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(task.result())

        with self._lock:
            if self._closed:
                raise EngineDeadError("this LLM is closed")
            self._loop.call_soon_threadsafe(begin)
        try:
            return future.result()
        except BaseException:
            if not future.done():
                self._loop.call_soon_threadsafe(lambda: task[0].cancel())
                wait((future,), _CANCEL_S)
            raise

    def close(self) -> None:
        """End every process; what is being worked on ends with EngineDeadError.  Nothing is left.  Twice is once."""
        if os.getpid() != self._owner_pid:
            return
        if threading.current_thread() is self._thread:  # the garbage collector runs anywhere
            threading.Thread(target=self.close, name="vlmrt-close").start()
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        _end(self._process)

    # ------------------------------------------------------------ in the thread

    def _run(self, reader_fd: int) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve(reader_fd))

    async def _serve(self, reader_fd: int) -> None:
        """The client's life, until `close`."""
        async with contextlib.AsyncExitStack() as stack:
            reports = asyncio.create_task(self._follow(reader_fd, stack))
            await self._stopping.wait()
            reports.cancel()
            self._why = self._why or "it was closed"
            self._ended.set()
            await asyncio.wait({reports, *self._calls})

    async def _follow(self, reader_fd: int, stack: contextlib.AsyncExitStack) -> None:
        """The service's reports, from the first to the last."""
        reader = asyncio.StreamReader(limit=_MAX_REPORT_BYTES)
        transport, _ = await self._loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reader_fd, "rb")
        )
        try:
            while line := await reader.readline():
                await self._take(line, stack)
            self._on_end()
        finally:
            transport.close()
            if not self._started.done():
                self._started.set_exception(EngineDeadError("the engine was closed while it started"))

    async def _take(self, line: bytes, stack: contextlib.AsyncExitStack) -> None:
        match report := decode_report(line):
            case Loading():
                if self._bars is not None and not self._started.done():
                    self._bars.show(report.actor, report.stage, report.done, report.total)
            case ServiceReady() if self._client is None:
                self._url = report.url
                connector = aiohttp.UnixConnector(report.url.removeprefix("unix:"), limit=0)
                session = await stack.enter_async_context(
                    aiohttp.ClientSession(
                        connector=connector,
                        timeout=aiohttp.ClientTimeout(total=None),
                        cookie_jar=aiohttp.DummyCookieJar(),
                        auto_decompress=False,
                    )
                )
                executor = stack.enter_context(ThreadPoolExecutor(_NUM_THREADS, "vlmrt-pictures"))
                self._client = Client(session, executor, _SEQS_AHEAD * report.max_num_seqs)
                self._started.set_result(None)
            case ServiceReady():
                logger.warning("the engine is ready again")
            case ServiceNews():
                logger.warning("%s", report.text)
            case ServiceFailed():
                self._why = report.message

    def _on_end(self) -> None:
        """The report's end is the end of the service."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_KILLED_S)
        code = self._process.returncode
        self._why = self._why or f"its process ended with exit code {code}; its last log lines say why"
        if not self._started.done():
            self._started.set_exception(StartupError(self._why))
        self._ended.set()

    async def _while_it_lives(self, work: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
        assert self._client is not None
        worker = asyncio.create_task(work(self._client))
        death = asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait({worker, death}, return_when=asyncio.FIRST_COMPLETED)
            if worker.done() and not worker.cancelled():
                return worker.result()
            raise EngineDeadError(f"the engine is gone: {self._why}")
        finally:
            death.cancel()
            worker.cancel()
            await asyncio.wait({worker, death})


def _spawn(service: str, arguments: Sequence[str], report_fd: int) -> subprocess.Popen[bytes]:
    """In a session of its own: a Ctrl-C ends a batch, not the engine."""
    environment = {name: value for name, value in os.environ.items() if name != API_KEYS_VARIABLE}  # others' servers'
    return subprocess.Popen(
        [sys.executable, "-m", service, str(report_fd), str(os.getpid()), *arguments],
        stdin=subprocess.DEVNULL,
        pass_fds=(report_fd,),
        env=environment,
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """In order, and at once where that takes too long; the service's sweeper clears up after a killed supervisor."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_EXIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_KILLED_S)
