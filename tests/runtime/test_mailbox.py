"""What reaches an actor, by the supervisor's word about who lives; and the bounds of the channels."""

from __future__ import annotations

import asyncio
import os
import pickle
from pathlib import Path

import pytest
import zmq

from vlmrt.runtime.codec import FrameDecoder, encode_header, encode_message
from vlmrt.runtime.errors import ChannelFull, StartupError
from vlmrt.runtime.mailbox import HELD_BOUND, Mailbox
from vlmrt.runtime.messages import Abort, ActorName, Epoch, RequestId, SchedulerInbox
from vlmrt.runtime.metrics import Metrics
from vlmrt.runtime.transport import (
    MAX_SOCKET_PATH_BYTES,
    Sender,
    inbox_address,
    new_context,
    open_socket,
    socket_path,
)

EDGE = ActorName("edge:0")


def abort(text: str) -> bytes:
    return encode_message(Abort(RequestId(text)))


class Box:
    """A mailbox of a scheduler, fed by hand."""

    def __init__(self, bound: int = 64) -> None:
        self.metrics = Metrics()
        self.wake = asyncio.Event()
        self.mailbox = Mailbox(FrameDecoder[Abort](SchedulerInbox), self.metrics, self.wake, bound=bound)

    def deliver(self, text: str, epoch: int, sender: ActorName = EDGE) -> None:
        self.mailbox.deliver([encode_header(sender, Epoch(epoch)), abort(text)])

    def taken(self) -> list[str]:
        return list(iter(lambda: e.message.request_id if (e := self.mailbox.take()) else "", ""))

    def count(self, name: str) -> float:
        return self.metrics.snapshot().counters.get(name, 0.0)


def test_messages_of_a_living_peer_arrive_in_order() -> None:
    box = Box()
    box.mailbox.peer_up(EDGE, Epoch(1))
    for text in "abc":
        box.deliver(text, 1)
    assert box.taken() == ["a", "b", "c"]
    assert box.wake.is_set()


def test_messages_before_peer_up_are_held_and_come_first() -> None:
    box = Box()
    for text in "abc":
        box.deliver(text, 1)
    assert box.taken() == []
    assert box.mailbox.depth == 3
    box.deliver("d", 1)
    box.mailbox.peer_up(EDGE, Epoch(1))
    assert box.taken() == ["a", "b", "c", "d"]


def test_messages_of_a_dead_incarnation_are_dropped_even_if_they_were_here_before() -> None:
    box = Box()
    box.mailbox.peer_up(EDGE, Epoch(1))
    box.deliver("here", 1)
    box.mailbox.peer_down(EDGE, Epoch(1))
    box.deliver("late", 1)
    box.deliver("next", 2)
    assert box.taken() == []
    assert box.count("stale_messages_total") == 2
    box.mailbox.peer_up(EDGE, Epoch(2))
    box.deliver("later still", 1)
    assert box.taken() == ["next"]
    assert box.count("stale_messages_total") == 3


def test_held_messages_of_an_incarnation_that_never_came_up_are_dropped() -> None:
    box = Box()
    box.deliver("old", 1)
    assert box.taken() == []
    box.mailbox.peer_up(EDGE, Epoch(2))
    assert box.taken() == []
    assert box.count("stale_messages_total") == 1


def test_a_stranger_fills_only_the_bounded_hold() -> None:
    box = Box()
    box.mailbox.peer_up(EDGE, Epoch(1))
    for _ in range(HELD_BOUND + 5):
        box.deliver("x", 7, ActorName("stranger:0"))
        assert box.taken() == []
    assert box.count("bad_frames_total") == 5
    box.deliver("mine", 1)
    assert box.taken() == ["mine"]


def test_garbage_is_counted_and_dropped(tmp_path: Path) -> None:
    box = Box()
    box.mailbox.peer_up(EDGE, Epoch(1))
    header = encode_header(EDGE, Epoch(1))
    for frames in ([], [b""], [b"\xc1", b"\xc1"], [header, b"\xc1"], [header, pickle.dumps(os.getcwd)], [header] * 3):
        box.mailbox.deliver(frames)
    assert box.taken() == []
    assert box.count("bad_frames_total") == 6


async def send_until_full(sender: Sender, body: bytes) -> int:
    """How many messages went out before ChannelFull."""
    for num_sent in range(5000):
        try:
            sender.send(body)
        except ChannelFull:
            return num_sent
        if num_sent % 50 == 0:
            await asyncio.sleep(0.001)
    raise AssertionError("never full")


async def test_a_full_mailbox_leaves_the_rest_to_the_channel_whose_bound_reaches_the_sender(run_root: Path) -> None:
    box = Box(bound=8)
    box.mailbox.peer_up(EDGE, Epoch(1))
    context = new_context()
    address = inbox_address(run_root, ActorName("scheduler:0"), Epoch(1))
    box.mailbox.bind(context, address)
    sender = Sender(context, address, encode_header(EDGE, Epoch(1)), bound=4)
    num_sent = await send_until_full(sender, abort("x" * (1 << 16)))
    assert box.mailbox.depth <= 8
    num_taken = 0
    async with asyncio.timeout(20):
        while num_taken < num_sent:
            num_taken += len(box.taken())
            await asyncio.sleep(0)
    assert num_taken == num_sent
    sender.close()
    box.mailbox.close()
    context.term()
    (run_root / "scheduler-0.1.sock").unlink(missing_ok=True)


async def test_garbage_on_a_real_socket_does_not_stop_the_messages_behind_it(run_root: Path) -> None:
    box = Box()
    box.mailbox.peer_up(EDGE, Epoch(1))
    context = new_context()
    address = inbox_address(run_root, ActorName("scheduler:0"), Epoch(1))
    box.mailbox.bind(context, address)
    socket = open_socket(context, zmq.PUSH)
    socket.connect(address)
    socket.send_multipart([b"\x80\x04pickle", b"?"])
    socket.send(b"")
    socket.send_multipart([encode_header(EDGE, Epoch(1)), abort("good")])
    async with asyncio.timeout(20):
        await box.wake.wait()
    assert box.taken() == ["good"]
    assert box.count("bad_frames_total") == 2
    socket.close()
    box.mailbox.close()
    context.term()
    (run_root / "scheduler-0.1.sock").unlink(missing_ok=True)


def test_a_socket_path_that_is_too_long_is_refused_with_advice() -> None:
    fits = Path("/" + "d" * (MAX_SOCKET_PATH_BYTES - len("/control.sock") - 1))
    assert len(bytes(socket_path(fits, "control"))) == MAX_SOCKET_PATH_BYTES
    with pytest.raises(StartupError, match="TMPDIR"):
        socket_path(Path(f"{fits}d"), "control")


def test_an_old_libzmq_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "zmq_version_info", lambda: (4, 3, 4))
    with pytest.raises(StartupError, match=r"4\.3\.5"):
        new_context()
