"""The answer of a chat completion, and the messages it is an answer to."""

from __future__ import annotations

import time
from typing import Any

from tests.clients.api import Api, text_part
from tests.clients.cases import each

CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


def the_answer_has_the_shape_of_the_reference(api: Api) -> None:
    answer = api.chat()
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert abs(answer.created - time.time()) < 60
    assert answer.model in [card.id for card in api.client.models.list()]
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert choice.message.role == "assistant"
    assert "Hello" in choice.message.content
    assert choice.message.refusal is None
    assert not choice.message.tool_calls


def usage_adds_up(api: Api) -> None:
    usage = api.chat("What can you do?").usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens_details.reasoning_tokens == 0
    details = usage.prompt_tokens_details.model_dump()
    assert 0 <= details["cached_tokens"] <= usage.prompt_tokens
    assert details["image_tokens"] == 0
    assert details["text_tokens"] == usage.prompt_tokens


def every_answer_has_an_id_of_its_own(api: Api) -> None:
    assert len({api.chat(max_tokens=1).id for _ in range(4)}) == 4


@each(role=["system", "developer"])
def instructions_come_before_the_dialogue(api: Api, role: str) -> None:
    plain = api.chat(max_tokens=4).usage.prompt_tokens
    told = api.chat(messages=[{"role": role, "content": "Answer in one word."}, {"role": "user", "content": "Hello"}])
    assert told.usage.prompt_tokens != plain
    assert told.choices[0].message.content


def developer_is_another_word_for_system(api: Api) -> None:
    counts = [
        api.chat(messages=[{"role": role, "content": "Be brief."}, {"role": "user", "content": "Hi"}]).usage
        for role in ("system", "developer")
    ]
    assert counts[0].prompt_tokens == counts[1].prompt_tokens


def a_list_of_one_text_is_that_text(api: Api) -> None:
    one, other = api.chat("What can you do?"), api.chat([text_part("What can you do?")])
    assert one.usage.prompt_tokens == other.usage.prompt_tokens
    assert one.choices[0].message.content == other.choices[0].message.content


def a_system_message_may_have_parts(api: Api) -> None:
    system = {"role": "system", "content": [text_part("Be brief. "), text_part("Be kind.")]}
    assert api.chat(messages=[system, {"role": "user", "content": "Hello"}]).choices[0].message.content


def earlier_turns_count(api: Api) -> None:
    short = api.chat("And now?")
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! Send me a picture."},
        {"role": "user", "content": "And now?"},
    ]
    assert api.chat(messages=turns).usage.prompt_tokens > short.usage.prompt_tokens + 8


def names_of_speakers_are_accepted(api: Api) -> None:
    assert api.chat(messages=[{"role": "user", "name": "ann", "content": "Hello"}]).choices[0].message.content


def an_answer_may_be_put_back_as_the_client_dumps_it(api: Api) -> None:
    first = api.chat().choices[0].message
    turns = [{"role": "user", "content": "Hello"}, first.model_dump(), {"role": "user", "content": "Thanks"}]
    assert api.chat(messages=turns).choices[0].message.content


def an_answer_may_be_put_back_as_the_object_it_is(api: Api) -> None:
    first = api.chat().choices[0].message
    turns = [{"role": "user", "content": "Hello"}, first, {"role": "user", "content": "Thanks"}]
    assert api.chat(messages=turns).choices[0].message.content


@each(content=[None, ""])
def a_turn_of_tool_calls_needs_no_content(api: Api, content: str | None) -> None:
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": content, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "a red circle"},
    ]
    assert api.chat(messages=turns).choices[0].finish_reason in ("stop", "length")


def the_served_name_and_model_are_the_same(api: Api) -> None:
    name = api.client.models.list().data[0].id
    assert api.chat(model=name).choices[0].message.content == api.chat().choices[0].message.content


def fields_without_effect_are_accepted(api: Api) -> None:
    answer = api.chat(
        user="ann",
        metadata={"team": "vision"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
        modalities=["text"],
        extra_body={
            "safety_identifier": "s",
            "prompt_cache_key": "k",
            "reasoning_effort": "low",
            "verbosity": "low",
            "prediction": None,
            "audio": None,
        },
    )
    assert answer.choices[0].message.content


def nulls_are_fields_left_out(api: Api) -> None:
    answer = api.chat(
        extra_body={
            "stop": None,
            "seed": None,
            "n": None,
            "top_p": None,
            "logprobs": None,
            "tools": None,
            "response_format": None,
            "logit_bias": None,
            "stream_options": None,
            "tool_choice": None,
        },
    )
    assert answer.choices[0].message.content == api.chat().choices[0].message.content


def an_unknown_field_is_named_in_a_header(api: Api) -> None:
    raw = api.client.chat.completions.with_raw_response.create(
        model="model", messages=[{"role": "user", "content": "Hello"}], max_tokens=2, extra_body={"colour": "red"}
    )
    assert "colour" in raw.headers["x-vlmrt-ignored"]
    assert raw.parse().choices


def text_beyond_ascii_comes_back_whole(api: Api) -> None:
    answer = api.chat("Was heißt 漢字 🙂? é")
    assert "�" not in answer.choices[0].message.content
