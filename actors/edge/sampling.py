"""Sampling fields of a request, with every default resolved."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TypeVar

from vlmrt.actors.edge.chat_request import ChatRequest
from vlmrt.actors.models.config import GenerationDefaults
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.messages import Sampling, StopRule

T = TypeVar("T")


class SamplingDefaults:
    """What a client leaves out comes from generation_config.json, then from OpenAI's defaults."""

    def __init__(self, generation: GenerationDefaults, eos_token_ids: Sequence[int], vocab_size: int) -> None:
        self._generation = generation
        self._eos_token_ids = tuple(dict.fromkeys((*generation.eos_token_ids, *eos_token_ids)))
        self._vocab_size = vocab_size

    def sampling(self, chat: ChatRequest) -> Sampling:
        generation = self._generation
        return Sampling(
            temperature=_first(chat.temperature, generation.temperature, 1.0),
            top_p=_first(chat.top_p, generation.top_p, 1.0),
            top_k=max(0, _first(chat.top_k, generation.top_k, 0)),
            min_p=_first(chat.min_p, None, 0.0),
            repetition_penalty=_first(chat.repetition_penalty, generation.repetition_penalty, 1.0),
            frequency_penalty=_first(chat.frequency_penalty, None, 0.0),
            presence_penalty=_first(chat.presence_penalty, None, 0.0),
            seed=chat.seed if chat.seed is not None else secrets.randbits(63),
        )

    def stop_rule(self, chat: ChatRequest, room: int) -> StopRule:
        """A limit above the room that the context leaves is cut to it.

        Raises: RequestError 400 where min_tokens does not fit, or a stop token is not in the vocabulary.
        """
        min_tokens = chat.min_tokens or 0
        if min_tokens > room:
            raise RequestError(
                f"min_tokens = {min_tokens} is above the {room} tokens that the context leaves for the answer",
                param="min_tokens",
                code="context_length_exceeded",
            )
        stop_token_ids = tuple(chat.stop_token_ids or ())
        for token_id in stop_token_ids:
            if token_id >= self._vocab_size:
                raise RequestError(
                    f"stop_token_ids holds {token_id}, outside the vocabulary of {self._vocab_size}",
                    param="stop_token_ids",
                    code="invalid_value",
                )
        eos_token_ids = () if chat.ignore_eos else self._eos_token_ids
        limit = chat.output_limit
        return StopRule(
            max_tokens=room if limit is None else min(limit, room),
            min_tokens=min_tokens,
            stop_token_ids=tuple(dict.fromkeys((*eos_token_ids, *stop_token_ids))),
        )


def _first(asked: T | None, configured: T | None, default: T) -> T:
    if asked is not None:
        return asked
    return configured if configured is not None else default
