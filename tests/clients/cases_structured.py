"""Structured output: response_format as it is written by hand, and parse() from a pydantic model."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from pydantic import BaseModel

from tests.clients.api import Api, about_a_red_disc, asking, joined, parse_helper, picture, raises, stream_helper
from tests.clients.cases import each


class Seen(BaseModel):
    color: Literal["red", "blue", "green"]
    round: bool


class Scene(BaseModel):
    things: tuple[Seen, Seen]
    background: Literal["white", "black"]


SCHEMA = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "blue", "green"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["color", "count"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}
WITHIN: dict[str, Any] = {"max_tokens": 200}


def _text(answer: Any) -> str:
    text: str = answer.choices[0].message.content
    return text


def _check(text: str) -> None:
    found = json.loads(text)
    assert set(found) == {"color", "count"}
    assert found["color"] in SCHEMA["properties"]["color"]["enum"]  # type: ignore[index]
    assert isinstance(found["count"], int)
    assert 0 <= found["count"] <= 9


def a_format_of_text_is_no_format(api: Api) -> None:
    assert _text(api.chat(response_format={"type": "text"})) == _text(api.chat())


@each(temperature=[0, 1.5])
def an_object_is_an_object(api: Api, temperature: float) -> None:
    for seed in range(3):
        answer = api.chat("JSON", response_format={"type": "json_object"}, temperature=temperature, seed=seed, **WITHIN)
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(_text(answer)), dict)
        else:
            assert answer.choices[0].finish_reason == "length"


@each(temperature=[0, 2.0])
def a_schema_is_kept(api: Api, temperature: float) -> None:
    for seed in range(4):
        answer = api.chat(about_a_red_disc(), response_format=FORMAT, temperature=temperature, seed=seed, **WITHIN)
        assert answer.choices[0].finish_reason == "stop"
        _check(_text(answer))


def a_schema_is_kept_in_a_stream(api: Api) -> None:
    whole = api.chat(about_a_red_disc(), response_format=FORMAT, **WITHIN)
    text = joined(api.chat(about_a_red_disc(), response_format=FORMAT, stream=True, **WITHIN))
    assert text == _text(whole)
    _check(text)


def a_schema_is_kept_by_every_choice(api: Api) -> None:
    for choice in api.chat(response_format=FORMAT, n=3, temperature=2.0, **WITHIN).choices:
        _check(choice.message.content)


def logprobs_come_with_a_schema(api: Api) -> None:
    choice = api.chat(response_format=FORMAT, logprobs=True, **WITHIN).choices[0]
    assert b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode() == choice.message.content


@each(
    fields=[
        {"structured_outputs": {"choice": ["left", "right"]}},
        {"structured_outputs": {"regex": "(left|right)"}},
        {"structured_outputs": {"json": {"enum": ["left", "right"]}}},
    ]
)
def vllms_other_constraints_are_kept(api: Api, fields: dict[str, Any]) -> None:
    answer = api.chat(temperature=2.0, extra_body=fields, **WITHIN)
    assert _text(answer).strip('"') in ("left", "right")
    assert answer.choices[0].finish_reason == "stop"


@each(model=[Seen, Scene])
def parse_returns_the_model(api: Api, model: type[BaseModel]) -> None:
    answer = parse_helper(api.client)(**asking(about_a_red_disc(), response_format=model, **WITHIN))
    found = answer.choices[0].message.parsed
    assert isinstance(found, model)
    assert model.model_validate_json(_text(answer)) == found
    assert answer.choices[0].message.refusal is None


def parse_of_every_choice_returns_the_model(api: Api) -> None:
    answer = parse_helper(api.client)(**asking(response_format=Seen, n=2, temperature=2.0, **WITHIN))
    assert all(isinstance(choice.message.parsed, Seen) for choice in answer.choices)


def parse_of_an_answer_cut_short_says_so(api: Api) -> None:
    error = raises(
        openai.LengthFinishReasonError,
        lambda: parse_helper(api.client)(**asking(response_format=Scene, max_tokens=2)),
    )
    assert "length" in str(error)


def parse_without_a_format_is_a_plain_answer(api: Api) -> None:
    answer = parse_helper(api.client)(**asking())
    assert answer.choices[0].message.parsed is None
    assert _text(answer) == _text(api.chat())


def the_stream_helper_returns_the_model(api: Api) -> None:
    with stream_helper(api.client)(**asking([picture()], response_format=Seen, **WITHIN)) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Seen)
    (done,) = [event for event in events if event.type == "content.done"]
    assert isinstance(done.parsed, Seen)


@each(
    form=[
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wizard"}}},
        {"type": "poem"},
    ]
)
def a_format_that_is_none_is_a_bad_request(api: Api, form: dict[str, Any]) -> None:
    error = raises(openai.BadRequestError, lambda: api.chat(response_format=form, max_tokens=4))
    assert error.param.startswith("response_format")
