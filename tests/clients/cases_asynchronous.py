"""The asynchronous client: what differs from the other is concurrency, cancellation and its own helpers."""

from __future__ import annotations

import asyncio
from typing import Any

import openai

from tests.clients.api import (
    BLUE,
    Api,
    about_a_red_disc,
    asking,
    joined,
    parse_helper,
    picture,
    stream_helper,
    text_part,
)
from tests.clients.cases import each
from tests.clients.cases_structured import Seen


def an_answer_is_awaited(api: Api) -> None:
    async def ask(client: Any) -> Any:
        return await client.chat.completions.create(**asking("What can you do?"))

    assert api.run(ask).choices[0].message.content == api.chat("What can you do?").choices[0].message.content


def a_stream_is_iterated(api: Api) -> None:
    async def ask(client: Any) -> list[Any]:
        return [chunk async for chunk in await client.chat.completions.create(**asking(stream=True))]

    assert joined(api.run(ask)) == api.chat().choices[0].message.content


@each(stream=[False, True])
def answers_asked_at_once_are_those_asked_alone(api: Api, stream: bool) -> None:
    told = [about_a_red_disc(), [picture(BLUE), text_part("What color is this?")], "Hello", "What can you do?"]

    async def ask(client: Any) -> list[str]:
        async def one(content: Any) -> str:
            answer = await client.chat.completions.create(**asking(content, stream=stream))
            if stream:
                return joined([chunk async for chunk in answer])
            text: str = answer.choices[0].message.content
            return text

        return await asyncio.gather(*(one(content) for content in told * 3))

    assert api.run(ask) == [api.chat(content).choices[0].message.content for content in told] * 3


def the_stream_helper_ends_with_the_whole(api: Api) -> None:
    async def ask(client: Any) -> Any:
        async with stream_helper(client)(**asking(n=2)) as stream:
            return await stream.get_final_completion()

    whole = api.chat().choices[0].message.content
    assert [choice.message.content for choice in api.run(ask).choices] == [whole, whole]


def parse_returns_the_model(api: Api) -> None:
    async def ask(client: Any) -> Any:
        return await parse_helper(client)(**asking(about_a_red_disc(), response_format=Seen, max_tokens=200))

    assert isinstance(api.run(ask).choices[0].message.parsed, Seen)


def a_cancelled_request_ends_the_work(api: Api) -> None:
    async def ask(client: Any) -> bool:
        fields = asking(max_tokens=3000, extra_body={"ignore_eos": True})
        task = asyncio.ensure_future(client.chat.completions.create(**fields))
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.wait([task])
        return bool(task.cancelled())

    assert api.run(ask)
    api.wait_until_idle()


def a_stream_closed_early_ends_the_work(api: Api) -> None:
    async def ask(client: Any) -> None:
        stream = await client.chat.completions.create(
            **asking(stream=True, max_tokens=3000, extra_body={"ignore_eos": True})
        )
        async for _ in stream:
            break
        await stream.close()

    api.run(ask)
    api.wait_until_idle()


def models_are_paged_through(api: Api) -> None:
    async def ask(client: Any) -> list[str]:
        return [card.id async for card in client.models.list()]

    assert api.run(ask) == [card.id for card in api.client.models.list()]


def a_wrong_value_is_raised(api: Api) -> None:
    async def ask(client: Any) -> str:
        try:
            await client.chat.completions.create(**asking(temperature=9))
        except openai.BadRequestError as error:
            return str(error.param)
        return "nothing"

    assert api.run(ask) == "temperature"


def raw_responses_have_headers(api: Api) -> None:
    async def ask(client: Any) -> Any:
        return await client.chat.completions.with_raw_response.create(**asking(max_tokens=1))

    assert api.run(ask).headers["x-request-id"]
