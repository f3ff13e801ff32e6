"""JSON schemas from clients: read within limits of size, depth and cost, and written for the grammar compiler.

A compiler in a thread cannot be stopped, so what is known to cost it seconds or gigabytes is refused before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
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
MAX_NODES = 20_000  # lists and objects: this file visits each, 50 ms for so many
MAX_PATTERN_PROPERTIES = 32  # every pair of patterns is proved disjoint: 0.3 ms each
MAX_ALTERNATIVES = 500  # of all oneOf: they are compared with each other
MAX_DISCRIMINATORS = 16  # properties that may tell them apart
MAX_COMPARED = 256  # values of an enum that may
MAX_MULTIPLES = 20_000  # all multipleOf of a schema together: each is an automaton of so many states
OPTIONS = "x-guidance"  # the compiler's options stand in the schema under this key
BLANKS = r" |\n[ \t]{0,32}"  # between the tokens of an answer: room for an indented one, an end for an endless one

JsonObject = Annotated[Raw, Meta(extra_json_schema={"type": "object"})]  # of a request; built only within the limits

_NESTED = (dict, list)
_LOCAL = re.compile(r"#(?:/(?P<path>.*))?")


def read_schema(raw: Raw, param: str) -> dict[str, Any]:
    """A client's schema: an object, or a text that holds one.

    Raises: RequestError 400 where it is no object, or above a limit of size, depth or cost.
    """
    encoded = bytes(raw)
    if len(encoded) > MAX_SCHEMA_BYTES:
        raise _too_large(param, f"has {len(encoded)} bytes, more than {MAX_SCHEMA_BYTES}")
    try:
        schema = msgspec.json.decode(encoded)
        schema = msgspec.json.decode(schema) if isinstance(schema, str) else schema
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{param} is not valid JSON: {error}", param=param, code="invalid_value") from None
    except RecursionError:
        raise _too_large(param, f"is nested deeper than {MAX_SCHEMA_DEPTH}") from None
    refuse(not isinstance(schema, dict), param, " must be a JSON object")
    check_cost([schema], param)
    settled: dict[str, Any] = _OneOfs(schema, param).replaced(schema)
    return settled


def check_cost(schemas: Sequence[Any], param: str) -> None:
    """Refuse schemas that together cost the compiler too much.  Raises: RequestError 400."""
    num_nodes, num_keys, multiples = 0, 0, Decimal(0)
    waiting = [(schema, 1) for schema in schemas]
    while waiting:
        value, depth = waiting.pop()
        num_nodes += 1
        if num_nodes > MAX_NODES:
            raise _too_large(param, f"has more than {MAX_NODES} lists and objects")
        if depth > MAX_SCHEMA_DEPTH:
            raise _too_large(param, f"is nested deeper than {MAX_SCHEMA_DEPTH}")
        if isinstance(value, dict):
            num_keys += len(value)
            multiples += _num_states(value.get("multipleOf"))
            _check_object(value, param)
        children = value.values() if isinstance(value, dict) else value
        waiting += [(child, depth + 1) for child in children if type(child) in _NESTED]
    if num_keys > MAX_ALL_KEYS:
        raise _too_large(param, f"has {num_keys} keys, more than {MAX_ALL_KEYS}")
    if multiples > MAX_MULTIPLES:
        raise _too_large(param, f"has multipleOf of {multiples:.3g} together, more than {MAX_MULTIPLES}")


def _check_object(schema: dict[str, Any], param: str) -> None:
    if len(schema) > MAX_KEYS:
        raise _too_large(param, f"has an object of {len(schema)} keys, more than {MAX_KEYS}")
    patterns = schema.get("patternProperties")
    if isinstance(patterns, dict) and len(patterns) > MAX_PATTERN_PROPERTIES:
        problem = f"has {len(patterns)} patternProperties in one object, more than {MAX_PATTERN_PROPERTIES}"
        raise _too_large(param, problem)


def _too_large(param: str, problem: str) -> RequestError:
    return RequestError(f"{param} {problem}", param=param, code="schema_too_large")


def _num_states(multiple: object) -> Decimal:
    """Of the automaton that tells multiples: the number without its decimal point."""
    if isinstance(multiple, bool) or not isinstance(multiple, int | float):
        return Decimal(0)
    number = Decimal(str(multiple))
    exponent = number.as_tuple().exponent
    return abs(number.scaleb(-min(0, exponent))) if isinstance(exponent, int) else Decimal(0)


class _OneOfs:
    """Makes an anyOf, which the compiler knows, of every oneOf whose alternatives plainly exclude each other."""

    def __init__(self, root: dict[str, Any], param: str) -> None:
        self._root = root
        self._param = param
        self._num_alternatives = 0
        self._known_values: dict[int, set[bytes]] = {}  # by identity: many references may name one enum

    def replaced(self, value: Any) -> Any:
        """A copy of the value.  Raises: RequestError 400."""
        if isinstance(value, list):
            return [self.replaced(item) for item in value]
        if not isinstance(value, dict):
            return value
        copy = {key: self.replaced(item) for key, item in value.items()}
        alternatives = value.get("oneOf")
        if isinstance(alternatives, list) and "anyOf" not in value:
            self._check(alternatives)
            copy["anyOf"] = copy.pop("oneOf")
        return copy

    def _check(self, alternatives: list[Any]) -> None:
        self._num_alternatives += len(alternatives)
        if self._num_alternatives > MAX_ALTERNATIVES:
            raise _too_large(self._param, f"has more than {MAX_ALTERNATIVES} alternatives of oneOf")
        refuse(
            not self._exclude_each_other(list(map(self._resolve, alternatives))),
            self._param,
            " has a oneOf whose alternatives are not told apart by type, const, enum or a required property with a "
            "const: use anyOf",
            "unsupported_schema",
        )

    def _resolve(self, schema: Any) -> dict[str, Any]:
        """The schema that a local reference names; empty where there is none."""
        for _ in range(MAX_SCHEMA_DEPTH):
            reference = schema.get("$ref") if isinstance(schema, dict) else None
            if reference is None:
                return schema if isinstance(schema, dict) else {}
            local = _LOCAL.fullmatch(reference) if isinstance(reference, str) else None
            if local is None:
                return {}
            schema = self._root
            for key in local["path"].split("/") if local["path"] else ():
                key = key.replace("~1", "/").replace("~0", "~")
                schema = schema.get(key) if isinstance(schema, dict) else None
        return {}

    def _exclude_each_other(self, alternatives: Sequence[dict[str, Any]]) -> bool:
        """Whether no value can match two of them, as far as that is plain to see."""
        if not alternatives or _are_distinct(map(_types, alternatives)):
            return True
        if _are_distinct(map(self._values, alternatives)):
            return True
        first = _properties(alternatives[0])
        names = [name for name in first if self._values(first[name])][:MAX_DISCRIMINATORS]
        return any(
            all(name in (item.get("required") or ()) for item in alternatives)
            and _are_distinct(self._values(_properties(item).get(name)) for item in alternatives)
            for name in names
        )

    def _values(self, schema: object) -> set[bytes]:
        """What const or enum allow, encoded; empty: anything, or too much to compare.  1 and 1.0 are one value."""
        if not isinstance(schema, dict):
            return set()
        known = self._known_values.get(id(schema))
        if known is None:
            allowed = [schema["const"]] if "const" in schema else schema.get("enum")
            few = allowed if isinstance(allowed, list) and len(allowed) <= MAX_COMPARED else ()
            plain = [_plain(item) for item in few]
            known = {msgspec.json.encode(item, order="sorted") for item in plain}
            self._known_values[id(schema)] = known
        return known


def _are_distinct(sets: Iterable[set[bytes]]) -> bool:
    """Whether none is empty and no two share anything."""
    seen: set[bytes] = set()
    for one in sets:
        if not one or not seen.isdisjoint(one):
            return False
        seen |= one
    return True


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _types(schema: dict[str, Any]) -> set[bytes]:
    """An integer is a number."""
    kind = schema.get("type")
    return {
        name.replace("integer", "number").encode() for name in ([kind] if isinstance(kind, str) else _strings(kind))
    }


def _properties(schema: dict[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def _strings(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def json_rule(schema: dict[str, Any], *, compact: bool = False) -> str:
    """What matches the schema, as an expression of a grammar rule.

    Args: compact allows no blanks between the tokens of the answer.
    """
    options = {"whitespace_flexible": False} if compact else {"whitespace_pattern": BLANKS}
    return f"%json{msgspec.json.encode({**schema, OPTIONS: options}).decode()}"
