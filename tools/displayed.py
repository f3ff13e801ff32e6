"""Text of others as a terminal may be shown it."""

from __future__ import annotations

import re

# What a terminal would obey rather than show: C0 but tab and newline, DEL, C1, and what turns the direction of text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def displayed(text: str) -> str:
    """Each control character as U+FFFD."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
