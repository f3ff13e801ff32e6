"""Tools written into messages read, to the byte, as the template of Qwen2.5's language models writes them."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.actors.edge.test_prompt import PUBLIC_TEMPLATE
from vlmrt.actors.edge.chat_template import ChatTemplate
from vlmrt.actors.edge.tool_prompt import SYSTEM_TEXT, template_calls, write_tools
from vlmrt.actors.edge.tools import CalledFunction, MadeCall
from vlmrt.runtime.errors import RequestError

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Das Wetter in größeren Städten <heute> & morgen's",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "wait"}},
]
WEATHER = MadeCall(CalledFunction("get_weather", '{"city":"Köln",  "days": [1,2.50], "ok":true}'), id="call_1")
WAIT = MadeCall(CalledFunction("wait", ""))


def reference(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
    """What Qwen2.5's template makes of texts, with the system text that Qwen-VL has."""

    def turn(role: str, text: str) -> str:
        return f"<|im_start|>{role}\n{text}<|im_end|>\n"

    system = messages[0]["content"] if messages[0]["role"] == "system" else "You are a helpful assistant."
    if tools:
        system += (
            "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
            "function signatures within <tools></tools> XML tags:\n<tools>\n"
            + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
            + "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
            '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
            "<args-json-object>}\n</tool_call>"
        )
    text = turn("system", system)
    for index, message in enumerate(messages):
        match message["role"]:
            case "system" if index == 0:
                pass
            case "assistant" if message.get("tool_calls"):
                text += "<|im_start|>assistant"
                if message["content"]:
                    text += "\n" + message["content"]
                for call in message["tool_calls"]:
                    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                    name = call["function"]["name"]
                    text += f'\n<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
                text += "<|im_end|>\n"
            case "tool":
                if messages[index - 1]["role"] != "tool":
                    text += "<|im_start|>user"
                text += f"\n<tool_response>\n{message['content']}\n</tool_response>"
                if index + 1 == len(messages) or messages[index + 1]["role"] != "tool":
                    text += "<|im_end|>\n"
            case role:
                text += turn(role, message["content"])
    return text + "<|im_start|>assistant\n"


def render(messages: list[dict[str, Any]]) -> str:
    return ChatTemplate(PUBLIC_TEMPLATE).render(messages)


def user(text: str = "How is the weather?") -> dict[str, Any]:
    return {"role": "user", "content": text}


def system(text: str = "Be brief.") -> dict[str, Any]:
    return {"role": "system", "content": text}


def assistant(text: str, *calls: MadeCall) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "tool_calls": template_calls(calls, "messages[1].tool_calls")}


def result(text: str = '{"degrees": 21}') -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": "call_1"}


DIALOGUES: list[list[dict[str, Any]]] = [
    [user()],
    [system(), user()],
    [system(""), user()],
    [user(), assistant("", WEATHER), result()],
    [system(), user(), assistant("Let me see.", WEATHER, WAIT), result(), result("done"), assistant("21 °C."), user()],
    [user(), assistant("", WAIT), result(""), user(), system("Later."), assistant("", WEATHER, WEATHER), result()],
]


@pytest.mark.parametrize("tools", [[], TOOLS, TOOLS[1:]])
@pytest.mark.parametrize("messages", DIALOGUES)
def test_prompts_equal_the_template_of_the_language_models(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> None:
    assert render(write_tools(messages, tools)) == reference(messages, tools)


@pytest.mark.parametrize("seed", range(20))
def test_random_dialogues_equal_the_template_of_the_language_models(seed: int) -> None:
    rng = random.Random(seed)
    turns = (lambda: user("äö\n"), result, lambda: assistant("", WAIT), lambda: assistant("So:", WEATHER, WAIT))
    messages = [user(), *(rng.choice(turns)() for _ in range(rng.randint(0, 8)))]
    tools = rng.sample(TOOLS, rng.randint(0, 2))
    assert render(write_tools(messages, tools)) == reference(messages, tools)


def test_messages_without_tools_are_left_as_they_are() -> None:
    messages = [user(), {"role": "assistant", "content": "Hi"}]
    assert write_tools(messages, []) == messages


def test_a_system_message_is_added_where_there_is_none() -> None:
    written = write_tools([user()], TOOLS)
    assert [message["role"] for message in written] == ["system", "user"]
    assert written[0]["content"].startswith(SYSTEM_TEXT + "\n\n# Tools\n\n")


def test_contents_of_parts_keep_their_pictures_in_their_order() -> None:
    text, picture = {"type": "text", "text": "Look: "}, {"type": "image"}
    written = write_tools(
        [
            {"role": "system", "content": [text]},
            {"role": "user", "content": [text, picture]},
            {"role": "assistant", "content": [text], "tool_calls": template_calls([WAIT], "x")},
            {"role": "tool", "content": [text, picture]},
            result("done"),
        ],
        TOOLS,
    )
    plain = [
        system("Look: "),
        user("Look: PICTURE"),
        assistant("Look: ", WAIT),
        result("Look: PICTURE"),
        result("done"),
    ]
    shown = render(written).replace("<|vision_start|><|image_pad|><|vision_end|>", "PICTURE")
    assert shown == reference(plain, TOOLS)
    assert shown.count("PICTURE") == 2


@pytest.mark.parametrize("arguments", ["[]", "{", "null", "1", '{"a": 1} {}'])
def test_arguments_that_are_no_object_name_their_field(arguments: str) -> None:
    with pytest.raises(RequestError) as caught:
        template_calls([WAIT, MadeCall(CalledFunction("f", arguments))], "messages[3].tool_calls")
    assert caught.value.param == "messages[3].tool_calls[1].function.arguments"
