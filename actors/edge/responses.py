"""The answers of the OpenAI endpoints, whole and in chunks."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from vlmrt.runtime.errors import RequestError, error_type
from vlmrt.runtime.messages import Usage


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int
    image_tokens: int
    text_tokens: int


class CompletionTokensDetails(Struct, frozen=True):
    reasoning_tokens: int = 0


class ChatUsage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()


class TopLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: tuple[int, ...]


class TokenLogprob(Struct, frozen=True):
    """One token of the text; the bytes of all, joined, are the text's."""

    token: str
    logprob: float
    bytes: tuple[int, ...]
    top_logprobs: tuple[TopLogprob, ...]


class ChoiceLogprobs(Struct, frozen=True):
    content: tuple[TokenLogprob, ...]
    refusal: None = None


class CalledFunction(Struct, frozen=True):
    name: str
    arguments: str  # JSON of an object


class ToolCall(Struct, frozen=True):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class AnswerMessage(Struct, frozen=True):
    content: str | None  # None: nothing but calls
    role: Literal["assistant"] = "assistant"
    refusal: str | None = None
    tool_calls: tuple[ToolCall, ...] | UnsetType = UNSET


class Choice(Struct, frozen=True, kw_only=True):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: str
    stop_reason: str | int | None  # the stop string or token of the request that ended it
    token_ids: tuple[int, ...] | UnsetType = UNSET  # with return_token_ids; the end token included


class ChatCompletion(Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: tuple[Choice, ...]
    usage: ChatUsage
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET  # with return_token_ids; image placeholders expanded


class LegacyLogprobs(Struct, frozen=True):
    """Of a text completion: lists with an entry for every token of the text."""

    tokens: tuple[str, ...]
    token_logprobs: tuple[float, ...]
    top_logprobs: tuple[dict[str, float], ...]
    text_offset: tuple[int, ...]  # of its first character


class TextChoice(Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: LegacyLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: tuple[int, ...] | UnsetType = UNSET  # with return_token_ids
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET


class TextCompletion(Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: tuple[TextChoice, ...]
    usage: ChatUsage


class TokenizeAnswer(Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: tuple[int, ...]
    token_strs: tuple[str | None, ...] | None


class DetokenizeAnswer(Struct, frozen=True):
    prompt: str


class ErrorDetail(Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Struct, frozen=True):
    error: ErrorDetail


encode_json = msgspec.json.Encoder().encode


def chat_usage(usage: Usage, num_image_tokens: int) -> ChatUsage:
    """Token counts as OpenAI names them."""
    prompt, output = usage.num_prompt_tokens, usage.num_output_tokens
    details = PromptTokensDetails(usage.num_cached_tokens, num_image_tokens, prompt - num_image_tokens)
    return ChatUsage(prompt, output, prompt + output, details)


def error_body(error: RequestError) -> bytes:
    """The four keys that every error of the API has."""
    return encode_json(ErrorBody(ErrorDetail(error.message, error_type(error.status), error.param, error.code)))
