"""Sampling fields of a request, with every default resolved."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from vlmrt.actors.edge.choice import ChoiceRule, PlainText, Shape
from vlmrt.actors.edge.detokenizer import TextRule
from vlmrt.actors.edge.request_fields import SamplingFields
from vlmrt.actors.models.config import GenerationDefaults
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.messages import LogitBias, Sampling, StopRule

T = TypeVar("T")


class SamplingDefaults:
    """What a client leaves out comes from generation_config.json, then from OpenAI's defaults."""

    def __init__(self, generation: GenerationDefaults, eos_token_ids: Sequence[int], vocab_size: int) -> None:
        self._generation = generation
        self._eos_token_ids = tuple(dict.fromkeys((*generation.eos_token_ids, *eos_token_ids)))
        self._vocab_size = vocab_size

    def choice_rule(
        self,
        fields: SamplingFields,
        room: int,
        num_logprobs: int,
        *,
        grammar: str = "",
        shape: Callable[[], Shape] = PlainText,
    ) -> ChoiceRule:
        """How one choice is sampled, ended and read.

        Args: room: tokens that the context leaves for the answer; num_logprobs and grammar: as in Sampling.
        Raises: RequestError 400 where min_tokens does not fit, or a token id is not in the vocabulary.
        """
        stop = self.stop_rule(fields, room)
        return ChoiceRule(
            sampling=self.sampling(fields, stop, num_logprobs, grammar),
            stop=stop,
            text=TextRule(
                stops=fields.stops,
                include_stop=bool(fields.include_stop_str_in_output),
                skip_special_tokens=fields.skip_special_tokens is not False,
            ),
            named_stop_ids=frozenset(fields.stop_token_ids or ()) - frozenset(self._eos_token_ids),
            shape=shape,
        )

    def sampling(self, fields: SamplingFields, stop: StopRule, num_logprobs: int = -1, grammar: str = "") -> Sampling:
        generation = self._generation
        return Sampling(
            temperature=_first(fields.temperature, generation.temperature, 1.0),
            top_p=_first(fields.top_p, generation.top_p, 1.0),
            top_k=max(0, _first(fields.top_k, generation.top_k, 0)),
            min_p=_first(fields.min_p, None, 0.0),
            repetition_penalty=_first(fields.repetition_penalty, generation.repetition_penalty, 1.0),
            frequency_penalty=_first(fields.frequency_penalty, None, 0.0),
            presence_penalty=_first(fields.presence_penalty, None, 0.0),
            seed=fields.seed if fields.seed is not None else secrets.randbits(63),
            logit_bias=self._logit_bias(fields, stop),
            num_logprobs=num_logprobs,
            grammar=grammar,
        )

    def _logit_bias(self, fields: SamplingFields, stop: StopRule) -> tuple[LogitBias, ...]:
        """What the client asks for, and no end token before min_tokens."""
        asked = fields.logit_bias or {}
        self.check_token_ids(map(int, asked), "logit_bias")
        ends = stop.stop_token_ids if stop.min_tokens else ()
        return (
            *(LogitBias(int(key), value) for key, value in asked.items()),
            *(LogitBias(token_id, -math.inf, stop.min_tokens) for token_id in ends),
        )

    def check_token_ids(self, token_ids: Iterable[int], param: str) -> None:
        """Raises: RequestError 400."""
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise RequestError(
                    f"{param} holds {token_id}, outside the vocabulary of {self._vocab_size}",
                    param=param,
                    code="invalid_value",
                )

    def stop_rule(self, fields: SamplingFields, room: int) -> StopRule:
        """A limit above the room that the context leaves is cut to it.

        Raises: RequestError 400 where min_tokens does not fit, or a stop token is not in the vocabulary.
        """
        min_tokens = fields.min_tokens or 0
        if min_tokens > room:
            raise RequestError(
                f"min_tokens = {min_tokens} is above the {room} tokens that the context leaves for the answer",
                param="min_tokens",
                code="context_length_exceeded",
            )
        stop_token_ids = tuple(fields.stop_token_ids or ())
        self.check_token_ids(stop_token_ids, "stop_token_ids")
        eos_token_ids = () if fields.ignore_eos else self._eos_token_ids
        limit = fields.output_limit
        return StopRule(
            max_tokens=room if limit is None else min(limit, room),
            min_tokens=min_tokens,
            stop_token_ids=tuple(dict.fromkeys((*eos_token_ids, *stop_token_ids))),
        )


def _first(asked: T | None, configured: T | None, default: T) -> T:
    if asked is not None:
        return asked
    return configured if configured is not None else default
