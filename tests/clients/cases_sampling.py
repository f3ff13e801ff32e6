"""What a client may say about how tokens are chosen and where the answer ends."""

from __future__ import annotations

from typing import Any

from tests.clients.api import Api
from tests.clients.cases import each

NUM_FREE_TOKENS = 48
FREE: dict[str, Any] = {  # the demo model is sure of its short answers: chance needs room
    "temperature": 2.0,
    "frequency_penalty": 2.0,
    "presence_penalty": 2.0,
    "max_tokens": NUM_FREE_TOKENS,
    "extra_body": {"ignore_eos": True},
}


def _text(answer: Any, index: int = 0) -> str:
    text: str = answer.choices[index].message.content
    return text


def temperature_zero_says_the_same_twice(api: Api) -> None:
    assert _text(api.chat("What can you do?")) == _text(api.chat("What can you do?"))


def a_seed_says_the_same_twice(api: Api) -> None:
    assert _text(api.chat(seed=7, **FREE)) == _text(api.chat(seed=7, **FREE))


def seeds_differ(api: Api) -> None:
    assert len({_text(api.chat(seed=seed, **FREE)) for seed in range(6)}) > 1


@each(seed=[-(2**63), 0, 2**63 - 1])
def every_seed_of_64_bits_is_accepted(api: Api, seed: int) -> None:
    assert api.chat(seed=seed, temperature=1, max_tokens=2).choices


@each(name=["max_tokens", "max_completion_tokens"])
def a_limit_ends_the_answer(api: Api, name: str) -> None:
    limits = {"max_tokens": None, name: 3}
    answer = api.client.chat.completions.create(
        model="model", messages=[{"role": "user", "content": "What can you do?"}], **limits
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3


def the_newer_limit_wins(api: Api) -> None:
    answer = api.chat("What can you do?", max_tokens=9, max_completion_tokens=2)
    assert answer.usage.completion_tokens == 2


def without_a_limit_the_answer_ends_by_itself(api: Api) -> None:
    answer = api.client.chat.completions.create(model="model", messages=[{"role": "user", "content": "Hello"}])
    assert answer.choices[0].finish_reason == "stop"


@each(stop=["shapes", ["shapes"], ["zzz", "es and", "shapes"]])
def a_stop_string_is_not_in_the_answer(api: Api, stop: str | list[str]) -> None:
    whole = _text(api.chat("What can you do?", max_tokens=64))
    answer = api.chat("What can you do?", stop=stop, max_tokens=64)
    ends = min(whole.index(word) for word in ([stop] if isinstance(stop, str) else stop) if word in whole)
    assert _text(answer) == whole[:ends]
    assert answer.choices[0].finish_reason == "stop"


def no_stop_is_a_list_of_none(api: Api) -> None:
    assert _text(api.chat(stop=[])) == _text(api.chat(stop=None)) == _text(api.chat())


def a_bias_of_a_hundred_forces_a_token(api: Api) -> None:
    (token_id,) = api.token_ids("red")[:1]
    answer = api.chat(logit_bias={str(token_id): 100}, max_tokens=3, logprobs=True)
    assert len({entry.token for entry in answer.choices[0].logprobs.content}) == 1
    assert answer.usage.completion_tokens == 3


def a_bias_of_minus_a_hundred_bans_a_token(api: Api) -> None:
    plain = api.chat(max_tokens=1, extra_body={"return_token_ids": True}).model_dump()
    token_id = plain["choices"][0]["token_ids"][0]
    banned = api.chat(
        max_tokens=1, logit_bias={str(token_id): -100}, extra_body={"return_token_ids": True}
    ).model_dump()
    assert banned["choices"][0]["token_ids"][0] != token_id


def an_empty_bias_changes_nothing(api: Api) -> None:
    assert _text(api.chat(logit_bias={})) == _text(api.chat())


def three_choices_are_three_answers(api: Api) -> None:
    answer = api.chat(n=3, **FREE)
    assert sorted(choice.index for choice in answer.choices) == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert answer.usage.completion_tokens == 3 * NUM_FREE_TOKENS


def choices_without_chance_are_equal(api: Api) -> None:
    answer = api.chat(n=3)
    assert {choice.message.content for choice in answer.choices} == {_text(api.chat())}
    assert answer.usage.prompt_tokens == api.chat().usage.prompt_tokens


def seeded_choices_come_again(api: Api) -> None:
    one, other = (api.chat(n=3, seed=11, **FREE) for _ in range(2))
    assert [choice.message.content for choice in one.choices] == [choice.message.content for choice in other.choices]


@each(
    fields=[
        {"top_p": 0.5},
        {"top_p": 1.0},
        {"frequency_penalty": 2.0},
        {"frequency_penalty": -2.0},
        {"presence_penalty": 1.5},
        {"temperature": 2.0},
    ]
)
def a_field_of_the_reference_is_accepted_at_its_bound(api: Api, fields: dict[str, float]) -> None:
    assert api.chat(**{"temperature": 1.0, "max_tokens": 8, **fields}).choices[0].finish_reason in ("stop", "length")


@each(
    fields=[
        {"top_k": 1},
        {"top_k": -1},
        {"min_p": 0.2},
        {"repetition_penalty": 1.2},
        {"min_tokens": 8},
        {"ignore_eos": True},
        {"stop_token_ids": [5]},
        {"skip_special_tokens": True},
        {"cache_salt": "mine"},
        {"priority": -1},
        {"return_token_ids": True},
    ]
)
def a_field_of_vllm_is_accepted(api: Api, fields: dict[str, Any]) -> None:
    answer = api.chat(temperature=1.0, max_tokens=8, extra_body=fields)
    assert answer.choices[0].finish_reason in ("stop", "length")


def top_k_of_one_is_greedy(api: Api) -> None:
    sampled = api.chat(temperature=2.0, extra_body={"top_k": 1})
    assert _text(sampled) == _text(api.chat())


def ignored_ends_and_least_tokens_hold(api: Api) -> None:
    assert api.chat(max_tokens=40, extra_body={"ignore_eos": True}).usage.completion_tokens == 40
    least = api.chat(max_tokens=40, extra_body={"min_tokens": 30})
    assert least.usage.completion_tokens >= 30
