"""What every answer says about the model."""

from __future__ import annotations

import difflib
from hashlib import blake2b
from typing import Literal

import msgspec
from msgspec import Struct

import vlmrt
from vlmrt.actors.models.config import GenerationDefaults, ImageProcessing
from vlmrt.runtime.config import Config
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


class ServedModel(Struct, frozen=True):
    """The model by its names, and what bounds a request to it."""

    names: tuple[str, ...]  # the first is reported
    fingerprint: str
    max_model_len: int

    def check(self, name: str | None) -> None:
        """Raises: RequestError 404 where the model goes by no such name, with a hint where it nearly does."""
        if name is None or name in (ALIAS, *self.names):
            return
        known = {served.lower(): served for served in self.names}
        near = difflib.get_close_matches(name[:200].lower(), known, 1, 0.75)
        hint = f"did you mean {known[near[0]]!r}?" if near else f"served here: {', '.join(self.names)}"
        raise RequestError(
            f"the model {name[:100]!r} does not exist; {hint}", status=404, code="model_not_found", param="model"
        )

    def card(self, name: str, created: int) -> ModelCard:
        return ModelCard(name, created, self.names[0], self.max_model_len)


def system_fingerprint(
    config: Config, processing: ImageProcessing, generation: GenerationDefaults, chat_template: str
) -> str:
    """Equal where the same request with the same seed gives the same answer; changes with whatever may change it."""
    model, parallel = config.model, config.parallel
    everything = (
        vlmrt.__version__,
        (model.directory, model.revision, model.max_model_len),
        (parallel.device, parallel.dtype, parallel.tp),
        (processing, generation, chat_template),
    )
    return f"fp_{blake2b(msgspec.msgpack.encode(everything), digest_size=6).hexdigest()}"
