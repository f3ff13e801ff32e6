"""What a PromQL query names: metrics with the labels asked of them, labels it groups by, functions.  Not a parser."""

from __future__ import annotations

import re
from typing import NamedTuple

FUNCTIONS = {
    *("sum", "avg", "min", "max", "count", "topk", "bottomk", "quantile", "group"),
    *("rate", "irate", "increase", "delta", "histogram_quantile", "avg_over_time", "max_over_time", "min_over_time"),
    *("label_values", "absent", "clamp_min", "clamp_max", "time", "vector", "abs"),
}
KEYWORDS = {"and", "or", "unless", "bool", "offset"}
GROUPINGS = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_GROUPING = re.compile(rf"\b({'|'.join(GROUPINGS)})\s*\(([^()]*)\)")
_MATCHER = re.compile(r'\s*([a-zA-Z_]\w*)\s*(=~|!~|!=|=)\s*("(?:[^"\\]|\\.)*")\s*(?:,|$)')
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


class Selected(NamedTuple):
    metric: str
    labels: tuple[str, ...]  # that its matchers ask for


class Query(NamedTuple):
    selected: tuple[Selected, ...]
    groupings: tuple[str, ...]  # labels


def read_query(text: str) -> Query:
    """Raises: ValueError for what is neither a metric, a known function, a keyword nor a number."""
    groupings: list[str] = []

    def take(match: re.Match[str]) -> str:
        groupings.extend(label.strip() for label in match[2].split(",") if label.strip())
        return " "

    text = _GROUPING.sub(take, text)
    text = re.sub(r"\[[^\]]*\]", " ", text)  # ranges
    selected: list[Selected] = []
    at = 0
    while at < len(text):
        name = _NAME.match(text, at)
        if name is not None:
            at = name.end()
            rest = text[at:].lstrip()
            if rest.startswith("("):
                if name[0] not in FUNCTIONS:
                    raise ValueError(f"unknown function {name[0]} in {text}")
            elif name[0] not in KEYWORDS:
                labels: tuple[str, ...] = ()
                if rest.startswith("{"):
                    labels, at = _matchers(text, text.index("{", at))
                selected.append(Selected(name[0], labels))
        elif text[at].isspace() or text[at] in "()+-*/%^<>=!,":
            at += 1
        elif number := re.match(r"\d+(\.\d+)?(e[+-]?\d+)?", text[at:]):
            at += number.end()
        else:
            raise ValueError(f"{text[at:]!r} in {text}")
    return Query(tuple(selected), tuple(groupings))


def _matchers(text: str, begin: int) -> tuple[tuple[str, ...], int]:
    end = text.index("}", begin)
    inside, labels, at = text[begin + 1 : end], [], 0
    while at < len(inside):
        matcher = _MATCHER.match(inside, at)
        if matcher is None:
            raise ValueError(f"{inside[at:]!r} is no label matcher in {text}")
        labels.append(matcher[1])
        at = matcher.end()
    return tuple(labels), end + 1
