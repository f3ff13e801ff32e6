"""The newer responses API."""

from __future__ import annotations

from typing import Any

import openai

from tests.clients.api import Api, needs, picture_url, raises
from tests.clients.cases import each


def _create(api: Api, **fields: Any) -> Any:
    needs(1, 66, "client.responses")
    return api.client.responses.create(**{"model": "model", "temperature": 0, "max_output_tokens": 48, **fields})


def a_text_is_answered(api: Api) -> None:
    answer = _create(api, input="What can you do?")
    assert answer.object == "response"
    assert answer.status == "completed"
    assert answer.output_text == api.chat("What can you do?", max_tokens=48).choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def instructions_come_first(api: Api) -> None:
    short = _create(api, input="Hello").usage.input_tokens
    assert _create(api, input="Hello", instructions="Answer in one word, please.").usage.input_tokens != short


def a_picture_is_answered_about(api: Api) -> None:
    content = [
        {"type": "input_image", "image_url": picture_url(), "detail": "auto"},
        {"type": "input_text", "text": "What color is this?"},
    ]
    assert _create(api, input=[{"role": "user", "content": content}]).output_text == "Red."


def an_answer_is_streamed(api: Api) -> None:
    whole = _create(api, input="What can you do?").output_text
    events = list(_create(api, input="What can you do?", stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole
    assert events[-1].response.output_text == whole


def an_answer_cut_short_is_incomplete(api: Api) -> None:
    answer = _create(api, input="What can you do?", max_output_tokens=16, extra_body={"ignore_eos": True})
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"


@each(wrong=[{"temperature": 5}, {"input": [{"role": "wizard", "content": "Hello"}]}])
def a_wrong_value_is_a_bad_request(api: Api, wrong: dict[str, Any]) -> None:
    raises(openai.BadRequestError, lambda: _create(api, **{"input": "Hello", **wrong}))
