"""What a client demands of the answer's text (JSON, a schema, a regex, a choice, a grammar) -> one grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher
from msgspec import Raw, Struct

from vlmrt.actors.edge.json_schema import JsonObject, check_cost, json_rule, read_schema
from vlmrt.actors.edge.refusals import NULL, is_null, refuse, short

MAX_GRAMMAR_BYTES = 256 << 10
MAX_REGEX_BYTES = 16 << 10
MAX_CHOICES = 4096
ANY_OBJECT: dict[str, Any] = {"type": "object"}
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

_INLINE_SCHEMA = re.compile(r"%json\s*(?=\{)")
_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)


class JsonSchemaFormat(Struct, frozen=True):
    name: str
    schema: JsonObject = NULL
    description: str | None = None
    strict: bool | None = None  # the schema is kept to either way


class ResponseFormat(Struct, frozen=True):
    """`response_format`: text, json_object or json_schema."""

    type: str
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Struct, frozen=True):
    """`structured_outputs`: exactly one of the first five."""

    json: Raw = NULL  # a schema, or a text that holds one
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    structural_tag: Raw = NULL


class OutputGrammar(Struct, frozen=True):
    """What an answer must match."""

    text: str  # Lark, or JSON of the grammar compiler's own
    param: str  # the field that asks for it
    rule: str = ""  # the same as an expression of a Lark rule, where it is a schema: it may be one of several forms
    is_gbnf: bool = False  # the text is still to be translated


class Demand(Struct, frozen=True):
    """One field of a request that restricts the answer."""

    param: str
    kind: str
    value: Any


def output_grammar(
    response_format: ResponseFormat | None = None,
    structured_outputs: StructuredOutputs | None = None,
    *,
    guided_json: Raw = NULL,
    guided_regex: str | None = None,
    guided_choice: Sequence[str] | None = None,
    guided_grammar: str | None = None,
) -> OutputGrammar | None:
    """The one grammar that these fields ask for; None: any text.

    Raises: RequestError 400 where a value is wrong, or where several fields restrict the answer.
    """
    demands = [
        *_of_response_format(response_format),
        *_of_structured_outputs(structured_outputs),
        *_present("guided_", json=guided_json, regex=guided_regex, choice=guided_choice, grammar=guided_grammar),
    ]
    if not demands:
        return None
    first, *others = demands
    if others:
        refuse(True, others[0].param, f": the answer is restricted by {first.param} already; send one of them")
    compact = bool(structured_outputs and structured_outputs.disable_any_whitespace)
    match first.kind:
        case "json":
            rule = json_rule(read_schema(first.value, first.param), compact=compact)
            grammar = OutputGrammar(f"start: {rule}", first.param, rule)
        case "json_object":
            rule = json_rule(ANY_OBJECT, compact=compact)
            grammar = OutputGrammar(f"start: {rule}", first.param, rule)
        case "regex":
            grammar = OutputGrammar(_regex(first.value, first.param), first.param)
        case "choice":
            grammar = OutputGrammar(_choice(first.value, first.param), first.param)
        case _:
            grammar = _own_grammar(first.value, first.param)
    check_size(grammar)
    return grammar


def check_size(grammar: OutputGrammar) -> None:
    """Raises: RequestError 400 where a grammar is longer than a rank takes."""
    num_bytes = len(grammar.text.encode())
    refuse(
        num_bytes > MAX_GRAMMAR_BYTES,
        grammar.param,
        f" makes a grammar of {num_bytes} bytes, more than {MAX_GRAMMAR_BYTES}",
        "grammar_too_large",
    )


def _present(prefix: str, **values: Any) -> list[Demand]:
    return [
        Demand(prefix + kind, kind, value)
        for kind, value in values.items()
        if value is not None and not (isinstance(value, Raw) and is_null(value))
    ]


def _of_response_format(response_format: ResponseFormat | None) -> list[Demand]:
    if response_format is None or response_format.type == "text":
        return []
    kind, asked = response_format.type, response_format.json_schema
    if kind == "json_object":
        return [Demand("response_format", "json_object", True)]
    known = "supported: text, json_object, json_schema"
    refuse(
        kind != "json_schema",
        "response_format.type",
        f" = {short(kind)} is not supported ({known})",
        "unsupported_value",
    )
    param = "response_format.json_schema"
    if asked is None:
        refuse(True, param, " is required", "missing_field")
        return []
    bad_name = not NAME.fullmatch(asked.name)
    refuse(bad_name, f"{param}.name", f" = {short(asked.name)!r} may hold 1 to 64 letters, digits, '_' and '-' only")
    refuse(is_null(asked.schema), f"{param}.schema", " is required", "missing_field")
    return [Demand(f"{param}.schema", "json", asked.schema)]


def _of_structured_outputs(asked: StructuredOutputs | None) -> list[Demand]:
    if asked is None:
        return []
    param = "structured_outputs"
    tagged = not is_null(asked.structural_tag)
    refuse(tagged, f"{param}.structural_tag", " is not supported; send a grammar", "unsupported_value")
    demands = _present(
        f"{param}.",
        json=asked.json,
        regex=asked.regex,
        choice=asked.choice,
        grammar=asked.grammar,
        json_object=asked.json_object or None,
    )
    refuse(not demands, param, " needs one of json, regex, choice, grammar and json_object", "missing_field")
    return demands


def _regex(pattern: str, param: str) -> str:
    num_bytes = len(pattern.encode())
    refuse(not pattern, param, " is empty")
    refuse(num_bytes > MAX_REGEX_BYTES, param, f" has {num_bytes} bytes, more than {MAX_REGEX_BYTES}")
    return LLMatcher.grammar_from_regex(pattern)


def _choice(choices: Sequence[str], param: str) -> str:
    refuse(not choices, param, " is an empty list: at least one text is needed")
    refuse(len(choices) > MAX_CHOICES, param, f" has {len(choices)} texts, more than {MAX_CHOICES}")
    refuse(not all(choices), param, " holds an empty text")
    return "start: " + " | ".join(map(lark_text, choices))


def lark_text(text: str) -> str:
    """A text as a Lark grammar quotes it."""
    return json.dumps(text, ensure_ascii=False)


def _own_grammar(text: str, param: str) -> OutputGrammar:
    """A client's Lark or GBNF; schemas within it keep to the limits of schemas."""
    num_bytes = len(text.encode())
    refuse(not text.strip(), param, " is empty")
    refuse(num_bytes > MAX_GRAMMAR_BYTES, param, f" has {num_bytes} bytes, more than {MAX_GRAMMAR_BYTES}")
    refuse(text.lstrip().startswith("{"), param, " must be a grammar in Lark or GBNF, not JSON")
    schemas = []
    for found in _INLINE_SCHEMA.finditer(text):
        try:
            schemas.append(json.JSONDecoder().raw_decode(text, found.end())[0])
        except (ValueError, RecursionError):
            refuse(True, param, f" has %json at character {found.start()} without a JSON object that can be read")
    check_cost(schemas, param)
    return OutputGrammar(text, param, is_gbnf=_GBNF_RULE.search(text) is not None)
