"""Logprobs of chat completions: bytes that are the text, probabilities that are one."""

from __future__ import annotations

import math
from typing import Any

from tests.clients.api import Api, about_a_red_disc
from tests.clients.cases import each


def _bytes(entries: Any) -> bytes:
    return b"".join(bytes(entry.bytes) for entry in entries)


@each(question=["What can you do?", "漢字 🙂?"])
def bytes_of_the_tokens_are_the_text(api: Api, question: str) -> None:
    choice = api.chat(question, logprobs=True).choices[0]
    assert _bytes(choice.logprobs.content).decode() == choice.message.content
    assert all(entry.logprob <= 0 for entry in choice.logprobs.content)
    assert all(entry.top_logprobs == [] for entry in choice.logprobs.content)


@each(count=[0, 1, 5, 20])
def as_many_others_are_named_as_were_asked_for(api: Api, count: int) -> None:
    entries = api.chat(logprobs=True, top_logprobs=count).choices[0].logprobs.content
    assert {len(entry.top_logprobs) for entry in entries} == {count}
    for entry in entries:
        values = [other.logprob for other in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) < 1 + 1e-4


def the_greedy_token_is_the_likeliest(api: Api) -> None:
    for entry in api.chat(logprobs=True, top_logprobs=2).choices[0].logprobs.content:
        best = entry.top_logprobs[0]
        assert (best.token, best.bytes) == (entry.token, entry.bytes)
        assert abs(best.logprob - entry.logprob) < 1e-4


def logprobs_are_the_models_own_at_any_temperature(api: Api) -> None:
    fields: dict[str, Any] = {"logprobs": True, "max_tokens": 1, "extra_body": {"top_k": 1}}
    cold, hot = (api.chat(temperature=value, **fields).choices[0].logprobs.content[0] for value in (0, 2))
    assert cold.token == hot.token
    assert abs(cold.logprob - hot.logprob) < 1e-3


def logprobs_say_how_sure_an_answer_about_a_picture_is(api: Api) -> None:
    choice = api.chat(about_a_red_disc(), logprobs=True, top_logprobs=3).choices[0]
    assert _bytes(choice.logprobs.content).decode() == choice.message.content
    assert choice.logprobs.content[0].logprob > math.log(0.5)


def tokens_that_a_stop_cut_have_none(api: Api) -> None:
    choice = api.chat("What can you do?", stop="shapes", logprobs=True).choices[0]
    assert _bytes(choice.logprobs.content).decode().rstrip() == choice.message.content.rstrip()


def every_choice_has_its_own(api: Api) -> None:
    for choice in api.chat(n=2, temperature=2.0, logprobs=True).choices:
        assert _bytes(choice.logprobs.content).decode("utf-8", "replace") == choice.message.content


def without_asking_there_are_none(api: Api) -> None:
    assert api.chat(logprobs=False).choices[0].logprobs is None
