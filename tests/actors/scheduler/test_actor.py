"""The shell: what State says is sent, a burst shares a step, metrics are copied."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support import FakeContext, make_config, peer_down, peer_up
from vlmrt.actors.scheduler.actor import SchedulerActor
from vlmrt.runtime.config import SchedulingOptions
from vlmrt.runtime.control_messages import EdgeReady, LlmReady, MediaReady, SchedulerReady, VitReady
from vlmrt.runtime.messages import (
    ActorName,
    CacheReset,
    HostSlabExport,
    LookUpMedia,
    MediaFound,
    MediaItem,
    MediaUnsent,
    Message,
    MmHash,
    NeedMedia,
    RequestId,
    ResetCache,
    Sampling,
    StepPlan,
    StepResult,
    StopRule,
    Submit,
    TokenBatch,
)
from vlmrt.runtime.questions import (
    CachesShown,
    EmptyCaches,
    ListRequests,
    RequestsOpen,
    ShowCaches,
    StopProfile,
    Tier,
)

EDGE, LLM = ActorName("edge:0"), ActorName("llm:0")


def submit(name: str, media: tuple[MediaItem, ...] = (), max_tokens: int = 3) -> Submit:
    return Submit(RequestId(name), tuple(range(20)), media, 0, Sampling(), StopRule(max_tokens))


async def turn() -> None:
    """Let the loop go round."""
    for _ in range(3):
        await asyncio.sleep(0)


async def started(context: FakeContext) -> SchedulerActor:
    actor = SchedulerActor(context)
    assert await actor.start() == SchedulerReady()
    await actor.peer_up(peer_up("edge:0", EdgeReady()))
    await actor.peer_up(peer_up("media:0", MediaReady(1 << 20)))
    await actor.peer_up(peer_up("llm:0", LlmReady(100)))
    return actor


async def test_requests_that_come_together_share_a_step(tmp_path: Path) -> None:
    async with FakeContext("scheduler:0", tmp_path) as context:
        actor = await started(context)
        for name in ("r1", "r2", "r3"):
            await actor.handle(submit(name), EDGE)
        assert context.outbox.take() == []
        await turn()
        plans = [sent.message for sent in context.outbox.take() if isinstance(sent.message, StepPlan)]
        assert [len(plan.rows) for plan in plans] == [3, 3]


async def test_a_result_is_answered_by_tokens_and_the_next_plan_at_once(tmp_path: Path) -> None:
    async with FakeContext("scheduler:0", tmp_path) as context:
        actor = await started(context)
        await actor.handle(submit("r1"), EDGE)
        await turn()
        context.outbox.take()
        await actor.handle(StepResult(1, (5,), 1.0), LLM)
        assert [type(sent.message) for sent in context.outbox.take()] == [TokenBatch, StepPlan]


async def test_an_item_that_could_not_be_handed_over_is_asked_for_again_without_another_event(tmp_path: Path) -> None:
    async with FakeContext("scheduler:0", tmp_path) as context:
        actor = await started(context)
        await actor.handle(submit("r1", (MediaItem(MmHash("a"), 0, 4, (1, 2, 2)),)), EDGE)
        need = await context.outbox.next()
        assert isinstance(need.message, NeedMedia)
        await actor.handle(MediaUnsent(RequestId("r1"), MmHash("a")), EDGE)
        assert (await context.outbox.next()).message == need.message


async def test_an_edge_that_takes_no_tokens_any_more_loses_its_requests_and_nobody_else_does(tmp_path: Path) -> None:
    async with FakeContext("scheduler:0", tmp_path) as context:
        actor = await started(context)
        await actor.peer_up(peer_up("edge:1", EdgeReady()))
        await actor.handle(submit("r1"), EDGE)
        await actor.handle(submit("r2"), ActorName("edge:1"))
        await turn()
        context.outbox.take()
        context.outbox.full.add(EDGE)
        await actor.handle(StepResult(1, (5, 6), 1.0), LLM)
        tokens, plan = (sent.message for sent in context.outbox.take())
        assert isinstance(tokens, TokenBatch)
        assert [output.request_id for output in tokens.outputs] == ["r2"]
        assert isinstance(plan, StepPlan)


async def test_an_edge_that_takes_tokens_again_hears_how_its_requests_ended(tmp_path: Path) -> None:
    async with FakeContext("scheduler:0", tmp_path) as context:
        actor = await started(context)
        await actor.handle(submit("cut", max_tokens=1), EDGE)
        await actor.handle(submit("given up"), EDGE)
        await turn()
        context.outbox.take()
        context.outbox.full.add(EDGE)
        await actor.handle(StepResult(1, (5, 6), 1.0), LLM)
        context.outbox.full.clear()
        actor.pay_edges()
        batches = [sent.message for sent in context.outbox.take() if sent.peer == EDGE]
        outputs = [output for batch in batches if isinstance(batch, TokenBatch) for output in batch.outputs]
        assert [(output.request_id, output.token_ids, output.finish_reason) for output in outputs] == [
            ("cut", (5,), "length"),
            ("given up", (6,), None),
            ("given up", (), None),
        ]
        assert outputs[2].error is not None
        assert outputs[2].error.status == 503
        await actor.handle(submit("next", max_tokens=1), EDGE)
        await turn()
        assert [type(sent.message) for sent in context.outbox.take()] == [StepPlan]


async def test_a_request_whose_picture_could_not_be_asked_for_ends(tmp_path: Path) -> None:
    async with FakeContext("scheduler:0", tmp_path) as context:
        actor = await started(context)
        context.outbox.full.add(EDGE)
        await actor.handle(submit("r1", (MediaItem(MmHash("a"), 0, 4, (1, 2, 2)),)), EDGE)
        context.outbox.full.clear()
        actor.pay_edges()
        (batch,) = (sent.message for sent in context.outbox.take())
        assert isinstance(batch, TokenBatch)
        assert [(output.request_id, output.error is not None) for output in batch.outputs] == [("r1", True)]


async def test_a_new_edge_is_not_told_what_its_predecessor_was_owed(tmp_path: Path) -> None:
    async with FakeContext("scheduler:0", tmp_path) as context:
        actor = await started(context)
        context.outbox.full.add(EDGE)
        await actor.handle(submit("r1", (MediaItem(MmHash("a"), 0, 4, (1, 2, 2)),)), EDGE)
        await actor.peer_down(peer_down("edge:0"))
        await actor.peer_up(peer_up("edge:0", EdgeReady(), epoch=2))
        context.outbox.full.clear()
        actor.pay_edges()
        assert context.outbox.take() == []


async def test_a_failure_while_planning_ends_the_actor(tmp_path: Path) -> None:
    async def plan_in_vain() -> None:
        async with FakeContext("scheduler:0", tmp_path) as context:
            actor = await started(context)

            def fail(peer: ActorName, message: Message) -> bool:
                raise OSError("no more")

            context.outbox.send = fail  # type: ignore[method-assign]
            await actor.handle(submit("r1"), EDGE)
            await turn()

    with pytest.raises(OSError, match="no more"):
        await plan_in_vain()


async def test_counters_and_gauges_reach_the_metrics(tmp_path: Path) -> None:
    async with FakeContext("scheduler:0", tmp_path) as context:
        actor = await started(context)
        await actor.handle(submit("r1", max_tokens=1), EDGE)
        await turn()
        await actor.handle(StepResult(1, (5,), 1.0), LLM)
        actor.copy_metrics()
        actor.copy_metrics()
        snapshot = context.metrics.snapshot()
        assert snapshot.counters["generation_tokens_total"] == 1
        assert snapshot.counters["prompt_tokens_total"] == 20
        assert snapshot.gauges["requests_running"] == 0


async def test_answers_that_an_edge_did_not_take_are_sent_later_and_cost_nobody_a_request(tmp_path: Path) -> None:
    async with FakeContext("scheduler:0", tmp_path) as context:
        actor = await started(context)
        await actor.handle(submit("r1"), EDGE)
        await turn()
        context.outbox.take()
        context.outbox.full.add(EDGE)
        await actor.handle(LookUpMedia(1, "", ("u",)), EDGE)
        await actor.handle(ResetCache(2, "prefix"), EDGE)
        context.outbox.full.clear()
        actor.pay_edges()
        assert [sent.message for sent in context.outbox.take()] == [MediaFound(1, (None,)), CacheReset(2)]


async def test_the_operator_sees_requests_in_the_order_in_which_they_run(tmp_path: Path) -> None:
    config = make_config(scheduling=SchedulingOptions(max_num_seqs=1))
    image = MediaItem(MmHash("a" * 32), 3, 4, (1, 4, 4))
    async with FakeContext("scheduler:0", tmp_path, config) as context:
        actor = await started(context)
        await actor.handle(submit("r1"), EDGE)
        await turn()
        await actor.handle(StepResult(1, (5,), 1.0), LLM)
        await actor.handle(submit("r2", (image,)), EDGE)
        found = await actor.answer(ListRequests())
    assert isinstance(found, RequestsOpen)
    assert found.num_open == 2
    first, second = found.rows
    assert (first.request_id, first.status, first.num_prompt_tokens, first.num_computed_tokens) == (
        "r1",
        "running",
        20,
        20,
    )
    assert (first.num_output_tokens, first.max_tokens, first.num_images) == (1, 3, 0)
    assert (second.request_id, second.status, second.num_computed_tokens) == ("r2", "waiting", 0)
    assert (second.num_images, second.num_rows, second.num_wanted) == (1, 4, 1)


async def test_the_operator_sees_the_caches_and_empties_them(tmp_path: Path) -> None:
    export = HostSlabExport("slab/vit:0/1", 8, 4, 16, "float32")
    async with FakeContext("scheduler:0", tmp_path) as context:
        actor = await started(context)
        await actor.peer_up(peer_up("vit:0", VitReady(export, num_host_pages=2)))
        await actor.handle(submit("r1", max_tokens=1), EDGE)
        await turn()
        before = await actor.answer(ShowCaches())
        assert before == CachesShown(
            prefix=(Tier("kv", 100, 2, 0, 0, 0),),
            embedding=(Tier("vit:0", 8, 0, 0, 4 * 16 * 4, 0), Tier("vit:0 host", 2, 0, 0, 4 * 16 * 4, 0)),
            num_aliases=0,
        )
        await actor.handle(StepResult(1, (5,), 1.0), LLM)
        kept = await actor.answer(ShowCaches())
        assert isinstance(kept, CachesShown)
        assert (kept.prefix[0].num_used, kept.prefix[0].num_cached) == (0, 1)  # one full block of 16 tokens
        emptied = await actor.answer(EmptyCaches(("prefix",)))
        assert isinstance(emptied, CachesShown)
        assert emptied.prefix[0].num_cached == 0
        assert await actor.answer(StopProfile()) is None
