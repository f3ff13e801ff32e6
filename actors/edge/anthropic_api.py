"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's shapes around a chat completion."""

from __future__ import annotations

import secrets

import msgspec
from aiohttp import web

from vlmrt.actors.edge.anthropic_format import MessagesFormat, TokenCount
from vlmrt.actors.edge.anthropic_request import MessagesRequest, chat_of_messages, parse_messages_request
from vlmrt.actors.edge.api_keys import tenant_salt
from vlmrt.actors.edge.chat import ChatEndpoint
from vlmrt.actors.edge.chat_prompt import ChatPrompts
from vlmrt.actors.edge.chat_request import ChatRequest
from vlmrt.actors.edge.chat_translation import FieldNames
from vlmrt.actors.edge.error_answers import LABEL
from vlmrt.actors.edge.open_requests import MediaBudget, MediaLease
from vlmrt.actors.edge.responder import Prepared, Responder, ignored_fields
from vlmrt.actors.edge.responses import encode_json
from vlmrt.actors.edge.scheduler_link import LookUp, SchedulerLink
from vlmrt.actors.edge.served_model import ServedModel
from vlmrt.actors.edge.timelines import TIMELINE


class MessagesEndpoint:
    """Answers both routes."""

    def __init__(
        self,
        responder: Responder,
        chat: ChatEndpoint,
        prompts: ChatPrompts,
        link: SchedulerLink,
        budget: MediaBudget,
        model: ServedModel,
    ) -> None:
        self._responder = responder
        self._chat = chat
        self._prompts = prompts
        self._link = link
        self._budget = budget
        self._model = model

    async def post(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        return await self._responder.post(request, self._prepare)

    async def _prepare(self, request: web.Request, lease: MediaLease, lookup: LookUp) -> Prepared:
        body = await self._responder.read_body(request, lease)
        asked, ignored = parse_messages_request(body)
        num_body_bytes = len(body)
        del body
        chat, names = _chat(request, asked)
        with names.restoring():
            generation = await self._chat.generation(chat, lease, lookup, request[TIMELINE], body_bytes=num_body_bytes)
        answer_id = f"msg_{secrets.token_hex(12)}"
        return Prepared(
            answer_id=answer_id,
            generations=(generation,),
            format=MessagesFormat(answer_id, self._model.names[0], request[LABEL]),
            stream=bool(asked.stream),
            headers=ignored_fields(ignored),
        )

    async def count_tokens(self, request: web.Request) -> web.Response:
        """How long the prompt of a request would be; nothing is generated."""
        with self._budget.lease() as lease, self._link.look_up() as lookup:
            body = await self._responder.read_body(request, lease)
            asked, ignored = parse_messages_request(body, counts=True)
            num_body_bytes = len(body)
            del body
            chat, names = _chat(request, asked)
            with names.restoring():
                self._model.check(chat.model)
                built = await self._prompts.build(
                    chat.conversation(chat.tool_use().shown), lease, lookup, None, body_bytes=num_body_bytes
                )
        count = TokenCount(len(built.prompt.token_ids))
        return web.Response(body=encode_json(count), content_type="application/json", headers=ignored_fields(ignored))


def _chat(request: web.Request, asked: MessagesRequest) -> tuple[ChatRequest, FieldNames]:
    chat, names = chat_of_messages(asked)
    return msgspec.structs.replace(chat, cache_salt=tenant_salt(request, chat.cache_salt)), names
