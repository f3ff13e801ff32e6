"""What `vlmrt doctor` finds: one line each, and what to do where it is not well."""

from __future__ import annotations

from typing import Literal

import msgspec

Status = Literal["ok", "warning", "problem"]


class Finding(msgspec.Struct, frozen=True):
    subject: str
    status: Status
    text: str
    remedy: str = ""  # empty where nothing is wrong


def ok(subject: str, text: str) -> Finding:
    return Finding(subject, "ok", text)


def warning(subject: str, text: str, remedy: str) -> Finding:
    """A server starts, and some of what it could do it cannot."""
    return Finding(subject, "warning", text, remedy)


def problem(subject: str, text: str, remedy: str) -> Finding:
    """A server would not start, or would fail."""
    return Finding(subject, "problem", text, remedy)
