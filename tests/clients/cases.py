"""Which cases there are: every public function of the modules cases_*, once per variant."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar
from zlib import crc32

from tests.clients.api import Api

OPENAI = (
    "chat", "sampling", "logprobs", "streams", "helpers", "pictures", "structured", "tools", "errors", "transport",
    "endpoints", "responses", "asynchronous",
)  # fmt: skip
SUITES = {"openai": OPENAI, "langchain": ("langchain",)}

MAX_NAME_CHARS = 60  # of an argument

Body = TypeVar("Body", bound=Callable[..., None])


class Case(NamedTuple):
    name: str
    body: Callable[..., None]
    arguments: dict[str, Any]

    def run(self, api: Api) -> None:
        """Raises: Skip where the client cannot express it, else whatever is wrong."""
        self.body(api, **self.arguments)


def each(**values: Sequence[Any]) -> Callable[[Body], Body]:
    """The case is run with every combination of these arguments."""

    def keep(body: Body) -> Body:
        combinations = itertools.product(*values.values())
        body.variants = [dict(zip(values, chosen, strict=True)) for chosen in combinations]  # type: ignore[attr-defined]
        return body

    return keep


def cases_of(suite: str) -> list[Case]:
    cases = []
    for name in SUITES[suite]:
        module = importlib.import_module(f"tests.clients.cases_{name}")
        for body in vars(module).values():
            own = inspect.isfunction(body) and body.__module__ == module.__name__
            if own and not body.__name__.startswith("_"):
                cases += [_case(name, body, chosen) for chosen in getattr(body, "variants", [{}])]
    return cases


def _case(module: str, body: Callable[..., None], arguments: dict[str, Any]) -> Case:
    chosen = ", ".join(_shown(key, value) for key, value in arguments.items())
    return Case(f"{module}: {body.__name__.replace('_', ' ')}" + (f" [{chosen}]" if chosen else ""), body, arguments)


def _shown(key: str, value: Any) -> str:
    """An argument as part of a name: short, and told from others."""
    match value:
        case str():
            return value or "empty"
        case type():
            return value.__name__
        case dict():
            text = ", ".join(f"{name} {found}" for name, found in value.items()) or "nothing"
            return text if len(text) <= MAX_NAME_CHARS else f"{text[: MAX_NAME_CHARS - 9]} {crc32(text.encode()):08x}"
        case (_, dict() as found):
            return _shown(key, found)
    return f"{key} {value}"
