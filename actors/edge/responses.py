"""The answers of the OpenAI endpoints, whole and in chunks."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from vlmrt.runtime.errors import RequestError, error_type
from vlmrt.runtime.messages import FinishReason, Usage


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


class AnswerMessage(Struct, frozen=True):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: str | None = None


class Choice(Struct, frozen=True):
    message: AnswerMessage
    finish_reason: FinishReason
    index: int = 0
    logprobs: None = None
    token_ids: tuple[int, ...] | UnsetType = UNSET  # with return_token_ids; the end token included


class ChatCompletion(Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: tuple[Choice, ...]
    usage: ChatUsage
    object: Literal["chat.completion"] = "chat.completion"
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET  # with return_token_ids; image placeholders expanded


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
