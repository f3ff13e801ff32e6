"""Fields that restrict an answer's text: what they accept, what they refuse, and what the grammar lets through."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from msgspec import Raw

from tests.actors.edge.grammars import Vocabulary, load_vocabulary
from tests.actors.edge.schemas import random_schema
from vlmrt.actors.edge.json_schema import MAX_KEYS, MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH
from vlmrt.actors.edge.response_format import (
    MAX_GRAMMAR_BYTES,
    MAX_REGEX_BYTES,
    OutputGrammar,
    ResponseFormat,
    StructuredOutputs,
    output_grammar,
)
from vlmrt.runtime.errors import RequestError


@pytest.fixture(scope="module")
def vocabulary(checkpoint: Path) -> Vocabulary:
    return load_vocabulary(checkpoint)


def raw(value: object) -> Raw:
    return Raw(json.dumps(value).encode())


def of_response_format(value: object) -> OutputGrammar | None:
    return output_grammar(msgspec.json.decode(json.dumps(value), type=ResponseFormat))


def of_schema(schema: object) -> OutputGrammar:
    body = json.dumps({"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}})
    grammar = output_grammar(msgspec.json.decode(body, type=ResponseFormat))
    assert grammar is not None
    return grammar


def of_structured_outputs(value: object) -> OutputGrammar | None:
    return output_grammar(None, msgspec.json.decode(json.dumps(value), type=StructuredOutputs))


def test_no_field_and_text_restrict_nothing() -> None:
    assert output_grammar() is None
    assert of_response_format({"type": "text"}) is None


def test_a_json_object_is_any_object_with_few_blanks(vocabulary: Vocabulary) -> None:
    grammar = of_response_format({"type": "json_object"})
    assert grammar is not None
    for text in ("{}", '{"a": [1, null, {"b": "ä"}]}', '{\n    "a": 1,\n    "b": 2\n}'):
        assert vocabulary.accepts(grammar.text, text), text
    for text in ("[]", '"a"', "1", '{"a":   1}', '{"a":\n\n1}', " {}", '{"a"}', "{} "):
        assert not vocabulary.accepts(grammar.text, text), text


def test_a_schema_is_kept_to_and_its_own_compiler_options_are_not(vocabulary: Vocabulary) -> None:
    grammar = of_schema(
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "required": ["a"],
            "additionalProperties": False,
            "x-guidance": {"whitespace_flexible": True, "item_separator": ";", "lenient": True},
        }
    )
    assert grammar.param == "response_format.json_schema.schema"
    assert vocabulary.accepts(grammar.text, '{"a": 1}')
    for text in ("{}", '{"a": "1"}', '{"a": 1, "b": 2}', '{"a":    1}'):
        assert not vocabulary.accepts(grammar.text, text), text


def test_blanks_may_be_left_out_altogether(vocabulary: Vocabulary) -> None:
    grammar = of_structured_outputs({"json_object": True, "disable_any_whitespace": True})
    assert grammar is not None
    assert vocabulary.accepts(grammar.text, '{"a":1}')
    assert not vocabulary.accepts(grammar.text, '{"a": 1}')


def test_a_schema_may_come_as_text(vocabulary: Vocabulary) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    for grammar in (
        of_structured_outputs({"json": json.dumps(schema)}),
        of_structured_outputs({"json": schema}),
        output_grammar(guided_json=raw(schema)),
        output_grammar(guided_json=raw(json.dumps(schema))),
    ):
        assert grammar is not None
        assert vocabulary.accepts(grammar.text, '{"a": 1}')
        assert not vocabulary.accepts(grammar.text, '{"a": 2}')


def test_a_regex_matches_the_whole_answer(vocabulary: Vocabulary) -> None:
    grammar = of_structured_outputs({"regex": r"\d{3}/[a-ü]+"})
    assert grammar is not None
    assert vocabulary.accepts(grammar.text, "123/äb")
    assert not vocabulary.accepts(grammar.text, "x123/äb")


def test_a_choice_is_one_of_its_texts_whatever_stands_in_them(vocabulary: Vocabulary) -> None:
    choices = ["a", "ab", 'say "x"\n', "größe/*", "👩‍👩‍👧‍👦", "\\d", "\t"]
    for grammar in (of_structured_outputs({"choice": choices}), output_grammar(guided_choice=choices)):
        assert grammar is not None
        assert all(vocabulary.accepts(grammar.text, choice) for choice in choices)
        assert not any(vocabulary.accepts(grammar.text, other) for other in ("", "b", "aab", "d", "1"))


def test_one_of_is_any_of_where_alternatives_exclude_each_other(vocabulary: Vocabulary) -> None:
    pets = [
        {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"], "additionalProperties": False}
        for kind in ("cat", "dog")
    ]
    references = {
        "oneOf": [{"$ref": "#/$defs/a~1b"}, {"$ref": "#/$defs/dog"}],
        "$defs": {"a/b": pets[0], "dog": pets[1]},
    }
    for schema in ({"oneOf": pets}, references, {"oneOf": [*pets, {"type": "null"}, {"type": "array"}][2:] + pets[:1]}):
        assert vocabulary.accepts(of_schema(schema).text, '{"kind": "cat"}')
        assert not vocabulary.accepts(of_schema(schema).text, '{"kind": "cow"}')


@pytest.mark.parametrize(
    "alternatives",
    [
        [{"type": "integer"}, {"type": "number"}],
        [{"const": 1}, {"enum": [1.0, 2]}],
        [{"type": "object", "properties": {"k": {"const": k}}} for k in "ab"],  # an object without k matches both
        [{"$ref": "#/nowhere"}, {"type": "string"}],
        [{"$ref": "#"}, {"type": "string"}],
    ],
)
def test_one_of_that_two_alternatives_may_match_is_refused(alternatives: list[object]) -> None:
    with pytest.raises(RequestError, match="oneOf") as caught:
        of_schema({"oneOf": alternatives})
    assert caught.value.param == "response_format.json_schema.schema"


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth - 1):
        schema = {"type": "array", "items": schema}
    return schema


def test_a_schema_of_the_greatest_depth_compiles(vocabulary: Vocabulary) -> None:
    grammar = of_schema(nested(MAX_SCHEMA_DEPTH))
    assert vocabulary.accepts(grammar.text, "[" * (MAX_SCHEMA_DEPTH - 1) + '""' + "]" * (MAX_SCHEMA_DEPTH - 1))


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        (nested(MAX_SCHEMA_DEPTH + 1), "nested deeper than 100"),
        (json.loads("[" * 900 + "]" * 900), "must be a JSON object"),
        ({"type": "object", "properties": {f"p{i}": {} for i in range(MAX_KEYS + 1)}}, "an object of 1001 keys"),
        ({"patternProperties": {f"^a{i}$": {} for i in range(33)}}, "33 patternProperties"),
        ({"properties": {"a": {"type": "integer", "multipleOf": 10**9}}}, r"multipleOf of 1\.00e"),
        ({"properties": {"a": {"type": "number", "multipleOf": 9999.999}}}, r"multipleOf of 1\.00e"),
        ({"description": "x" * MAX_SCHEMA_BYTES}, f"more than {MAX_SCHEMA_BYTES}"),
        ({"anyOf": [{"oneOf": [{"const": i} for i in range(n, n + 100)]} for n in range(6)]}, "500 alternatives"),
        ({"enum": [[]] * 20_000}, "more than 20000 lists and objects"),
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        (True, "must be a JSON object"),
    ],
)
def test_a_schema_beyond_a_limit_is_refused(schema: object, problem: str) -> None:
    with pytest.raises(RequestError, match=problem) as caught:
        of_schema(schema)
    assert (caught.value.status, caught.value.param) == (400, "response_format.json_schema.schema")


def test_a_schema_nested_a_million_times_is_refused() -> None:
    with pytest.raises(RequestError, match="nested deeper"):
        output_grammar(guided_json=Raw(b'{"a":' * 20_000 + b"1" + b"}" * 20_000))


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({"type": "xml"}, "response_format.type"),
        ({"type": "structural_tag"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}, "response_format.json_schema.name"),
        ({"type": "json_schema", "json_schema": {"name": "", "schema": {}}}, "response_format.json_schema.name"),
    ],
)
def test_a_wrong_response_format_names_its_field(value: object, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        output_grammar(msgspec.json.decode(json.dumps(value), type=ResponseFormat))
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({}, "structured_outputs"),
        ({"json_object": False}, "structured_outputs"),
        ({"regex": ""}, "structured_outputs.regex"),
        ({"regex": "x" * (MAX_REGEX_BYTES + 1)}, "structured_outputs.regex"),
        ({"choice": []}, "structured_outputs.choice"),
        ({"choice": ["a", ""]}, "structured_outputs.choice"),
        ({"choice": ["a"] * 5000}, "structured_outputs.choice"),
        ({"choice": ["é" * MAX_GRAMMAR_BYTES]}, "structured_outputs.choice"),
        ({"grammar": "  "}, "structured_outputs.grammar"),
        ({"grammar": '{"grammars": []}'}, "structured_outputs.grammar"),
        ({"grammar": "#" * (MAX_GRAMMAR_BYTES + 1)}, "structured_outputs.grammar"),
        ({"grammar": 'start: %json {"multipleOf": 123456789}'}, "structured_outputs.grammar"),
        ({"grammar": 'start: %json {"a": '}, "structured_outputs.grammar"),
        ({"structural_tag": {}, "regex": "a"}, "structured_outputs.structural_tag"),
        ({"regex": "a", "choice": ["a"]}, "structured_outputs.choice"),
    ],
)
def test_a_wrong_structured_output_names_its_field(value: object, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        of_structured_outputs(value)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_only_one_field_may_restrict_the_answer() -> None:
    with pytest.raises(RequestError, match="restricted by response_format already") as caught:
        output_grammar(ResponseFormat("json_object"), guided_regex="a")
    assert caught.value.param == "guided_regex"


@pytest.mark.parametrize("seed", range(25))
def test_whatever_a_senseless_model_ends_is_valid_for_its_schema(seed: int, vocabulary: Vocabulary) -> None:
    rng = random.Random(seed)
    schema = random_schema(rng)
    grammar = of_schema(schema)
    texts = [vocabulary.random_text(grammar.text, rng) for _ in range(4)]
    for text in texts:
        if text is not None:
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    assert any(texts), schema
