"""Bytes that are no message of the channel are refused, whatever they are; messages come back equal."""

from __future__ import annotations

import contextlib
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmrt.runtime.codec import BadFrame, FrameDecoder, encode_header, encode_message
from vlmrt.runtime.control_messages import (
    AdminAnswer,
    AdminAsk,
    ControlInbox,
    EdgeReady,
    Hello,
    PeerUp,
    Ready,
    SupervisorInbox,
    VitReady,
)
from vlmrt.runtime.errors import WireError
from vlmrt.runtime.messages import (
    PROTOCOL_VERSION,
    Abort,
    ActorName,
    ArenaRef,
    ClipInfo,
    Decode,
    DecodeFailed,
    DecodeFrames,
    EdgeInbox,
    Encode,
    Epoch,
    FailedRow,
    FrameGroup,
    HostSlabExport,
    LogitBias,
    MediaItem,
    Message,
    MmHash,
    PixelsReady,
    Probe,
    Probed,
    RequestId,
    Restore,
    Sampling,
    SchedulerInbox,
    StepResult,
    StopRule,
    Submit,
    TokenBatch,
    TokenLogprobs,
    TokenOutput,
    Usage,
    VitInbox,
)
from vlmrt.runtime.questions import Cancelled, EmptyCaches
from vlmrt.runtime.timeline import Span
from vlmrt.runtime.topology import INBOXES

EDGE, SCHEDULER = ActorName("edge:0"), ActorName("scheduler:0")
HEADER = encode_header(EDGE, Epoch(3))
SUBMIT = Submit(
    RequestId("r1"),
    (1, 2, 3),
    (MediaItem(MmHash("ab" * 16), 1, 4, (1, 4, 4)),),
    -2,
    Sampling(0.5, seed=-(2**63), logit_bias=(LogitBias(3, float("-inf"), 2),), num_logprobs=2, grammar="start: /a/"),
    StopRule(16, stop_token_ids=(7,)),
)
ENCODE_SPAN = Span("encode", "vit:0", 1.5, 2.25, "abcd")
LOGPROBS = TokenLogprobs(-0.5, ((3, -0.25), (9, float("-inf"))))
EXAMPLES: list[tuple[Any, Message]] = [
    (SchedulerInbox, SUBMIT),
    (
        SchedulerInbox,
        PixelsReady(MmHash("a"), ArenaRef(ActorName("media:0"), Epoch(1), 64, 12), (1, 2, 2, 3), 1.0, 2.5),
    ),
    (SchedulerInbox, StepResult(7, (5, 9), 1.5, (FailedRow(2, "grammar"),), (None, LOGPROBS))),
    (SchedulerInbox, DecodeFailed(MmHash("a"), WireError(400, "no image", "bad_image", "messages.0"))),
    (
        EdgeInbox,
        TokenBatch((TokenOutput(RequestId("r1"), (5,), Usage(3, 0, 1), "stop", None, (LOGPROBS,), (ENCODE_SPAN,)),)),
    ),
    (INBOXES["media"], Decode(MmHash("a"), b"\x00\xff" * 100, (4, 4), (28, 28), Epoch(1))),
    (
        INBOXES["media"],
        DecodeFrames(b"\x00\xff" * 100, (4, 4), (28, 28), (FrameGroup(MmHash("a"), (0, 9)),), Epoch(1)),
    ),
    (INBOXES["media"], Probe(3, b"\x00\xff")),
    (EdgeInbox, Probed(3, ClipInfo(640, 480, 90, 29.97, 3.003))),
    (EdgeInbox, Probed(4, error=WireError(400, "no video", "invalid_video"))),
    (
        VitInbox,
        Encode(1, MmHash("a"), (1, 2, 2), ArenaRef(ActorName("media:0"), Epoch(1), 0, 12), (1, 2, 2, 3), (3, 1)),
    ),
    (VitInbox, Restore(2, MmHash("a"), 4, (7, 0), (3, 1))),
    (SupervisorInbox, Hello(EDGE, Epoch(3), 99, PROTOCOL_VERSION, "ipc:///x")),
    (SupervisorInbox, Ready(VitReady(HostSlabExport("slab/vit:0/1", 4, 16, 64, "float32")))),
    (SupervisorInbox, AdminAnswer(7, Cancelled(1))),
    (ControlInbox, AdminAsk(7, EmptyCaches(("prefix",)))),
    (ControlInbox, PeerUp(EDGE, Epoch(3), "ipc:///x", EdgeReady())),
]


