"""The fields that generating endpoints share: their Struct, their checks, and errors naming field, value and bound."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from vlmrt.actors.edge.refusals import MAX_SHOWN_CHARS, NULL, refuse, short
from vlmrt.actors.edge.response_format import OutputGrammar, ResponseFormat, StructuredOutputs, output_grammar
from vlmrt.runtime.errors import RequestError

MAX_FIELDS = 256  # of the top level of a body
MAX_STOPS = 16
MAX_STOP_CHARS = 512
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIASES = 300
MAX_LOGIT_BIAS = 100.0
MAX_SALT_CHARS = 128
MAX_LOOKUP_BYTES = 1 << 20  # bodies above this get errors without the wrong value
MAX_NAMED_BYTES = 4 << 20  # bodies above this do not have their unknown fields named

PRINTABLE = re.compile(r"[\x21-\x7e]*")

Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
RequestT = TypeVar("RequestT", bound=Struct)


class StreamOptions(Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(Struct, frozen=True, kw_only=True):
    """What chat completions and completions have in common.  None: the client left the choice to the server."""

    model: str | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Annotated[int, Meta(ge=0, le=2**31 - 1)]] | None = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Meta(ge=-(2**63))] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    logit_bias: dict[str, float] | None = None  # by token id
    cache_salt: str | None = None
    priority: Int32 | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None  # the answer names its prompt_token_ids and token_ids
    # what the answer's text is restricted to: one of them
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Raw = NULL
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    # accepted and without effect; what is ignored is never built
    user: Raw = NULL
    metadata: Raw = NULL
    store: Raw = NULL
    service_tier: Raw = NULL
    safety_identifier: Raw = NULL
    prompt_cache_key: Raw = NULL

    @property
    def output_limit(self) -> int | None:
        """The newer name wins; None: as much as the context holds."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def output_grammar(self) -> OutputGrammar | None:
        """Raises: RequestError 400."""
        return output_grammar(
            self.response_format,
            self.structured_outputs,
            guided_json=self.guided_json,
            guided_regex=self.guided_regex,
            guided_choice=self.guided_choice,
            guided_grammar=self.guided_grammar,
        )


_fields_decoder = msgspec.json.Decoder(dict[str, Raw])


def parse_body(body: bytes, decoder: msgspec.json.Decoder[RequestT]) -> tuple[RequestT, tuple[str, ...]]:
    """(the request, names of top-level fields that nobody reads); only its types and bounds are checked.

    Raises: RequestError 400 naming field, value and bound.
    """
    try:
        fields = _fields_decoder.decode(body) if len(body) <= MAX_NAMED_BYTES else {}
        if len(fields) > MAX_FIELDS:
            raise RequestError(f"the body has {len(fields)} fields, more than {MAX_FIELDS}", code="too_many_fields")
        request = decoder.decode(body)
    except msgspec.ValidationError as error:
        raise wrong_field(error, body) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise RequestError("the body is not valid JSON: nested too deeply", code="invalid_json") from None
    return request, tuple(sorted(fields.keys() - set(request.__struct_fields__)))


def wrong_field(error: msgspec.ValidationError, body: bytes) -> RequestError:
    message, _, path = str(error).partition(" - at `")
    param = path.removesuffix("`").removeprefix("$").removeprefix(".").removesuffix("[...]") or None
    missing = re.search(r"missing required field `(\w+)`", message)
    if missing:
        param = f"{param}.{missing[1]}" if param else missing[1]
        return RequestError(f"{param} is required", code="missing_field", param=param)
    message = message[:1].lower() + message[1:].replace("`", "").replace("null", "null").replace("array", "list")
    shown = _show_value(body, param) if param else ""
    return RequestError(f"{param or 'the body'}{shown}: {message}", code="invalid_value", param=param)


def _show_value(body: bytes, param: str) -> str:
    """What the body has at that path, cut short; nothing where that is not cheap to find."""
    if len(body) > MAX_LOOKUP_BYTES:
        return ""
    try:
        value: Any = msgspec.json.decode(body)
        for key in re.findall(r"[^.\[\]]+", param):
            value = value[int(key)] if isinstance(value, list) else value[key]
        text = msgspec.json.encode(value).decode()
    except (msgspec.DecodeError, RecursionError, LookupError, TypeError, ValueError):
        return ""
    return f" = {text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + '...'}"


def check_sampling(request: SamplingFields) -> None:
    """The checks between fields, and those that types cannot express.  Raises: RequestError 400."""
    unstreamed = request.stream_options is not None and not request.stream
    refuse(unstreamed, "stream_options", " is allowed only where stream is true")
    _check_stops(request)
    _check_logit_bias(request.logit_bias or {})
    refuse(request.seed is not None and request.seed >= 2**63, "seed", f" = {request.seed} is above 2**63 - 1")
    minimum, limit = request.min_tokens or 0, request.output_limit
    above = limit is not None and minimum > limit
    refuse(above, "min_tokens", f" = {minimum} is above max_tokens = {limit}")
    for name in ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"):
        value = getattr(request, name)
        refuse(value is not None and not math.isfinite(value), name, " must be a finite number")
    check_salt(request.cache_salt or "")


def check_salt(salt: str) -> None:
    refuse(len(salt) > MAX_SALT_CHARS, "cache_salt", f" has {len(salt)} characters, more than {MAX_SALT_CHARS}")
    refuse(not PRINTABLE.fullmatch(salt), "cache_salt", " may hold printable ASCII without spaces only")


def _check_stops(request: SamplingFields) -> None:
    stops = request.stops
    refuse(len(stops) > MAX_STOPS, "stop", f" has {len(stops)} strings, more than {MAX_STOPS}")
    for stop in stops:
        refuse(not stop, "stop", " holds an empty string")
        refuse(
            len(stop) > MAX_STOP_CHARS, "stop", f" holds a string of {len(stop)} characters, more than {MAX_STOP_CHARS}"
        )
    ids = request.stop_token_ids or []
    refuse(len(ids) > MAX_STOP_TOKEN_IDS, "stop_token_ids", f" has {len(ids)} ids, more than {MAX_STOP_TOKEN_IDS}")


def _check_logit_bias(biases: Mapping[str, float]) -> None:
    count = len(biases)
    refuse(count > MAX_LOGIT_BIASES, "logit_bias", f" has {count} entries, more than {MAX_LOGIT_BIASES}")
    for key, value in biases.items():
        is_id = key.isascii() and key.isdecimal() and key == str(int(key[:10]))
        refuse(not is_id, "logit_bias", f" has the key {short(key)!r}: keys are token ids in decimal digits")
        outside = not abs(value) <= MAX_LOGIT_BIAS
        refuse(outside, "logit_bias", f" = {value:g} for token {key} is not within -100 to 100")
