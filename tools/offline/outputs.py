"""Answers, in vLLM's shape."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct


class TopLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: tuple[int, ...] | None = None


class TokenLogprob(Struct, frozen=True):
    """One token of an answer; `top_logprobs` are the most probable in its place."""

    token: str
    logprob: float
    bytes: tuple[int, ...] | None = None
    top_logprobs: tuple[TopLogprob, ...] = ()


class CompletionOutput(Struct, frozen=True, omit_defaults=True):
    index: int
    text: str
    finish_reason: str  # stop, length or tool_calls
    token_ids: tuple[int, ...] = ()  # the end token included
    logprobs: tuple[TokenLogprob, ...] | None = None
    stop_reason: int | str | None = None  # the stop string or token id that ended it
    tool_calls: tuple[dict[str, Any], ...] = ()


class RequestOutput(Struct, frozen=True):
    request_id: str
    prompt: str | None  # of `generate`, where it was text
    prompt_token_ids: tuple[int, ...]  # image placeholders expanded
    outputs: tuple[CompletionOutput, ...]  # n of them
    num_cached_tokens: int  # of the prompt
    finished: bool = True


class _Message(Struct):
    content: str | None = None
    tool_calls: tuple[dict[str, Any], ...] | None = None


class _Logprobs(Struct):
    """Of a chat completion; those of a completion are four lists."""

    content: tuple[TokenLogprob, ...] | None = None
    tokens: tuple[str, ...] = ()
    token_logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[dict[str, float], ...] | None = None

    def entries(self) -> tuple[TokenLogprob, ...]:
        if self.content is not None:
            return self.content
        tops = self.top_logprobs or ({},) * len(self.tokens)
        return tuple(
            TokenLogprob(token, logprob, None, tuple(TopLogprob(*item) for item in top.items()))
            for token, logprob, top in zip(self.tokens, self.token_logprobs, tops, strict=True)
        )


class _Choice(Struct):
    index: int
    finish_reason: str
    message: _Message | None = None
    text: str | None = None
    token_ids: tuple[int, ...] = ()
    prompt_token_ids: tuple[int, ...] | None = None
    logprobs: _Logprobs | None = None
    stop_reason: int | str | None = None

    def output(self) -> CompletionOutput:
        message = self.message or _Message(self.text)
        return CompletionOutput(
            index=self.index,
            text=message.content or "",
            token_ids=self.token_ids,
            logprobs=None if self.logprobs is None else self.logprobs.entries(),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            tool_calls=message.tool_calls or (),
        )


class _Details(Struct):
    cached_tokens: int = 0


class Usage(Struct, omit_defaults=True):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None


class Answer(Struct):
    """The body of a chat completion or a completion, as far as it is read here."""

    id: str
    choices: tuple[_Choice, ...]
    usage: Usage
    prompt_token_ids: tuple[int, ...] | None = None

    @property
    def outputs(self) -> tuple[CompletionOutput, ...]:
        """In the order of their indices."""
        return tuple(choice.output() for choice in sorted(self.choices, key=lambda choice: choice.index))

    def output(self, prompt: str | None) -> RequestOutput:
        details = self.usage.prompt_tokens_details
        prompt_token_ids = self.prompt_token_ids or self.choices[0].prompt_token_ids
        return RequestOutput(
            request_id=self.id,
            prompt=prompt,
            prompt_token_ids=prompt_token_ids or (),
            outputs=self.outputs,
            num_cached_tokens=details.cached_tokens if details else 0,
        )


decode_answer = msgspec.json.Decoder(Answer).decode
