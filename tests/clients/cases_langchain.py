"""LangChain's chat model, which reads answers by its own rules on top of the openai package."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from tests.clients.api import BLUE, TIMEOUT_S, Api, picture, picture_url, text_part
from tests.clients.cases import each

QUESTION = "What can you do?"
COLOR = "What color is this?"


class Seen(BaseModel):
    """What is in a picture."""

    color: Literal["red", "blue"]
    round: bool


def _paint(color: Literal["red", "blue"]) -> str:
    """Paint everything in one color."""
    return f"all is {color}"


paint = tool("paint")(_paint)


def _model(api: Api, **fields: Any) -> Any:
    options = {"temperature": 0, "max_completion_tokens": 300, "max_retries": 0, "timeout": TIMEOUT_S, **fields}
    key = SecretStr(api.api_key or "none")
    return ChatOpenAI(model="model", base_url=f"{api.url}/v1", api_key=key, **options)


def a_text_is_answered(api: Api) -> None:
    answer = _model(api).invoke(QUESTION)
    assert isinstance(answer, AIMessage)
    assert answer.content == api.chat(QUESTION, max_tokens=64).choices[0].message.content
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.response_metadata["model_name"]
    assert answer.usage_metadata["total_tokens"] == sum(
        answer.usage_metadata[key] for key in ("input_tokens", "output_tokens")
    )


def a_dialogue_is_answered(api: Api) -> None:
    turns = [SystemMessage("Be brief."), HumanMessage("Hello"), AIMessage("Hello!"), HumanMessage(QUESTION)]
    assert _model(api).invoke(turns).content


def a_stream_is_the_whole_with_usage(api: Api) -> None:
    whole = _model(api).invoke(QUESTION)
    chunks = list(_model(api, stream_usage=True).stream(QUESTION))
    put_together = chunks[0]
    for chunk in chunks[1:]:
        put_together += chunk
    assert put_together.content == whole.content
    assert put_together.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
    assert put_together.response_metadata["finish_reason"] == "stop"


def a_batch_is_answered_in_order(api: Api) -> None:
    texts = [answer.content for answer in _model(api).batch([QUESTION, "Hello", QUESTION])]
    assert texts[0] == texts[2] != texts[1]


def answers_are_awaited_and_streamed_asynchronously(api: Api) -> None:
    async def ask() -> tuple[str, str]:
        model = _model(api)
        whole = (await model.ainvoke(QUESTION)).content
        return whole, "".join([chunk.content async for chunk in model.astream(QUESTION)])

    one, other = asyncio.run(ask())
    assert one == other


def stop_and_seed_are_passed_on(api: Api) -> None:
    answer = _model(api, seed=3, temperature=0).invoke(QUESTION, stop=["shapes"])
    assert "shapes" not in answer.content


def logprobs_are_part_of_the_metadata(api: Api) -> None:
    answer = _model(api).bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    entries = answer.response_metadata["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == answer.content


def several_answers_are_generated(api: Api) -> None:
    found = _model(api, n=2).generate([[HumanMessage("Hello")]])
    assert len(found.generations[0]) == 2


@each(method=["json_schema", "function_calling"])
def structured_output_is_the_model(api: Api, method: str) -> None:
    found = _model(api).with_structured_output(Seen, method=method, strict=True).invoke([_about(picture())])
    assert isinstance(found, Seen)


def structured_output_by_json_mode_is_json(api: Api) -> None:
    found = _model(api).with_structured_output(Seen, method="json_mode", include_raw=True).invoke("Answer in JSON")
    if found["raw"].response_metadata["finish_reason"] == "stop":
        assert isinstance(json.loads(found["raw"].content), dict)
    assert found["parsed"] is not None or found["parsing_error"] is not None


def structured_output_is_streamed(api: Api) -> None:
    *_, last = _model(api).with_structured_output(Seen, method="json_schema").stream([_about(picture())])
    assert isinstance(last, Seen)


@each(choice=["any", "paint"])
def bound_tools_are_called(api: Api, choice: str) -> None:
    bound = _model(api).bind_tools([paint], tool_choice=choice, parallel_tool_calls=False, strict=True)
    answer = bound.invoke("Paint")
    (call,) = answer.tool_calls
    assert call["name"] == "paint"
    assert call["args"]["color"] in ("red", "blue")
    assert call["id"].startswith("call_")
    assert answer.invalid_tool_calls == []
    result = ToolMessage(paint.invoke(call["args"]), tool_call_id=call["id"])
    ended = _model(api).bind_tools([paint], tool_choice="none").invoke([HumanMessage("Paint"), answer, result])
    assert ended.content


def calls_of_bound_tools_are_streamed(api: Api) -> None:
    bound = _model(api).bind_tools([paint], tool_choice="any", parallel_tool_calls=False, strict=True)
    chunks = list(bound.stream("Paint"))
    put_together = chunks[0]
    for chunk in chunks[1:]:
        put_together += chunk
    (call,) = put_together.tool_calls
    assert call["args"]["color"] in ("red", "blue")


def tools_that_need_not_be_called_may_be_bound(api: Api) -> None:
    answer = _model(api).bind_tools([paint]).invoke("Hello")
    assert answer.content or answer.tool_calls


@each(form=["openai", "langchain", "langchain url"])
def image_blocks_are_seen(api: Api, form: str) -> None:
    url = picture_url(BLUE)
    block = {
        "openai": picture(BLUE),
        "langchain": {"type": "image", "base64": url.partition(",")[2], "mime_type": "image/png"},
        "langchain url": {"type": "image", "url": url},
    }[form]
    assert _model(api).invoke([_about(block)]).content == "Blue."


def the_responses_api_is_used_where_asked_for(api: Api) -> None:
    answer = _model(api, use_responses_api=True).invoke(QUESTION)
    assert answer.text == _model(api).invoke(QUESTION).content


def _about(block: dict[str, Any]) -> HumanMessage:
    return HumanMessage([block, text_part(COLOR)])
