"""Gates hold only where the config allows them; the fake context is an ActorContext."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support import FakeContext, make_config
from vlmrt.runtime.actor import ActorContext
from vlmrt.runtime.config import SupervisionOptions
from vlmrt.runtime.errors import ChannelFull
from vlmrt.runtime.faults import gate, gate_in_thread, hold_file
from vlmrt.runtime.messages import Abort, ActorName, RequestId


async def test_a_held_gate_opens_when_the_file_goes(tmp_path: Path) -> None:
    config = make_config(supervision=SupervisionOptions(fault_hooks=True))
    context: ActorContext = FakeContext("vit:0", tmp_path, config)
    held = hold_file(tmp_path, "vit.encode")
    held.touch()
    waiters = [
        asyncio.create_task(gate(context, "vit.encode")),
        asyncio.create_task(asyncio.to_thread(gate_in_thread, context, "vit.encode")),
    ]
    await gate(context, "vit.other")
    done, _ = await asyncio.wait(waiters, timeout=0.05)
    assert not done
    held.unlink()
    await asyncio.wait_for(asyncio.gather(*waiters), 10)


async def test_without_the_option_a_gate_never_holds(tmp_path: Path) -> None:
    context = FakeContext("vit:0", tmp_path)
    hold_file(tmp_path, "vit.encode").touch()
    await asyncio.wait_for(gate(context, "vit.encode"), 10)
    gate_in_thread(context, "vit.encode")


async def test_the_fake_outbox_records_and_obeys(tmp_path: Path) -> None:
    async with FakeContext("edge:0", tmp_path) as context:
        abort, scheduler = Abort(RequestId("r")), ActorName("scheduler:0")
        assert context.outbox.send(scheduler, abort)
        assert await context.outbox.next() == (scheduler, abort)
        context.outbox.down.add(scheduler)
        assert not context.outbox.send(scheduler, abort)
        context.outbox.full.add(scheduler)
        with pytest.raises(ChannelFull):
            context.outbox.send(scheduler, abort)
        context.create_task(asyncio.sleep(3600), name="sleeper")
