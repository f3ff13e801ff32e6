"""The names of the served model, and its card."""

from __future__ import annotations

import difflib
import time
from typing import Literal

from msgspec import Struct

from vlmrt.runtime.config import ModelOptions
from vlmrt.runtime.errors import RequestError

ALIAS = "model"  # answers always, whatever the model is called


class ModelCard(Struct, frozen=True):
    id: str
    created: int
    root: str  # the name that answers report
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "vlmrt"


class ModelList(Struct, frozen=True):
    data: tuple[ModelCard, ...]
    object: Literal["list"] = "list"


class ServedModels:
    """One model by all its names; ALIAS answers too and is not listed."""

    def __init__(self, options: ModelOptions) -> None:
        self._names = options.served_names
        self._max_model_len = options.max_model_len
        self._created = int(time.time())

    @property
    def name(self) -> str:
        """What answers report."""
        return self._names[0]

    def check(self, name: str | None) -> None:
        """Raises: RequestError 404 for a name that is not served, with a hint where it is nearly one."""
        if name is None or name in (ALIAS, *self._names):
            return
        near = {known.lower(): known for known in self._names}
        found = difflib.get_close_matches(name[:200].lower(), near, 1, 0.75)
        hint = f"did you mean {near[found[0]]!r}?" if found else f"served here: {', '.join(self._names)}"
        raise RequestError(
            f"the model {name[:100]!r} does not exist; {hint}", status=404, code="model_not_found", param="model"
        )

    def cards(self) -> ModelList:
        return ModelList(tuple(map(self._card, self._names)))

    def card(self, name: str) -> ModelCard:
        """Raises: RequestError 404."""
        self.check(name)
        return self._card(name)

    def _card(self, name: str) -> ModelCard:
        return ModelCard(name, self._created, self.name, self._max_model_len)
