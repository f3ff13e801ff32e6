"""One actor process without a process: its control channel is played by the test."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from tests.runtime.fake_actors import Recorder, Unstartable
from tests.runtime.services import fake_config, fake_specs, read_events
from vlmrt.runtime.actor import SUPERVISOR_LOST, Actor, ActorContext, ActorFactory, ActorProcess
from vlmrt.runtime.codec import FrameDecoder, encode_header, encode_message
from vlmrt.runtime.control import SUPERVISOR
from vlmrt.runtime.control_messages import (
    EdgeReady,
    Heartbeat,
    Hello,
    PeerUp,
    Progress,
    Ready,
    Shutdown,
    StartFailed,
    SupervisorInbox,
)
from vlmrt.runtime.messages import Abort, ActorName, Epoch, Message, RequestId
from vlmrt.runtime.spawner import START_FAILED, ProcessSpec
from vlmrt.runtime.transport import Sender, control_address, inbox_address, new_context


class Played:
    """A scheduler's process, and the supervisor's side of it."""

    def __init__(self, router: zmq.asyncio.Socket, ended: asyncio.Task[int], lifeline_writer: int) -> None:
        self.ended = ended
        self._router = router
        self._decoder = FrameDecoder[Any](SupervisorInbox)
        self._lifeline_writer = lifeline_writer

    async def hear(self, *kinds: type[Message]) -> Any:
        """The next report of one of these kinds."""
        async with asyncio.timeout(20):
            while True:
                name, *frames = await self._router.recv_multipart()
                sender, epoch, report = self._decoder.decode(frames)
                assert (name, sender, epoch) == (b"scheduler:0/3", "scheduler:0", 3)
                if isinstance(report, kinds):
                    return report

    async def tell(self, message: Message) -> None:
        await self.tell_frames(encode_header(SUPERVISOR, Epoch(1)), encode_message(message))

    async def tell_frames(self, *frames: bytes) -> None:
        await self._router.send_multipart([b"scheduler:0/3", *frames])

    def cut_lifeline(self) -> None:
        os.close(self._lifeline_writer)
        self._lifeline_writer = -1


def remove_sockets(folder: Path) -> None:
    for path in folder.glob("*.sock"):
        path.unlink()


@asynccontextmanager
async def played(run_root: Path, events: Path, factory: ActorFactory) -> AsyncIterator[Played]:
    config = fake_config(events)
    (actor,) = fake_specs(config, {"scheduler": "Recorder"})
    reader, writer = os.pipe()
    address = control_address(run_root)
    spec = ProcessSpec(
        actor=actor,
        epoch=Epoch(3),
        config=config,
        run_dir=str(run_root),
        control_address=address,
        inbox_address=inbox_address(run_root, actor.name, Epoch(3)),
        memory_path=str(run_root / "memory.sock"),
        parent_pid=os.getpid(),
        lifeline_fd=reader,
    )
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(address)
        process = ActorProcess(spec, lambda _path: factory)
        stage = Played(router, asyncio.create_task(process.run(None)), writer)
        try:
            yield stage
            await asyncio.wait_for(asyncio.shield(stage.ended), 20)
        finally:
            stage.ended.cancel()
            os.close(reader)
            if stage._lifeline_writer >= 0:
                os.close(stage._lifeline_writer)
    remove_sockets(run_root)


async def test_hello_then_progress_and_ready_then_shutdown(run_root: Path, tmp_path: Path) -> None:
    async with played(run_root, tmp_path, Recorder) as actor:
        hello = await actor.hear(Hello)
        assert (hello.actor, hello.epoch, hello.pid) == ("scheduler:0", 3, os.getpid())
        assert isinstance(await actor.hear(Progress, Ready), Progress)
        await actor.hear(Ready)
        await actor.tell(Shutdown(0.5))
        assert await asyncio.wait_for(actor.ended, 20) == 0
    assert read_events(tmp_path, "scheduler:0")[-1] == "3 stop"


async def test_an_actor_ends_itself_when_its_lifeline_is_cut(run_root: Path, tmp_path: Path) -> None:
    async with played(run_root, tmp_path, Recorder) as actor:
        await actor.hear(Ready)
        actor.cut_lifeline()
        assert await asyncio.wait_for(actor.ended, 20) == SUPERVISOR_LOST


async def test_a_failed_start_says_why_in_one_line(run_root: Path, tmp_path: Path) -> None:
    async with played(run_root, tmp_path, Unstartable) as actor:
        failed = await actor.hear(StartFailed)
        assert failed.message == "the checkpoint at --model has no weights"
        assert await asyncio.wait_for(actor.ended, 20) == START_FAILED


async def test_garbage_on_the_control_channel_is_counted_and_dropped(run_root: Path, tmp_path: Path) -> None:
    async with played(run_root, tmp_path, Recorder) as actor:
        await actor.hear(Ready)
        for frames in ((b"",), (b"\x80\x04pickle", b"?"), (encode_header(SUPERVISOR, Epoch(1)), b"\xc1")):
            await actor.tell_frames(*frames)
        await actor.tell(PeerUp(ActorName("edge:0"), Epoch(1), "ipc:///nowhere", EdgeReady()))
        deadline = time.monotonic() + 20
        beat = await actor.hear(Heartbeat)
        while beat.metrics.counters.get("bad_frames_total") != 3:
            assert time.monotonic() < deadline
            beat = await actor.hear(Heartbeat)
        await actor.tell(Shutdown(0.1))
        await asyncio.wait_for(actor.ended, 20)
    assert "3 up edge:0 1" in read_events(tmp_path, "scheduler:0")


async def test_a_task_that_raises_ends_the_actor(run_root: Path, tmp_path: Path) -> None:
    async def fail() -> None:
        raise RuntimeError("planted")

    def factory(context: ActorContext) -> Actor[Any]:
        context.create_task(fail(), name="fail")
        return Recorder(context)

    async with played(run_root, tmp_path, factory) as actor:
        (error,) = await asyncio.gather(actor.ended, return_exceptions=True)
        assert isinstance(error, ExceptionGroup)
        assert error.subgroup(RuntimeError) is not None
        actor.ended = asyncio.create_task(asyncio.sleep(0, 0))


async def test_a_heartbeat_tells_what_waits_what_was_not_sent_and_what_the_process_takes(
    run_root: Path, tmp_path: Path
) -> None:
    go_on = asyncio.Event()

    class Busy(Recorder):
        async def handle(self, message: Any, sender: ActorName) -> None:
            assert not self.context.outbox.send(ActorName("llm:0"), message)
            await go_on.wait()

    edge, epoch, deadline = ActorName("edge:0"), Epoch(1), time.monotonic() + 20
    async with played(run_root, tmp_path, Busy) as actor:
        await actor.hear(Ready)
        await actor.tell(PeerUp(edge, epoch, "ipc:///nowhere", EdgeReady()))
        context = new_context()
        sender = Sender(
            context, inbox_address(run_root, ActorName("scheduler:0"), Epoch(3)), encode_header(edge, epoch)
        )
        for number in range(3):
            sender.send(encode_message(Abort(RequestId(f"r{number}"))))
        beat = await actor.hear(Heartbeat)
        while beat.metrics.gauges["mailbox_depth"] != 2 or beat.metrics.gauges["mailbox_age_seconds"] == 0:
            assert time.monotonic() < deadline
            beat = await actor.hear(Heartbeat)
        assert beat.metrics.counters["unsent_messages_total"] == 1
        assert beat.metrics.counters["process_cpu_seconds_total"] > 0
        assert beat.metrics.gauges["resident_memory_bytes"] > 1 << 20
        go_on.set()
        await actor.tell(Shutdown(0.1))
        await asyncio.wait_for(actor.ended, 20)
        sender.close()
        context.term()
