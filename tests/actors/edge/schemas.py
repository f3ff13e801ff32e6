"""Random JSON schemas of the kinds that clients send."""

from __future__ import annotations

import random
from typing import Any

WORDS = ("name", "age", "tags", "colour", "x", "y-1", "größe", "is ok", "items", "value")


def random_schema(rng: random.Random) -> dict[str, Any]:
    """An object, as response formats and tools have it, perhaps with definitions that refer to themselves."""
    if rng.random() < 0.15:
        node = _object(rng, 1)
        node["properties"]["next"] = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
        return {"$ref": "#/$defs/node", "$defs": {"node": node}}
    return _object(rng, 3)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randint(0, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _value(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
    }
    if rng.random() < 0.8:
        schema["additionalProperties"] = rng.choice((False, False, {"type": "integer"}))
    if rng.random() < 0.3:
        schema["description"] = 'say "why" /* not */ // at once'
    return schema


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = ("string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "format", "range")
    nested = ("object", "array", "anyOf", "oneOf") if depth > 0 else ()
    match rng.choice((*kinds, *nested, *nested)):
        case "object":
            return _object(rng, depth)
        case "array":
            least = rng.randint(0, 2)
            return {"type": "array", "items": _value(rng, depth - 1), "minItems": least, "maxItems": least + 3}
        case "anyOf":
            return {"anyOf": [_value(rng, depth - 1), {"type": "null"}]}
        case "oneOf":
            kinds_of = [{"type": "object", "properties": {"k": {"const": k}}, "required": ["k"]} for k in ("a", "b")]
            return {"oneOf": kinds_of}
        case "enum":
            return {"enum": rng.sample(("red", "green", 1, 2.5, None, True, "ä\n", ["x"]), rng.randint(1, 4))}
        case "const":
            return {"const": rng.choice(("fixed", 7, False))}
        case "pattern":
            return {"type": "string", "pattern": rng.choice((r"^[A-Z]{2}-\d{1,4}$", r"^(a|bc)*d$", r"^\w{1,5}$"))}
        case "format":
            return {"type": "string", "format": rng.choice(("date", "uuid", "ipv4", "email"))}
        case "range":
            low = rng.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 900)}
        case "string":
            return {"type": "string", "maxLength": rng.randint(0, 12)}
        case kind:
            return {"type": kind}
