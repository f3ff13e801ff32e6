"""An edge on a loopback port, and the scheduler's part played by the test."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import aiohttp
from openai import AsyncOpenAI
from tokenizers import Tokenizer

from tests.support import FakeContext, Sent, make_config, peer_up
from vlmrt.actors.edge.actor import EdgeActor
from vlmrt.runtime.actor import ActorContext
from vlmrt.runtime.config import Config, ModelOptions
from vlmrt.runtime.control_messages import ActorStatus, SchedulerReady, ServiceStatus
from vlmrt.runtime.errors import WireError
from vlmrt.runtime.messages import (
    Abort,
    ActorName,
    Epoch,
    FinishReason,
    Submit,
    TokenBatch,
    TokenLogprobs,
    TokenOutput,
    Usage,
)
from vlmrt.runtime.timeline import Span

SCHEDULER = ActorName("scheduler:0")
MODEL = "test-model"


def edge_config(checkpoint: Path, **options: Any) -> Config:
    """A Config for an edge; `model` options replace those of the section, other sections are replaced whole."""
    model: dict[str, Any] = {"directory": str(checkpoint), "served_names": (MODEL,), "max_model_len": 2048}
    model |= options.pop("model", {})
    return make_config(model=ModelOptions(**model), **options)


class RunningEdge:
    """The actor, its port, and the words of the scheduler it talks to."""

    def __init__(self, actor: EdgeActor, context: FakeContext, port: int, tokenizer: Tokenizer) -> None:
        self.actor = actor
        self.context = context
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.tokenizer = tokenizer
        self._client: AsyncOpenAI | None = None

    @property
    def client(self) -> AsyncOpenAI:
        if self._client is None:
            self._client = AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20)
        return self._client

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    @property
    def sent(self) -> list[Sent]:
        return self.context.outbox.sent

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    async def tell_status(self) -> None:
        await self.actor.status(service_status())

    async def submitted(self) -> Submit:
        """The next Submit; anything else sent before it is an error."""
        message = (await self.context.outbox.next()).message
        assert isinstance(message, Submit), message
        return message

    async def aborted(self) -> Abort:
        message = (await self.context.outbox.next()).message
        assert isinstance(message, Abort), message
        return message

    async def output(
        self,
        submit: Submit,
        token_ids: Sequence[int] = (),
        finish_reason: FinishReason | None = None,
        *,
        error: WireError | None = None,
        num_output_tokens: int | None = None,
        num_cached_tokens: int = 0,
        spans: tuple[Span, ...] = (),
    ) -> None:
        """News of one request from the scheduler; with fake logprobs where they are asked for."""
        count = len(token_ids) if num_output_tokens is None else num_output_tokens
        usage = Usage(len(submit.prompt_token_ids), num_cached_tokens, count)
        num_top = submit.sampling.num_logprobs
        logprobs = tuple(fake_logprobs(token_id, num_top) for token_id in token_ids) if num_top >= 0 else ()
        output = TokenOutput(submit.request_id, tuple(token_ids), usage, finish_reason, error, logprobs, spans)
        await self.actor.handle(TokenBatch((output,)), SCHEDULER)

    async def answer(self, submit: Submit, text: str, finish_reason: FinishReason = "stop") -> None:
        """One token after the other, then the end."""
        ids = self.ids(text)
        for count, token_id in enumerate(ids, 1):
            last = finish_reason if count == len(ids) else None
            await self.output(submit, [token_id], last, num_output_tokens=count)
            await asyncio.sleep(0)

    @asynccontextmanager
    async def rambling(self, group: int = 3) -> AsyncIterator[list[Submit]]:
        """Answer every request with a random reply in groups of up to so many tokens; yields what was submitted."""
        rng = random.Random(group)
        submits: list[Submit] = []
        tasks: set[asyncio.Task[None]] = set()

        async def reply(submit: Submit) -> None:
            token_ids, reason = random_reply(submit, self.tokenizer.get_vocab_size())
            done = 0
            while done < len(token_ids):
                step = token_ids[done : done + rng.randint(1, group)]
                done += len(step)
                last = reason if done == len(token_ids) else None
                await self.output(submit, step, last, num_output_tokens=done, num_cached_tokens=1)
                for _ in range(rng.randrange(3)):
                    await asyncio.sleep(0)

        async def run() -> None:
            while True:
                message = (await self.context.outbox.next(3600)).message
                if isinstance(message, Submit):
                    submits.append(message)
                    tasks.add(asyncio.create_task(reply(message)))

        task = asyncio.create_task(run())
        try:
            yield submits
        finally:
            for running in (task, *tasks):
                running.cancel()
            await asyncio.gather(task, *tasks, return_exceptions=True)

    @asynccontextmanager
    async def answering(self, text: str) -> AsyncIterator[None]:
        """Answer every request with this text while the block runs."""

        async def run() -> None:
            while True:
                message = (await self.context.outbox.next(3600)).message
                if isinstance(message, Submit):
                    await self.answer(message, text)

        task = asyncio.create_task(run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def fake_logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """What a rank might say of a token: the token itself is the likeliest, those after it follow."""
    top = tuple((token_id + place, -token_id / 1024 - place) for place in range(num_top))
    return TokenLogprobs(-token_id / 1024, top)


def random_reply(submit: Submit, vocab_size: int) -> tuple[list[int], FinishReason]:
    """Tokens drawn by prompt and seed, mostly broken UTF-8; what ends them depends on the rule, as for a real rank."""
    rng = random.Random(f"{submit.prompt_token_ids} {submit.sampling.seed}")
    token_ids: list[int] = []
    while len(token_ids) < min(submit.stop.max_tokens, 40):
        token_ids.append(rng.randrange(vocab_size))
        if token_ids[-1] in submit.stop.stop_token_ids and len(token_ids) > submit.stop.min_tokens:
            return token_ids, "stop"
    return token_ids, "length"


def service_status(*states: tuple[str, str], ready: bool = True) -> ServiceStatus:
    actors = tuple(
        ActorStatus(ActorName(name), Epoch(1), 1, state, 0, 0.0, 0.0)  # type: ignore[arg-type]
        for name, state in states or (("edge:0", "ready"), ("scheduler:0", "ready"))
    )
    return ServiceStatus(ready, actors, {})


@asynccontextmanager
async def running_edge(config: Config, run_dir: Path, **options: Any) -> AsyncIterator[RunningEdge]:
    """A started edge whose scheduler is up and whose service is ready."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with FakeContext("edge:0", run_dir, config, listen_socket=listener) as context:
            actor = EdgeActor(cast(ActorContext, context), **options)
            await actor.start()
            await actor.peer_up(peer_up(SCHEDULER, SchedulerReady()))
            await actor.status(service_status())
            tokenizer = Tokenizer.from_file(str(Path(config.model.directory) / "tokenizer.json"))
            running = RunningEdge(actor, context, listener.getsockname()[1], tokenizer)
            try:
                yield running
            finally:
                await running.close()
                await actor.stop(0.0)


@asynccontextmanager
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(20)) as session:
        yield session
