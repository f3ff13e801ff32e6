"""Models, and the older completions of plain prompts."""

from __future__ import annotations

from typing import Any

import openai

from tests.clients.api import Api, raises
from tests.clients.cases import each


def _text(answer: Any) -> str:
    text: str = answer.choices[0].text
    return text


def models_are_listed(api: Api) -> None:
    (card, *_) = api.client.models.list().data
    assert card.object == "model"
    assert isinstance(card.created, int)
    assert card.owned_by
    assert card.model_dump()["max_model_len"] == 4096


def models_are_paged_through(api: Api) -> None:
    names = [card.id for card in api.client.models.list()]
    assert names
    assert len(set(names)) == len(names)


def a_served_model_is_retrieved(api: Api) -> None:
    name = api.client.models.list().data[0].id
    assert api.client.models.retrieve(name).id == name
    assert api.client.models.retrieve("model").id


@each(name=["gpt-nothing", "org/name", "a b"])
def a_model_that_is_not_served_is_not_found(api: Api, name: str) -> None:
    error = raises(openai.NotFoundError, lambda: api.client.models.retrieve(name))
    assert error.code == "model_not_found"


def a_completion_has_the_shape_of_the_reference(api: Api) -> None:
    answer = api.completion("There is a red")
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    (choice,) = answer.choices
    assert (choice.index, choice.logprobs) == (0, None)
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def token_ids_are_a_prompt(api: Api) -> None:
    ids = api.token_ids("There is a red")
    one, other = api.completion(ids), api.completion("There is a red")
    assert one.usage.prompt_tokens == len(ids)
    assert _text(one) == _text(other)


@each(kind=["texts", "token ids"])
def many_prompts_are_answered_in_order(api: Api, kind: str) -> None:
    texts = ["There is a red", "I can name", "Hello"]
    prompts: list[Any] = [api.token_ids(text) for text in texts] if kind == "token ids" else list(texts)
    answer = api.completion(prompts)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.text for choice in answer.choices] == [_text(api.completion(text)) for text in texts]


def several_answers_to_several_prompts_are_grouped(api: Api) -> None:
    answer = api.completion(["There is a red", "Hello"], n=2)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]


def the_prompt_may_be_echoed(api: Api) -> None:
    plain = _text(api.completion("There is a red"))
    assert _text(api.completion("There is a red", echo=True)) == "There is a red" + plain


@each(count=[0, 1, 5])
def completions_have_logprobs(api: Api, count: int) -> None:
    choice = api.completion("There is a red", logprobs=count).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset)
    assert found.text_offset[0] == 0
    if count:
        assert all(len(others) >= 1 for others in found.top_logprobs)


def a_stop_ends_a_completion(api: Api) -> None:
    whole = _text(api.completion("I can name", max_tokens=24))
    word = whole.split()[-1]
    answer = api.completion("I can name", max_tokens=24, stop=word)
    assert _text(answer) == whole[: whole.index(word)]
    assert answer.choices[0].finish_reason == "stop"


@each(fields=[{}, {"stream_options": {"include_usage": True}}])
def a_completion_is_streamed(api: Api, fields: dict[str, Any]) -> None:
    whole = api.completion("I can name")
    chunks = list(api.completion("I can name", stream=True, **fields))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == _text(whole)
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    if fields:
        assert chunks[-1].choices == []
        assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def seeds_hold_in_completions(api: Api) -> None:
    one, other = (_text(api.completion("Hello", seed=5, temperature=2)) for _ in range(2))
    assert one == other


@each(
    wrong=[
        ("suffix", {"suffix": "end"}),
        ("best_of", {"best_of": 3}),
        ("max_tokens", {"max_tokens": -1}),
        ("logprobs", {"logprobs": 99}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [99_999_999]}),
    ]
)
def a_wrong_completion_is_a_bad_request(api: Api, wrong: tuple[str, dict[str, Any]]) -> None:
    param, fields = wrong
    error = raises(openai.BadRequestError, lambda: api.completion(**{"prompt": "Hello", **fields}))
    assert error.param.startswith(param)
