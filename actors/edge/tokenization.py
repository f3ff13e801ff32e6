"""POST /tokenize and /detokenize: what a prompt costs, and what token ids say."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct

from vlmrt.actors.edge.api_keys import tenant_salt
from vlmrt.actors.edge.chat_prompt import ChatPrompts
from vlmrt.actors.edge.chat_request import ChatMessage, make_conversation
from vlmrt.actors.edge.media_parts import ProcessorOptions
from vlmrt.actors.edge.open_requests import MediaBudget, MediaLease
from vlmrt.actors.edge.prompt import PromptBuilder
from vlmrt.actors.edge.refusals import refuse
from vlmrt.actors.edge.request_fields import check_salt, parse_body
from vlmrt.actors.edge.responder import Responder, ignored_fields
from vlmrt.actors.edge.responses import DetokenizeAnswer, TokenizeAnswer, encode_json
from vlmrt.actors.edge.sampling import SamplingDefaults
from vlmrt.actors.edge.scheduler_link import SchedulerLink
from vlmrt.actors.edge.served_model import ServedModel
from vlmrt.actors.edge.tools import Tool, tool_use


class TokenizeRequest(Struct, frozen=True, kw_only=True):
    """POST /tokenize: a raw prompt, or a conversation as chat completions take it."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None  # of a raw prompt
    messages: list[ChatMessage] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: ProcessorOptions | None = None
    tools: list[Tool] | None = None
    cache_salt: str | None = None  # of the images that are named without their bytes
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct, frozen=True, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


_tokenize_decoder = msgspec.json.Decoder(TokenizeRequest)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeRequest)


class TokenizationEndpoint:
    """Answers both routes; nothing is generated."""

    def __init__(
        self,
        responder: Responder,
        budget: MediaBudget,
        link: SchedulerLink,
        chat_prompts: ChatPrompts,
        prompts: PromptBuilder,
        executor: Executor,
        sampling: SamplingDefaults,
        model: ServedModel,
    ) -> None:
        self._responder = responder
        self._budget = budget
        self._link = link
        self._chat_prompts = chat_prompts
        self._prompts = prompts
        self._executor = executor
        self._sampling = sampling
        self._model = model

    async def tokenize(self, request: web.Request) -> web.Response:
        with self._budget.lease() as lease:
            body = await self._responder.read_body(request, lease)
            fields, ignored = parse_body(body, _tokenize_decoder)
            self._model.check(fields.model)
            check_salt(fields.cache_salt or "")
            fields = msgspec.structs.replace(fields, cache_salt=tenant_salt(request, fields.cache_salt))
            num_body_bytes = len(body)
            del body
            token_ids = await self._token_ids(fields, lease, num_body_bytes)
        names = tuple(map(self._prompts.tokenizer.id_to_token, token_ids)) if fields.return_token_strs else None
        answer = TokenizeAnswer(len(token_ids), self._model.max_model_len, token_ids, names)
        return _json(encode_json(answer), ignored)

    async def _token_ids(self, fields: TokenizeRequest, lease: MediaLease, body_bytes: int) -> tuple[int, ...]:
        refuse(fields.prompt is not None and fields.messages is not None, "prompt", " and messages exclude each other")
        if fields.messages is None:
            refuse(fields.prompt is None, "prompt", " or messages is required", "missing_field")
            special = fields.add_special_tokens is not False
            ids = await self._prompts.encode_text(fields.prompt or "", self._executor, add_special_tokens=special)
            return tuple(ids)
        conversation = make_conversation(
            fields.messages,
            add_generation_prompt=fields.add_generation_prompt,
            continue_final_message=fields.continue_final_message,
            template_variables=fields.chat_template_kwargs,
            processor=fields.mm_processor_kwargs,
            cache_salt=fields.cache_salt,
            tools=tool_use(fields.tools, None).shown,
        )
        with self._link.look_up() as lookup:
            async with self._responder.in_time():
                built = await self._chat_prompts.build(conversation, lease, lookup, None, body_bytes=body_bytes)
        return built.prompt.token_ids

    async def detokenize(self, request: web.Request) -> web.Response:
        with self._budget.lease() as lease:
            fields, ignored = parse_body(await self._responder.read_body(request, lease), _detokenize_decoder)
            self._model.check(fields.model)
            self._sampling.check_token_ids(fields.tokens, "tokens")
            loop = asyncio.get_running_loop()
            text = await loop.run_in_executor(self._executor, self._prompts.decode, fields.tokens)
        return _json(encode_json(DetokenizeAnswer(text)), ignored)


def _json(body: bytes, ignored: tuple[str, ...]) -> web.Response:
    return web.Response(body=body, content_type="application/json", headers=ignored_fields(ignored))
