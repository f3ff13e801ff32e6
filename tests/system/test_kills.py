"""kill -9 of each kind of process under load: the service comes back, no client hangs, nothing is left."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.pictures import picture
from tests.system.server import SHARED_MEMORY, Server, descendants, launch, left_over

KINDS = ("edge:0", "media:0", "scheduler:0", "vit:0", "llm:0", "llm:1")
MAX_ANSWER_S = 60.0


class Load:
    """Clients that go on asking, about new pictures and old ones, streamed and not, until told to stop."""

    def __init__(self, server: Server, num_clients: int) -> None:
        self.server = server
        self.stopping = threading.Event()
        self.num_answers = 0
        self.errors: list[str] = []
        self.longest_s = 0.0
        self.threads = [threading.Thread(target=self.run, args=(index,)) for index in range(num_clients)]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join(MAX_ANSWER_S)
        assert not any(thread.is_alive() for thread in self.threads), "a client hangs"

    def run(self, index: int) -> None:
        rng = random.Random(index)
        while not self.stopping.is_set():
            began = time.monotonic()
            try:
                self.ask(rng)
                self.num_answers += 1
            except (openai.APIError, httpx.HTTPError) as error:  # an error is an answer too; silence is not
                self.errors.append(f"{type(error).__name__}: {error}")
                time.sleep(0.05)
            self.longest_s = max(self.longest_s, time.monotonic() - began)

    def ask(self, rng: random.Random) -> None:
        content: list[dict[str, Any]] = [{"type": "text", "text": "Describe the image."}]
        if rng.random() < 0.6:
            content.insert(0, picture(rng.randrange(40)).part)
        stream = rng.random() < 0.5
        answer = self.server.chat(content, max_tokens=40, stream=stream, extra_body={"ignore_eos": True})
        if stream:
            assert list(answer)[-1].choices[0].finish_reason == "length"
        else:
            assert answer.choices[0].finish_reason == "length"


def kill_in_turn(server: Server, load: Load, num_rounds: int) -> dict[str, list[float]]:
    """Seconds from the kill to a healthy service, by kind."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(num_rounds):
        for kind in KINDS:
            answered = load.num_answers
            server.wait_until(lambda answered=answered: load.num_answers >= answered + 4, "answers under load")  # type: ignore[misc]
            pid = server.pid(kind)
            os.kill(pid, signal.SIGKILL)
            seconds[kind].append(server.wait_until_restarted(kind, pid))
    return seconds


def check_kills(run_root: Path, num_rounds: int) -> None:
    with launch("--tp", "2", run_root=run_root) as server:
        num_processes = len(server.actors())
        with Load(server, num_clients=4) as load:
            seconds = kill_in_turn(server, load, num_rounds)
            answered = load.num_answers
            server.wait_until(lambda: load.num_answers >= answered + 8, "answers after the last kill")
        print({kind: [round(s, 2) for s in values] for kind, values in seconds.items()})
        print(f"{load.num_answers} answers, {len(load.errors)} errors, longest {load.longest_s:.1f} s")
        assert load.longest_s < MAX_ANSWER_S
        assert len(server.actors()) == num_processes


def test_each_kind_of_process_may_be_killed_once(run_root: Path) -> None:
    check_kills(run_root, num_rounds=1)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_each_kind_of_process_may_be_killed_five_times(run_root: Path) -> None:
    check_kills(run_root, num_rounds=5)


def check_supervisor_kill(run_root: Path) -> None:
    shared_before = set(SHARED_MEMORY.iterdir())
    with launch(run_root=run_root) as server, Load(server, num_clients=2) as load:
        server.wait_until(lambda: load.num_answers >= 4, "answers under load")
        processes = descendants(server.process.pid)
        assert len(processes) >= 5
        load.stopping.set()
        server.process.kill()
        server.process.wait(10)
        assert left_over(processes) == []
        deadline = time.monotonic() + 10
        while list(run_root.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert list(run_root.iterdir()) == []
        assert set(SHARED_MEMORY.iterdir()) <= shared_before


def test_killing_the_supervisor_leaves_nothing(run_root: Path) -> None:
    check_supervisor_kill(run_root)


@pytest.mark.soak
@pytest.mark.parametrize("attempt", range(5))
def test_killing_the_supervisor_leaves_nothing_five_times(attempt: int, run_root: Path) -> None:
    check_supervisor_kill(run_root)
