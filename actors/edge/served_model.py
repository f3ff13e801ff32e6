"""What every answer says about the model."""

from __future__ import annotations

from hashlib import blake2b

import msgspec
from msgspec import Struct

import vlmrt
from vlmrt.actors.models.config import GenerationDefaults, ImageProcessing
from vlmrt.runtime.config import Config
from vlmrt.runtime.errors import RequestError

ALIAS = "model"  # answers always, whatever the model is called


class ServedModel(Struct, frozen=True):
    """The model by its names, and what bounds a request to it."""

    names: tuple[str, ...]  # the first is reported
    fingerprint: str
    max_model_len: int

    def check(self, name: str | None) -> None:
        """Raises: RequestError 404 where the model goes by no such name."""
        if name is not None and name not in (ALIAS, *self.names):
            raise RequestError(
                f"the model {name[:100]!r} does not exist; served here: {', '.join(self.names)}",
                status=404,
                code="model_not_found",
                param="model",
            )


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
