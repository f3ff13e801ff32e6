"""The text completion request: its Struct, and every check that needs no tokenizer."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from vlmrt.actors.edge.refusals import refuse
from vlmrt.actors.edge.request_fields import SamplingFields, check_sampling, parse_body

DEFAULT_MAX_TOKENS = 16  # as OpenAI has it

Prompts = str | list[str | int | list[int]]


class CompletionRequest(SamplingFields, frozen=True, kw_only=True):
    """POST /v1/completions.  None means that the client left the choice to the server."""

    prompt: Prompts
    add_special_tokens: bool | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    suffix: str | None = None

    @property
    def output_limit(self) -> int | None:
        limit = super().output_limit
        return limit if limit is not None else DEFAULT_MAX_TOKENS

    @property
    def num_logprobs(self) -> int:
        """As in Sampling."""
        return self.logprobs if self.logprobs is not None else -1

    def prompts(self) -> list[str | list[int]]:
        """Each a text or token ids.  Raises: RequestError 400."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        refuse(not self.prompt, "prompt", " is an empty list: at least one prompt is needed")
        if isinstance(self.prompt[0], int):
            ids = [entry for entry in self.prompt if isinstance(entry, int)]
            refuse(len(ids) < len(self.prompt), "prompt", " mixes token ids with other entries")
            return [ids]
        found = [
            entry for entry in self.prompt if isinstance(entry, type(self.prompt[0])) and not isinstance(entry, int)
        ]
        refuse(len(found) < len(self.prompt), "prompt", " mixes texts with lists of token ids")
        return found


_decoder = msgspec.json.Decoder(CompletionRequest)


def parse_completion_request(body: bytes) -> tuple[CompletionRequest, tuple[str, ...]]:
    """(the checked request, names of top-level fields that nobody reads).

    Raises: RequestError 400 naming field, value and bound.
    """
    request, ignored = parse_body(body, _decoder)
    code = "unsupported_value"
    refuse(bool(request.suffix), "suffix", " is not supported", code)
    best_of, n = request.best_of, request.n or 1
    refuse(best_of not in (None, n), "best_of", f" = {best_of} is not supported (supported: n = {n})", code)
    refuse(bool(request.echo) and request.logprobs is not None, "echo", " is not supported with logprobs", code)
    check_sampling(request)
    return request, ignored
