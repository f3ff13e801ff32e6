"""The client's own stream() helper, which puts chunks together by rules of its own."""

from __future__ import annotations

from typing import Any

import openai

from tests.clients.api import Api, about_a_red_disc, asking, raises, stream_helper
from tests.clients.cases import each

QUESTION = "What can you do?"


@each(fields=[{}, {"n": 3}, {"logprobs": True, "top_logprobs": 2}])
def the_final_completion_is_the_whole_one(api: Api, fields: dict[str, Any]) -> None:
    whole = api.chat(QUESTION, **fields)
    with stream_helper(api.client)(**asking(QUESTION, **fields)) as stream:
        final = stream.get_final_completion()
    assert final.object == "chat.completion"
    assert len(final.choices) == len(whole.choices)
    for one, other in zip(final.choices, whole.choices, strict=True):
        assert (one.index, one.message.role) == (other.index, "assistant")
        assert one.message.content == other.message.content
        assert one.finish_reason == other.finish_reason


def an_answer_cut_short_is_raised(api: Api) -> None:
    with stream_helper(api.client)(**asking(QUESTION, max_tokens=2)) as stream:
        assert raises(openai.LengthFinishReasonError, stream.get_final_completion)


def events_grow_to_the_text(api: Api) -> None:
    with stream_helper(api.client)(**asking(QUESTION)) as stream:
        events = list(stream)
    deltas = [event for event in events if event.type == "content.delta"]
    (done,) = [event for event in events if event.type == "content.done"]
    assert "".join(event.delta for event in deltas) == deltas[-1].snapshot == done.content
    assert done.content == api.chat(QUESTION).choices[0].message.content
    assert sum(event.type == "chunk" for event in events) >= len(deltas)


def logprob_events_come_with_the_text(api: Api) -> None:
    with stream_helper(api.client)(**asking(QUESTION, logprobs=True)) as stream:
        events = list(stream)
    (done,) = [event for event in events if event.type == "logprobs.content.done"]
    whole = api.chat(QUESTION, logprobs=True).choices[0].logprobs.content
    assert [entry.token for entry in done.content] == [entry.token for entry in whole]


def usage_is_part_of_the_final_completion(api: Api) -> None:
    with stream_helper(api.client)(**asking(QUESTION, stream_options={"include_usage": True})) as stream:
        final = stream.get_final_completion()
    assert final.usage.completion_tokens == api.chat(QUESTION).usage.completion_tokens


def a_picture_is_streamed_about(api: Api) -> None:
    with stream_helper(api.client)(**asking(about_a_red_disc())) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.content == "Red."


def a_helper_left_early_ends_the_work(api: Api) -> None:
    with stream_helper(api.client)(**asking(max_tokens=3000, extra_body={"ignore_eos": True})) as stream:
        next(iter(stream))
    api.wait_until_idle()
