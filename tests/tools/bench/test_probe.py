"""What a server takes is found out by asking it."""

from __future__ import annotations

import msgspec
import pytest

from benchmarks.server import free_port
from tests.tools.bench.scripted_server import Script, scripted
from vlmrt.tools.bench import probe
from vlmrt.tools.bench.asks import Target
from vlmrt.tools.bench.probe import Unusable, first_model, probed, wait_until_up


def test_a_server_that_takes_everything_is_asked_for_everything() -> None:
    with scripted() as server:
        target = Target(server.url)
        wait_until_up(target, 0.0)
        assert first_model(target) == "scripted"
        found = probed(target)
        assert (found.target, found.notes) == (target, ())
        (body,) = server.bodies
        assert body["ignore_eos"] is True
        assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


@pytest.mark.parametrize(
    ("refused", "ignore_eos", "counts", "said"),
    [
        (("ignore_eos",), False, "every chunk", ["does not take ignore_eos"]),
        (("stream_options",), True, "none", ["takes no stream_options"]),
        (("ignore_eos", "stream_options"), False, "none", ["does not take ignore_eos", "takes no stream_options"]),
    ],
)
def test_what_a_server_refuses_is_left_out_and_said(
    refused: tuple[str, ...], ignore_eos: bool, counts: str, said: list[str]
) -> None:
    with scripted(Script(refused=refused)) as server:
        found = probed(Target(server.url))
    assert (found.target.ignore_eos, found.target.counts) == (ignore_eos, counts)
    assert [part for part in said if part in " ".join(found.notes)] == said
    assert len(found.notes) == len(said)


def test_a_server_that_refuses_all_is_told_with_its_words() -> None:
    with scripted(Script(refused=("messages",))) as server, pytest.raises(Unusable, match=r"400: .*no such field"):
        probed(Target(server.url))


def test_another_endpoint_than_the_server_has_is_an_error_at_once() -> None:
    with scripted() as server, pytest.raises(Unusable, match="404"):
        probed(Target(server.url, endpoint="/v2/chat/completions"))


def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")  # nobody is there
    with scripted() as server:
        wait_until_up(Target(server.url), 0.0)
        assert first_model(Target(server.url)) == "scripted"
        assert probed(Target(server.url)).notes == ()


def test_an_answer_without_an_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MAX_READ_BYTES", 100)
    with scripted() as server, pytest.raises(Unusable, match="the answer has more than"):
        probed(Target(server.url))
    monkeypatch.undo()
    monkeypatch.setattr(probe, "PROBE_S", 0.3)  # a chunk every 0.2 s: the socket itself is never silent for that long
    slow = Script(ttft_s=0.2, itl_s=0.2)
    with scripted(slow) as server, pytest.raises(Unusable, match=r"the answer has no end after 0\.3 s"):
        probed(Target(server.url))


def test_nobody_at_that_address_is_an_error() -> None:
    nobody = Target(f"http://127.0.0.1:{free_port()}")
    for asking in (lambda: wait_until_up(nobody, 0.0), lambda: first_model(nobody), lambda: probed(nobody)):
        with pytest.raises(Unusable, match="refused"):
            asking()


def test_fields_of_an_option_are_in_every_body() -> None:
    with scripted() as server:
        probed(msgspec.structs.replace(Target(server.url), fields=b'{"temperature":0.5,"seed":3}'))
        assert (server.bodies[0]["temperature"], server.bodies[0]["seed"]) == (0.5, 3)
