"""Types of options: text -> a value within its bound, or an error that says the bound."""

from __future__ import annotations

from argparse import ArgumentTypeError

MAX_WHOLE = (1 << 63) - 1  # of a message between processes


def whole_number(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text[:64]!r} is not a whole number") from None
    if abs(value) > MAX_WHOLE:
        raise ArgumentTypeError(f"{text[:64]} is not within 64 bits")
    return value


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a number") from None


def positive_int(text: str) -> int:
    value = whole_number(text)
    if value < 1:
        raise ArgumentTypeError(f"{text} is not at least 1")
    return value


def non_negative_int(text: str) -> int:
    value = whole_number(text)
    if value < 0:
        raise ArgumentTypeError(f"{text} is not at least 0")
    return value


def positive_float(text: str) -> float:
    value = number(text)
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"{text} is not a positive number")
    return value


def non_negative_float(text: str) -> float:
    value = number(text)
    if not 0 <= value < float("inf"):
        raise ArgumentTypeError(f"{text} is not 0 or a positive number")
    return value


def fraction(text: str) -> float:
    value = number(text)
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"{text} is not within (0, 1]")
    return value


def percent(text: str) -> int:
    value = whole_number(text)
    if not 1 <= value <= 100:
        raise ArgumentTypeError(f"{text} is not within 1..100")
    return value


def port_number(text: str) -> int:
    value = whole_number(text)
    if not 0 <= value <= 65535:
        raise ArgumentTypeError(f"{text} is not within 0..65535")
    return value
