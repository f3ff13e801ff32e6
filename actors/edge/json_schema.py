"""JSON schemas from clients: read within limits of size, depth and cost, and written for the grammar compiler.

A compiler in a thread cannot be stopped, so what is known to cost it seconds or gigabytes is refused before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw

from vlmrt.actors.edge.refusals import refuse
from vlmrt.runtime.errors import RequestError

MAX_SCHEMA_BYTES = 256 << 10
MAX_SCHEMA_DEPTH = 100  # of lists and objects; the compiler's own parser ends at 128
MAX_KEYS = 1000  # of one object: properties cost the square of their number, 0.3 s for so many
MAX_ALL_KEYS = 20_000
MAX_PATTERN_PROPERTIES = 32  # every pair of patterns is proved disjoint: 0.3 ms each
MAX_MULTIPLES = 20_000  # all multipleOf of a schema together: each is an automaton of so many states
OPTIONS = "x-guidance"  # the compiler's options stand in the schema under this key
BLANKS = r" |\n[ \t]{0,32}"  # between the tokens of an answer: room for an indented one, an end for an endless one

JsonObject = Annotated[Raw, Meta(extra_json_schema={"type": "object"})]  # of a request; built only within the limits

_LOCAL = re.compile(r"#(?:/(?P<path>.*))?")


def read_schema(raw: Raw, param: str) -> dict[str, Any]:
    """A client's schema: an object, or a text that holds one.

    Raises: RequestError 400 where it is no object, or above a limit of size, depth or cost.
    """
    encoded = bytes(raw)
    too_long = len(encoded) > MAX_SCHEMA_BYTES
    refuse(too_long, param, f" has {len(encoded)} bytes, more than {MAX_SCHEMA_BYTES}", "schema_too_large")
    try:
        schema = msgspec.json.decode(encoded)
        schema = msgspec.json.decode(schema) if isinstance(schema, str) else schema
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{param} is not valid JSON: {error}", param=param, code="invalid_value") from None
    except RecursionError:
        schema = None
        refuse(True, param, f" is nested deeper than {MAX_SCHEMA_DEPTH}", "schema_too_large")
    refuse(not isinstance(schema, dict), param, " must be a JSON object")
    check_cost([schema], param)
    settled: dict[str, Any] = _without_one_of(schema, schema, param)
    return settled


def check_cost(schemas: Sequence[Any], param: str) -> None:
    """Refuse schemas that together cost the compiler too much.  Raises: RequestError 400."""
    num_keys, multiples = 0, Decimal(0)
    for value, depth in _nodes(schemas):
        too_deep = depth > MAX_SCHEMA_DEPTH
        refuse(too_deep, param, f" is nested deeper than {MAX_SCHEMA_DEPTH}", "schema_too_large")
        if not isinstance(value, dict):
            continue
        num_keys += len(value)
        too_many = len(value) > MAX_KEYS
        refuse(too_many, param, f" has an object of {len(value)} keys, more than {MAX_KEYS}", "schema_too_large")
        patterns = value.get("patternProperties")
        num_patterns = len(patterns) if isinstance(patterns, dict) else 0
        refuse(
            num_patterns > MAX_PATTERN_PROPERTIES,
            param,
            f" has {num_patterns} patternProperties in one object, more than {MAX_PATTERN_PROPERTIES}",
            "schema_too_large",
        )
        multiples += _num_states(value.get("multipleOf"))
    refuse(num_keys > MAX_ALL_KEYS, param, f" has {num_keys} keys, more than {MAX_ALL_KEYS}", "schema_too_large")
    above = multiples > MAX_MULTIPLES
    refuse(above, param, f" has multipleOf of {multiples:.3g} together, more than {MAX_MULTIPLES}", "schema_too_large")


def _nodes(schemas: Sequence[Any]) -> Iterator[tuple[Any, int]]:
    """Every list and object, with its depth."""
    waiting = [(schema, 1) for schema in schemas]
    while waiting:
        value, depth = waiting.pop()
        yield value, depth
        children = value.values() if isinstance(value, dict) else value
        waiting += [(child, depth + 1) for child in children if isinstance(child, dict | list)]


def _num_states(multiple: object) -> Decimal:
    """Of the automaton that tells multiples: the number without its decimal point."""
    if isinstance(multiple, bool) or not isinstance(multiple, int | float):
        return Decimal(0)
    number = Decimal(str(multiple))
    exponent = number.as_tuple().exponent
    return abs(number.scaleb(-min(0, exponent))) if isinstance(exponent, int) else Decimal(0)


def _without_one_of(value: Any, root: dict[str, Any], param: str) -> Any:
    """A copy in which every oneOf whose alternatives exclude each other is an anyOf, which the compiler knows."""
    if isinstance(value, list):
        return [_without_one_of(item, root, param) for item in value]
    if not isinstance(value, dict):
        return value
    copy = {key: _without_one_of(item, root, param) for key, item in value.items()}
    alternatives = value.get("oneOf")
    if isinstance(alternatives, list) and "anyOf" not in value:
        if not _exclude_each_other([_resolve(item, root) for item in alternatives]):
            raise RequestError(
                f"{param} has a oneOf whose alternatives are not told apart by type, const, enum or a required "
                "property with a const: use anyOf",
                param=param,
                code="unsupported_schema",
            )
        copy["anyOf"] = copy.pop("oneOf")
    return copy


def _resolve(schema: Any, root: dict[str, Any]) -> dict[str, Any]:
    """The schema that a local reference names; empty where there is none."""
    for _ in range(MAX_SCHEMA_DEPTH):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if reference is None:
            return schema if isinstance(schema, dict) else {}
        local = _LOCAL.fullmatch(reference) if isinstance(reference, str) else None
        if local is None:
            return {}
        schema = root
        for key in (local["path"] or "").split("/") if local["path"] else ():
            key = key.replace("~1", "/").replace("~0", "~")
            schema = schema.get(key) if isinstance(schema, dict) else None
    return {}


def _exclude_each_other(alternatives: Sequence[dict[str, Any]]) -> bool:
    """Whether no value can match two of them, as far as that is plain to see."""
    if _are_distinct([_values(item) for item in alternatives]) or _are_distinct(
        [_types(item) for item in alternatives]
    ):
        return True
    required = [set(_strings(item.get("required"))) for item in alternatives]
    for name in set.intersection(*required) if required else ():
        properties = [item.get("properties") for item in alternatives]
        if _are_distinct([_values(one.get(name)) if isinstance(one, dict) else set() for one in properties]):
            return True
    return False


def _are_distinct(sets: Sequence[set[bytes]]) -> bool:
    return all(sets) and sum(map(len, sets)) == len(set[bytes]().union(*sets))


def _values(schema: object) -> set[bytes]:
    """What const or enum allow, encoded; empty: anything.  1 and 1.0 are one value."""
    if not isinstance(schema, dict):
        return set()
    allowed = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(allowed, list):
        return set()
    plain = [int(item) if isinstance(item, float) and item.is_integer() else item for item in allowed]
    return {msgspec.json.encode(item, order="sorted") for item in plain}


def _types(schema: dict[str, Any]) -> set[bytes]:
    """An integer is a number."""
    kind = schema.get("type")
    return {
        name.replace("integer", "number").encode() for name in ([kind] if isinstance(kind, str) else _strings(kind))
    }


def _strings(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def json_rule(schema: dict[str, Any], *, compact: bool = False) -> str:
    """What matches the schema, as an expression of a grammar rule.

    Args: compact allows no blanks between the tokens of the answer.
    """
    options = {"whitespace_flexible": False} if compact else {"whitespace_pattern": BLANKS}
    return f"%json{msgspec.json.encode({**schema, OPTIONS: options}).decode()}"
