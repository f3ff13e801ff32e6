"""The engine's life: start, work, interruption, death and close, with a service that has no actors."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from vlmrt.runtime.errors import RequestError, StartupError
from vlmrt.tools.offline.client import CHAT_PATH, Answered, Client, Request, Result
from vlmrt.tools.offline.engine import Engine
from vlmrt.tools.offline.errors import EngineDeadError

FAKE = "tests.tools.offline.fake_service"
DEADLINE_S = 20.0


def saying(text: str) -> Callable[[Client], Coroutine[Any, Any, Result]]:
    request = Request(CHAT_PATH, {"messages": [{"role": "user", "content": text}]})
    return lambda client: client.answer(request)


def wait_for(path: Path) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not path.exists():
        assert time.monotonic() < deadline_s, f"no {path.name}"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def engine(run_root: Path) -> Iterator[Engine]:
    engine = Engine(["serve", str(run_root)], service=FAKE)
    yield engine
    engine.close()
    assert not is_running(engine.pid)
    assert not (run_root / "http.sock").exists()


@pytest.fixture
def run_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("e")


def test_a_request_is_answered_and_close_ends_the_process(engine: Engine) -> None:
    result = engine.call(saying("hello"))
    assert isinstance(result, Answered)
    assert b"hello" in result.body
    engine.close()
    engine.close()
    assert not is_running(engine.pid)
    with pytest.raises(EngineDeadError, match="closed"):
        engine.call(saying("hello"))


def test_an_error_of_the_service_is_the_result(engine: Engine) -> None:
    result = engine.call(saying("refuse"))
    assert isinstance(result, RequestError)
    assert (result.status, result.code, result.param, result.message) == (400, "no", "messages", "refused")


def test_the_engine_may_be_used_inside_a_running_event_loop(engine: Engine) -> None:
    async def main() -> Result:
        return engine.call(saying("hello"))

    assert isinstance(asyncio.run(main()), Answered)


@pytest.mark.parametrize(
    ("life", "message"), [("refuse", "--tp 9: too many"), ("end", "exit code 3")], ids=["refused", "died"]
)
def test_a_failed_start_says_why(life: str, message: str, run_root: Path) -> None:
    before = threading.active_count()
    with pytest.raises(StartupError, match=message):
        Engine([life, str(run_root)], service=FAKE)
    assert threading.active_count() == before


def test_an_interrupted_start_leaves_no_process(run_root: Path) -> None:
    main_thread = threading.get_ident()

    def interrupt() -> None:
        wait_for(run_root / "started")
        signal.pthread_kill(main_thread, signal.SIGINT)

    before = threading.active_count()
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        Engine(["stay silent", str(run_root)], service=FAKE)
    thread.join()
    assert threading.active_count() == before
    assert subprocess.run(["pgrep", "-f", str(run_root)], capture_output=True, check=False).stdout == b""


def test_a_service_that_dies_in_the_middle_is_an_error_for_those_who_wait(engine: Engine, run_root: Path) -> None:
    with pytest.raises(EngineDeadError, match="exit code -9"):
        engine.call(saying("die"))
    with pytest.raises(EngineDeadError, match="exit code -9"):
        engine.call(saying("hello"))
    (run_root / "http.sock").unlink()


def test_a_keyboard_interrupt_cancels_the_request_and_the_engine_works_on(engine: Engine, run_root: Path) -> None:
    main_thread = threading.get_ident()

    def interrupt() -> None:
        wait_for(run_root / "hanging")
        signal.pthread_kill(main_thread, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        engine.call(saying("hang"))
    thread.join()
    wait_for(run_root / "cancelled")
    assert isinstance(engine.call(saying("hello")), Answered)


def test_close_in_another_thread_ends_the_work(engine: Engine, run_root: Path) -> None:
    def close() -> None:
        wait_for(run_root / "hanging")
        engine.close()

    thread = threading.Thread(target=close)
    thread.start()
    with pytest.raises(EngineDeadError, match="closed"):
        engine.call(saying("hang"))
    thread.join()


def test_a_forked_process_can_neither_use_nor_end_it(engine: Engine) -> None:
    reader_fd, writer_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            engine.close()
            engine.call(saying("hello"))
        except RuntimeError as error:
            os.write(writer_fd, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer_fd)
    with open(reader_fd, "rb") as reader:
        assert f"belongs to process {os.getpid()}" in reader.read().decode()
    assert isinstance(engine.call(saying("hello")), Answered)


def test_two_engines_live_side_by_side(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = Engine(["serve", str(tmp_path_factory.mktemp("f"))], service=FAKE)
    assert isinstance(other.call(saying("one")), Answered)
    other.close()
    assert isinstance(engine.call(saying("two")), Answered)


PROGRAM = """
import gc, weakref
from vlmrt.tools.offline.engine import Engine
class Owner:
    def __init__(self):
        self.engine = Engine(["serve", {folder!r}], service={service!r})
        weakref.finalize(self, self.engine.close)
owner = Owner()
print(owner.engine.pid, flush=True)
{then}
"""


@pytest.mark.parametrize(
    "then", ["", "owner.cycle = owner; del owner; gc.collect(); gc.disable()"], ids=["end of the program", "collected"]
)
def test_a_forgotten_engine_ends_by_its_finalizer(then: str, run_root: Path) -> None:
    program = PROGRAM.format(service=FAKE, folder=str(run_root), then=then)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert not is_running(int(done.stdout))
    assert not (run_root / "http.sock").exists()