class Canary:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize(("union", "message"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_a_message_comes_back_equal_with_its_sender_and_epoch(union: Any, message: Message) -> None:
    assert FrameDecoder[Any](union).decode([HEADER, encode_message(message)]) == (EDGE, 3, message)


def test_a_message_of_another_channel_is_refused() -> None:
    with pytest.raises(BadFrame):
        FrameDecoder[Any](VitInbox).decode([HEADER, encode_message(SUBMIT)])


@pytest.mark.parametrize(
    "header",
    [
        msgspec.msgpack.encode([PROTOCOL_VERSION + 1, "edge:0", 1]),
        msgspec.msgpack.encode([PROTOCOL_VERSION, "edge:0", 0]),
        msgspec.msgpack.encode([PROTOCOL_VERSION, "", 1]),
        msgspec.msgpack.encode([PROTOCOL_VERSION, "x" * 65, 1]),
        msgspec.msgpack.encode([PROTOCOL_VERSION, "edge:0", 1, "more"]),
        msgspec.msgpack.encode([PROTOCOL_VERSION, "edge:0"]),
        b"",
    ],
)
def test_a_wrong_header_is_refused(header: bytes) -> None:
    with pytest.raises(BadFrame):
        FrameDecoder[Any](SchedulerInbox).decode([header, encode_message(SUBMIT)])


@pytest.mark.parametrize("num_frames", [0, 1, 3])
def test_a_wrong_number_of_frames_is_refused(num_frames: int) -> None:
    with pytest.raises(BadFrame):
        FrameDecoder[Any](SchedulerInbox).decode([HEADER] * num_frames)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_refused_and_not_loaded(protocol: int, tmp_path: Path) -> None:
    canary = tmp_path / "loaded"
    payload = pickle.dumps(Canary(canary), protocol)
    for frames in ([HEADER, payload], [payload, payload], [HEADER, msgspec.msgpack.encode(["Abort", payload])]):
        for union in (*INBOXES.values(), SupervisorInbox, ControlInbox):
            with pytest.raises(BadFrame):
                FrameDecoder[Any](union).decode(frames)
    assert not canary.exists()


def test_ext_types_are_refused_wherever_they_stand() -> None:
    decoder = FrameDecoder[Any](SchedulerInbox)
    rng = random.Random(0)
    modules = set(sys.modules)
    for _ in range(20_000):
        ext = msgspec.msgpack.Ext(rng.randrange(-128, 128), rng.randbytes(rng.choice((0, 1, 4, 8, 12, 16, 33))))
        body = msgspec.msgpack.encode(rng.choice((ext, ["Abort", ext], [ext, "r1"], ["Submit", "r", [ext]])))
        with pytest.raises(BadFrame):
            decoder.decode([HEADER, body])
    assert set(sys.modules) == modules


@given(st.binary(max_size=200), st.binary(max_size=60))
def test_arbitrary_bytes_give_a_message_or_bad_frame_and_nothing_else(body: bytes, header: bytes) -> None:
    for union in (SchedulerInbox, SupervisorInbox):
        for frames in ([HEADER, body], [header, body]):
            with contextlib.suppress(BadFrame):
                FrameDecoder[Any](union).decode(frames)


@given(st.data())
def test_mutated_messages_give_a_message_or_bad_frame_and_nothing_else(data: st.DataObject) -> None:
    union, message = data.draw(st.sampled_from(EXAMPLES))
    body = bytearray(encode_message(message))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        sender, epoch, decoded = FrameDecoder[Any](union).decode([HEADER, bytes(body)])
    except BadFrame:
        return
    assert (sender, epoch) == (EDGE, 3)
    assert isinstance(decoded, Message)


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(BadFrame):
        FrameDecoder[Any](SchedulerInbox).decode([HEADER, b"\x92\xa5Abort" + b"\x91" * 100_000])


def test_abort_is_small() -> None:
    assert len(encode_message(Abort(RequestId("r1")))) < 16
