"""`vlmrt admin` and a real server: what is seen of its requests, and what is done to them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.system.server import Server
from vlmrt.tools.admin.discovery import find_address
from vlmrt.tools.admin.top.feed import Feed

CYCLES = 1000
MAX_GROWTH_BYTES = 16 << 20  # of the supervisor, over all of them


def admin(server: Server, *words: str) -> str:
    """What the command prints; it finds the server by its process, since its TMPDIR is another."""
    command = [sys.executable, "-m", "vlmrt.tools.cli", "admin", *words, "--pid", str(server.process.pid)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def long_stream(server: Server, label: str) -> Iterator[Any]:
    """A stream that goes on for minutes if nobody ends it."""
    stream: Iterator[Any] = server.chat(
        "Hello", stream=True, max_tokens=4000, extra_body={"ignore_eos": True}, extra_headers={"x-request-id": label}
    )
    return stream


def test_a_stream_is_seen_cancelled_and_traced(demo_server: Server) -> None:
    stream = long_stream(demo_server, "cancel-me")
    next(stream)
    (row,) = (json.loads(line) for line in admin(demo_server, "requests", "--json").splitlines())
    assert (row["label"], row["state"], row["num_choices"], row["max_tokens"]) == ("cancel-me", "decode", 1, 4000)
    assert row["num_output_tokens"] >= 1
    assert admin(demo_server, "cancel", "cancel-me") == "cancelled 1 request\n"
    with pytest.raises(openai.APIError) as raised:
        for _ in stream:
            pass
    assert raised.value.code == "cancelled"
    demo_server.wait_until(lambda: admin(demo_server, "requests") == "no request is open\n", "the end of the request")
    trace = json.loads(admin(demo_server, "trace", "cancel-me", "--json"))
    assert trace["outcome"] == "cancelled"
    assert {"receive", "prompt"} <= {span["name"] for span in trace["spans"]}
    assert "cancel-me" in admin(demo_server, "trace", "cancel-me")


def test_a_server_that_drains_ends_what_is_open_and_takes_nothing_new(demo_server: Server) -> None:
    stream = long_stream(demo_server, "open")
    next(stream)
    try:
        assert "draining: new requests are refused, 1 open" in admin(demo_server, "drain")
        with pytest.raises(openai.InternalServerError) as raised:
            demo_server.chat("Hello", max_tokens=2)
        assert (raised.value.status_code, raised.value.response.headers["Retry-After"]) == (503, "5")
        assert httpx.get(f"{demo_server.url}/health", timeout=5).status_code == 503
        next(stream)
        assert json.loads(admin(demo_server, "stats", "--json"))["draining"]
    finally:
        assert admin(demo_server, "undrain") == "new requests are taken\n"
        admin(demo_server, "cancel", "open")
    assert demo_server.chat("Hello", max_tokens=2).usage.completion_tokens >= 1
    assert demo_server.healthy()


def test_what_a_server_is_made_of_can_be_asked(demo_server: Server) -> None:
    stats = json.loads(admin(demo_server, "stats", "--json"))
    actors = {actor["actor"]: actor for actor in stats["actors"]}
    assert {name: actor["pid"] for name, actor in actors.items()} == {
        name: demo_server.pid(name) for name in ("edge:0", "media:0", "scheduler:0", "vit:0", "llm:0")
    }
    assert all(actor["resident_bytes"] > 10 << 20 for actor in actors.values())
    config = json.loads(admin(demo_server, "config", "show", "--json"))
    assert config["server.port"] == {"value": 0, "origin": "flag"}
    assert config["scheduling.max_num_seqs"]["origin"] == "default"
    assert demo_server.chat("Tell me a longer story about circles", max_tokens=2)
    assert "kv" in admin(demo_server, "cache", "reset")
    told = admin(demo_server, "log-level", "warning")
    assert told == "supervisor, edge:0, media:0, scheduler:0, vit:0, llm:0 from now on: warning\n"


@pytest.mark.soak
def test_a_thousand_views_leave_the_server_as_it_was(demo_server: Server) -> None:
    supervisor = psutil.Process(demo_server.process.pid)
    address = find_address(None, demo_server.process.pid)

    async def attach(count: int) -> None:
        for _ in range(count):
            feed = Feed(lambda: address)
            try:
                look = await feed.look()
                assert not look.problem
            finally:
                feed.close()

    asyncio.run(attach(50))  # what is made once
    num_before, bytes_before = supervisor.num_fds(), supervisor.memory_info().rss
    asyncio.run(attach(CYCLES))
    demo_server.wait_until(lambda: supervisor.num_fds() <= num_before, "the sockets' end")
    assert supervisor.memory_info().rss - bytes_before < MAX_GROWTH_BYTES
    assert demo_server.healthy()
