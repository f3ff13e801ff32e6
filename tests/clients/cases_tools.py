"""Tools: calls that are asked for, streamed, and answered."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from pydantic import BaseModel

from tests.clients.api import Api, about_a_red_disc, asking, joined, parse_helper, raises, stream_helper
from tests.clients.cases import each

Color = Literal["red", "blue"]
WITHIN: dict[str, Any] = {"max_tokens": 300}


def _tool(name: str, strict: bool | None = None) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}},
        "required": ["color"],
        "additionalProperties": False,
    }
    function = {"name": name, "description": f"{name} in a color", "parameters": parameters}
    return {"type": "function", "function": function if strict is None else {**function, "strict": strict}}


PAINT, MIX = _tool("paint"), _tool("mix")
NAMED = {"type": "function", "function": {"name": "mix"}}


def _check_call(call: Any, names: tuple[str, ...] = ("paint", "mix")) -> None:
    assert call.type == "function"
    assert call.function.name in names
    assert isinstance(call.function.arguments, str)
    assert json.loads(call.function.arguments)["color"] in ("red", "blue")


@each(choice=[None, "auto"])
def a_model_that_may_call_may_also_answer(api: Api, choice: str | None) -> None:
    message = api.chat(tools=[PAINT], tool_choice=choice).choices[0].message
    assert message.content or message.tool_calls


def a_model_that_may_not_call_answers(api: Api) -> None:
    choice = api.chat(tools=[PAINT], tool_choice="none").choices[0]
    assert choice.message.content
    assert not choice.message.tool_calls
    assert choice.finish_reason in ("stop", "length")


def tools_are_part_of_the_prompt(api: Api) -> None:
    assert api.chat(tools=[PAINT, MIX]).usage.prompt_tokens > api.chat().usage.prompt_tokens + 20


def no_tools_is_a_list_of_none(api: Api) -> None:
    assert api.chat(tools=[], max_tokens=2).choices


@each(temperature=[0, 1.5])
def a_required_call_is_made(api: Api, temperature: float) -> None:
    for seed in range(3):
        choice = api.chat(
            tools=[PAINT, MIX], tool_choice="required", temperature=temperature, seed=seed, parallel_tool_calls=False,
            **WITHIN,
        ).choices[0]  # fmt: skip
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        _check_call(call)
        assert call.id.startswith("call_")
        assert not choice.message.content


def a_named_call_is_made_and_ends_with_stop(api: Api) -> None:
    choice = api.chat(tools=[PAINT, MIX], tool_choice=NAMED, **WITHIN).choices[0]
    assert choice.finish_reason == "stop"
    (call,) = choice.message.tool_calls
    _check_call(call, ("mix",))


def allowed_tools_narrow_the_choice(api: Api) -> None:
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}
    choice = api.chat(tools=[PAINT, MIX], tool_choice=allowed, parallel_tool_calls=False, **WITHIN).choices[0]
    _check_call(choice.message.tool_calls[0], ("mix",))


@each(choice=["required", "named"])
def a_call_is_streamed_in_pieces(api: Api, choice: str) -> None:
    fields = {
        "tools": [PAINT, MIX],
        "tool_choice": NAMED if choice == "named" else "required",
        "parallel_tool_calls": False,
        **WITHIN,
    }
    whole = api.chat(**fields).choices[0]
    chunks = list(api.chat(stream=True, **fields))
    deltas = [
        call for chunk in chunks for part in chunk.choices for call in part.delta.tool_calls or () if part.index == 0
    ]
    first, *others = deltas
    assert first.index == 0
    assert first.id.startswith("call_")
    assert first.type == "function"
    assert first.function.name == whole.message.tool_calls[0].function.name
    assert all(call.index == 0 and call.id is None and call.function.name is None for call in others)
    arguments = "".join(call.function.arguments or "" for call in deltas)
    assert arguments == whole.message.tool_calls[0].function.arguments
    assert joined(chunks) == ""
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason


def the_stream_helper_puts_calls_together(api: Api) -> None:
    fields = asking(tools=[_tool("paint", strict=True)], tool_choice="required", parallel_tool_calls=False, **WITHIN)
    with stream_helper(api.client)(**fields) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    _check_call(call)
    (done,) = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert done.arguments == call.function.arguments


def parse_reads_arguments_into_the_model(api: Api) -> None:
    class Paint(BaseModel):
        color: Color

    tool = openai.pydantic_function_tool(Paint, name="paint")
    answer = parse_helper(api.client)(
        **asking(tools=[tool], tool_choice="required", parallel_tool_calls=False, **WITHIN)
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Paint)


def the_result_of_a_call_is_part_of_the_dialogue(api: Api) -> None:
    fields: dict[str, Any] = {"tools": [PAINT], "tool_choice": "required", "parallel_tool_calls": False}
    called = api.chat(**fields, **WITHIN).choices[0].message
    turns = [
        {"role": "user", "content": "Hello"},
        called,
        {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": '{"done": true}'},
    ]
    answer = api.chat(messages=turns, tools=[PAINT], tool_choice="none")
    assert answer.choices[0].message.content


def a_call_about_a_picture_is_made(api: Api) -> None:
    choice = api.chat(about_a_red_disc(), tools=[PAINT], tool_choice="required", **WITHIN).choices[0]
    for call in choice.message.tool_calls:
        _check_call(call)


def every_choice_makes_its_call(api: Api) -> None:
    choices = api.chat(
        tools=[PAINT], tool_choice="required", n=2, temperature=1.5, seed=1, parallel_tool_calls=False, **WITHIN
    ).choices
    assert len(choices) == 2
    assert len({choice.message.tool_calls[0].id for choice in choices}) == 2


@each(
    fields=[
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tool_choice": "required"},
        {"tools": [PAINT], "tool_choice": {"type": "function", "function": {"name": "sing"}}},
        {"tools": [PAINT], "tool_choice": "sometimes"},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "wizard"}}}],
         "tool_choice": "required"},
    ]
)  # fmt: skip
def a_tool_that_is_none_is_a_bad_request(api: Api, fields: dict[str, Any]) -> None:
    error = raises(openai.BadRequestError, lambda: api.chat(**fields))
    assert error.param.startswith("tool")
