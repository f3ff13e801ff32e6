"""Tools of a request: which may be called, what is refused, and what the grammar of calls lets through."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from msgspec import Raw

from tests.actors.edge.grammars import Vocabulary, load_vocabulary, with_call_marks
from tests.actors.edge.schemas import random_schema
from tests.actors.edge.tool_calls import join
from vlmrt.actors.edge.response_format import OutputGrammar, ResponseFormat, output_grammar
from vlmrt.actors.edge.tool_parser import NamedCallParser, RequiredCallParser, ToolCallParser
from vlmrt.actors.edge.tools import Tool, ToolChoice, ToolUse, answer_grammar, call_tags, tool_use
from vlmrt.runtime.errors import RequestError

POINT = {
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/number"}},
    "required": ["x"],
    "additionalProperties": False,
    "$defs": {"number": {"type": "integer"}},
}
MOVE = {"type": "function", "function": {"name": "move", "description": "Move there.", "parameters": POINT}}
WAIT = {"type": "function", "function": {"name": "wait"}}


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def tools(*values: object) -> list[Tool]:
    return msgspec.json.decode(json.dumps(values), type=list[Tool])


def choice(value: object) -> ToolChoice:
    decoded: ToolChoice = msgspec.json.decode(json.dumps(value), type=ToolChoice)
    return decoded


def use(value: object, *given: object, parallel: bool | None = None) -> ToolUse:
    return tool_use(tools(*(given or (MOVE, WAIT))), choice(value), parallel)


@pytest.fixture(scope="module", params=["text", "tokens", "special tokens"])
def vocabulary(checkpoint: Path, request: pytest.FixtureRequest) -> Vocabulary:
    """Of a tokenizer without marks of calls, and of ones that have them."""
    if request.param == "text":
        return load_vocabulary(checkpoint)
    text = (checkpoint / "tokenizer.json").read_text(encoding="utf-8")
    return Vocabulary(with_call_marks(text, special=request.param == "special tokens"))


def grammar_of(use: ToolUse, vocabulary: Vocabulary, answer: OutputGrammar | None = None) -> str:
    grammar = answer_grammar(use, answer, call_tags(vocabulary.tokenizer))
    assert grammar is not None
    return grammar.text


def test_without_a_choice_tools_may_be_called() -> None:
    assert tool_use(None, None).mode == "none"
    assert tool_use([], None).mode == "none"
    assert tool_use([], "auto").mode == "none"
    auto = tool_use(tools(MOVE, WAIT), None)
    assert (auto.mode, [tool.name for tool in auto.allowed], auto.max_calls) == ("auto", ["move", "wait"], 128)
    assert tool_use(tools(MOVE), "none") == ToolUse("none")
    assert tool_use(tools(MOVE), "auto", False).max_calls == 1


def test_definitions_are_what_the_client_sent_in_the_order_of_templates() -> None:
    odd = {"function": {"strict": True, **MOVE["function"]}, "type": "function"}  # type: ignore[dict-item]
    shown = [tool.definition() for tool in use("auto", odd, WAIT).shown]
    assert json.dumps(shown) == json.dumps([MOVE, WAIT])


def test_a_named_tool_is_called_once_with_all_shown() -> None:
    named = use({"type": "function", "function": {"name": "wait"}})
    assert (named.mode, [tool.name for tool in named.allowed], named.max_calls) == ("named", ["wait"], 1)
    assert [tool.name for tool in named.shown] == ["move", "wait"]


def test_allowed_tools_are_a_part_of_the_tools() -> None:
    for mode in ("auto", "required"):
        reference = {"type": "function", "function": {"name": "wait"}}
        allowed = use({"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [reference]}})
        assert (allowed.mode, [tool.name for tool in allowed.allowed]) == (mode, ["wait"])


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("required", "tool_choice"),
        ({"type": "function", "function": {"name": "move"}}, "tool_choice.function.name"),
        ({"type": "function"}, "tool_choice.function"),
        ({"type": "allowed_tools"}, "tool_choice.allowed_tools"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}, "tool_choice.allowed_tools.tools"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [WAIT]}},
            "tool_choice.allowed_tools.tools[0].function.name",
        ),
    ],
)
def test_a_choice_without_its_tools_names_its_field(value: object, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        tool_use([], choice(value))
    assert (caught.value.status, caught.value.param) == (400, param)


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ([function(name="")], "tools[0].function.name"),
        ([function(name="a b")], "tools[0].function.name"),
        ([MOVE, function(name="x" * 65)], "tools[1].function.name"),
        ([MOVE, MOVE], "tools[1].function.name"),
        ([function(name=f"f{index}") for index in range(129)], "tools"),
        ([function(parameters=[])], "tools[0].function.parameters"),
        ([function(parameters={"oneOf": [{}, {}]})], "tools[0].function.parameters"),
        ([function(name=f"f{i}", parameters={"multipleOf": 9973}) for i in range(3)], "tools"),
        ([function(name=f"f{i}", parameters={"title": "x" * 100_000}) for i in range(3)], "tools"),
    ],
)
def test_wrong_tools_name_their_field(given: list[object], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        tool_use(tools(*given), None)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_the_old_fields_are_refused_with_the_new_ones_named() -> None:
    for field, new in (("functions", "tools"), ("function_call", "tool_choice")):
        with pytest.raises(RequestError, match=f"send {new} instead") as caught:
            tool_use(None, None, **{field: Raw(b"[]")})  # type: ignore[arg-type]
        assert caught.value.param == field


def test_tools_that_may_be_called_restrict_nothing(vocabulary: Vocabulary) -> None:
    tags = call_tags(vocabulary.tokenizer)
    assert answer_grammar(use("auto"), None, tags) is None
    regex = output_grammar(guided_regex="a+")
    assert answer_grammar(use("auto"), regex, tags) is regex
    assert answer_grammar(use("none"), regex, tags) is regex


def test_a_required_answer_is_calls_and_nothing_else(vocabulary: Vocabulary) -> None:
    grammar = grammar_of(use("required"), vocabulary)
    move, wait = call("move", '{"x": 1}'), call("wait", "{}")
    for text in (move, wait, f"{move}\n{wait}\n{move}"):
        assert vocabulary.accepts(grammar, text), text
    for text in ("", "Hello", move[:-1], f"{move}{wait}", f"{move}\n", call("wait", '{"x": 1}'), call("move", "{}")):
        assert not vocabulary.accepts(grammar, text), text


def test_one_call_is_all_where_calls_are_not_parallel(vocabulary: Vocabulary) -> None:
    grammar = grammar_of(use("required", parallel=False), vocabulary)
    wait = call("wait", "{}")
    assert vocabulary.accepts(grammar, wait)
    assert not vocabulary.accepts(grammar, f"{wait}\n{wait}")


def test_the_answer_of_a_named_tool_is_its_arguments(vocabulary: Vocabulary) -> None:
    grammar = grammar_of(use({"type": "function", "function": {"name": "move"}}), vocabulary)
    assert vocabulary.accepts(grammar, '{"x": 1}')
    assert not vocabulary.accepts(grammar, '{"x": ""}')


def test_a_schema_of_the_text_leaves_the_model_free_to_call(vocabulary: Vocabulary) -> None:
    answer = output_grammar(ResponseFormat("json_object"))
    grammar = grammar_of(use("auto"), vocabulary, answer)
    for text in ('{"done": true}', call("wait", "{}")):
        assert vocabulary.accepts(grammar, text), text
    for text in ("Hello", '{"done": true}' + call("wait", "{}"), "[]"):
        assert not vocabulary.accepts(grammar, text), text


@pytest.mark.parametrize("value", ["required", {"type": "function", "function": {"name": "wait"}}])
def test_an_answer_that_must_be_a_call_cannot_be_something_else(value: object, vocabulary: Vocabulary) -> None:
    answer = output_grammar(ResponseFormat("json_object"))
    with pytest.raises(RequestError) as caught:
        answer_grammar(use(value), answer, call_tags(vocabulary.tokenizer))
    assert caught.value.param == "response_format"


def test_a_function_that_takes_no_object_cannot_be_required(vocabulary: Vocabulary) -> None:
    wrong = function(parameters={"type": "array"})
    assert use("auto", wrong).mode == "auto"
    with pytest.raises(RequestError, match="takes an object") as caught:
        answer_grammar(use("required", wrong), None, call_tags(vocabulary.tokenizer))
    assert caught.value.param == "tools[0].function.parameters.type"


@pytest.mark.parametrize("seed", range(8))
def test_whatever_a_senseless_model_calls_is_parsed_and_valid(seed: int, vocabulary: Vocabulary) -> None:
    rng = random.Random(seed)
    schemas = {f"f{index}": random_schema(rng) for index in range(rng.randint(1, 4))}
    given = [function(name=name, parameters=schema) for name, schema in schemas.items()]
    asked = use("required", *given, parallel=bool(seed % 2))
    grammar = grammar_of(asked, vocabulary)
    texts = [text for _ in range(3) if (text := vocabulary.random_text(grammar, rng, 1500))]
    for text in texts:
        early, late = RequiredCallParser(iter("abcdefgh").__next__), ToolCallParser(128, iter("abcdefgh").__next__)
        content, calls = join([*early.push(text), *early.flush()])
        assert (content, calls) == join([*late.push(text), *late.flush()])
        assert content == ""
        assert 1 <= len(calls) <= asked.max_calls
        for one in calls:
            jsonschema.Draft202012Validator(schemas[one.name]).validate(json.loads(one.arguments))
    name = rng.choice(list(schemas))
    grammar = grammar_of(use({"type": "function", "function": {"name": name}}, *given), vocabulary)
    text = vocabulary.random_text(grammar, rng, 1500)
    if text is not None:
        _, (one,) = join(NamedCallParser(name).push(text))
        jsonschema.Draft202012Validator(schemas[name]).validate(json.loads(one.arguments))
    assert texts or text
