"""An edge on a loopback port, and the scheduler's part played by the test."""

from __future__ import annotations

import asyncio
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
from vlmrt.runtime.errors import WireError
from vlmrt.runtime.messages import (
    Abort,
    ActorName,
    ActorStatus,
    Epoch,
    FinishReason,
    SchedulerReady,
    ServiceStatus,
    Submit,
    TokenBatch,
    TokenOutput,
    Usage,
)

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
    ) -> None:
        """News of one request from the scheduler."""
        count = len(token_ids) if num_output_tokens is None else num_output_tokens
        usage = Usage(len(submit.prompt_token_ids), num_cached_tokens, count)
        output = TokenOutput(submit.request_id, tuple(token_ids), usage, finish_reason, error)
        await self.actor.handle(TokenBatch((output,)), SCHEDULER)

    async def answer(self, submit: Submit, text: str, finish_reason: FinishReason = "stop") -> None:
        """One token after the other, then the end."""
        ids = self.ids(text)
        for count, token_id in enumerate(ids, 1):
            last = finish_reason if count == len(ids) else None
            await self.output(submit, [token_id], last, num_output_tokens=count)
            await asyncio.sleep(0)

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
