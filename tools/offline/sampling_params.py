"""How the tokens of an answer are chosen: the sampling fields of the API under vLLM's names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec import Struct, structs

_MAX_INT32 = 2**31 - 1
_MAX_STOPS = 16
_MAX_LOGPROBS = 20
_MAX_BIASES = 1024


class StructuredOutputsParams(Struct, frozen=True, kw_only=True):
    """What form an answer must have; exactly one field is given.

    `json` is a JSON schema, as a mapping or as text.  Raises: ValueError where none or several are given.
    """

    json: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = list(self.fields())
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs: {', '.join(given) or 'no field'} given; exactly one of "
                f"{', '.join(self.__struct_fields__)} is needed"
            )

    def fields(self) -> dict[str, Any]:
        """As the API reads it."""
        return {name: value for name, value in structs.asdict(self).items() if value is not None and value is not False}


class SamplingParams(Struct, frozen=True, kw_only=True):
    """vLLM's names; checked when it is made.

    None leaves the choice to the model's generation_config.json, then to OpenAI's defaults.  max_tokens None is as much
    as the context holds (vLLM: 16).  logprobs is the number of alternatives told for each token; 0: its own only.

    Raises: ValueError or TypeError naming the field, its value and the bound.
    """

    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lists()
        for name in ("ignore_eos", "skip_special_tokens"):
            _check(name, getattr(self, name), bool, "True or False")
        _check(
            "structured_outputs", self.structured_outputs, StructuredOutputsParams, "a StructuredOutputsParams", True
        )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens = {self.min_tokens} is above max_tokens = {self.max_tokens}")

    def _check_numbers(self) -> None:
        _check_int("n", self.n, 1, 128)
        _check_int("top_k", self.top_k, -1, _MAX_INT32)
        _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        _check_int("max_tokens", self.max_tokens, 1, _MAX_INT32)
        _check_int("min_tokens", self.min_tokens, 0, _MAX_INT32)
        _check_int("logprobs", self.logprobs, 0, _MAX_LOGPROBS)
        _check_float("temperature", self.temperature, "within 0..2", lambda value: 0 <= value <= 2)
        _check_float("top_p", self.top_p, "within (0, 1]", lambda value: 0 < value <= 1)
        _check_float("min_p", self.min_p, "within 0..1", lambda value: 0 <= value <= 1)
        _check_float("presence_penalty", self.presence_penalty, "within -2..2", lambda value: -2 <= value <= 2)
        _check_float("frequency_penalty", self.frequency_penalty, "within -2..2", lambda value: -2 <= value <= 2)
        _check_float("repetition_penalty", self.repetition_penalty, "within (0, 100]", lambda value: 0 < value <= 100)

    def _check_lists(self) -> None:
        stops = self.stops
        if len(stops) > _MAX_STOPS:
            raise ValueError(f"stop has {len(stops)} strings, more than {_MAX_STOPS}")
        for stop in stops:
            _check("stop", stop, str, "a string or a list of strings")
            if not stop:
                raise ValueError("stop holds an empty string")
        for token_id in self.stop_token_ids or ():
            _check_int("stop_token_ids", token_id, 0, _MAX_INT32)
        if len(self.logit_bias or ()) > _MAX_BIASES:
            raise ValueError(f"logit_bias has {len(self.logit_bias or ())} entries, more than {_MAX_BIASES}")
        for token_id, bias in (self.logit_bias or {}).items():
            _check_int("logit_bias", token_id, 0, _MAX_INT32)
            _check_float(f"logit_bias[{token_id}]", bias, "within -100..100", lambda value: -100 <= value <= 100)

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def fields(self, *, chat: bool) -> dict[str, Any]:
        """The request fields that say this, of chat completions or of completions; what says nothing is left out."""
        fields = {name: value for name, value in structs.asdict(self).items() if value != getattr(_DEFAULTS, name)}
        if self.stop is not None:
            fields["stop"] = list(self.stops)
        if self.logit_bias is not None:
            fields["logit_bias"] = {str(token_id): bias for token_id, bias in self.logit_bias.items()}
        if self.structured_outputs is not None:
            fields["structured_outputs"] = self.structured_outputs.fields()
        if self.logprobs is not None and chat:
            fields["logprobs"] = True
            fields["top_logprobs"] = self.logprobs
        if not chat:
            fields.setdefault("max_tokens", _MAX_INT32)  # where OpenAI's default is 16; cut to what the context holds
        return fields


def _check(name: str, value: object, kind: type, expected: str, optional: bool = False) -> None:
    if not (isinstance(value, kind) or (optional and value is None)):
        raise TypeError(f"{name} = {value!r}: {expected} is expected")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} = {value!r}: an integer is expected")
    if not low <= value <= high:
        raise ValueError(f"{name} = {value} is not within {low}..{high}")


def _check_float(name: str, value: object, bound: str, holds: Callable[[float], bool]) -> None:
    if value is None:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} = {value!r}: a number is expected")
    if not math.isfinite(value) or not holds(value):
        raise ValueError(f"{name} = {value} is not {bound}")


_DEFAULTS = SamplingParams()
