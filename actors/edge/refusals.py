"""Refusing a field of a request: errors that name it, its value and the bound."""

from __future__ import annotations

from msgspec import Raw

from vlmrt.runtime.errors import RequestError

MAX_SHOWN_CHARS = 60  # of a wrong value in an error message

NULL = Raw(b"null")  # a field that is absent, of those that are built later or never


def refuse(condition: bool, param: str, message: str, code: str = "invalid_value") -> None:
    if condition:
        raise RequestError(f"{param}{message}", param=param, code=code)


def short(value: object) -> str:
    text = str(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."


def is_null(raw: Raw) -> bool:
    """Whether the field is absent or null."""
    return bytes(raw).strip() == b"null"
