"""POST /v1/responses: a request of another shape, answered as chat completions are."""

from __future__ import annotations

import secrets

import msgspec
from aiohttp import web

from vlmrt.actors.edge.api_keys import tenant_salt
from vlmrt.actors.edge.chat import ChatEndpoint
from vlmrt.actors.edge.open_requests import MediaLease
from vlmrt.actors.edge.responder import Prepared, Responder, ignored_fields
from vlmrt.actors.edge.responses_format import ResponsesFormat
from vlmrt.actors.edge.responses_request import chat_of_responses, parse_responses_request
from vlmrt.actors.edge.scheduler_link import LookUp
from vlmrt.actors.edge.served_model import ServedModel
from vlmrt.actors.edge.timelines import TIMELINE


class ResponsesEndpoint:
    """Answers responses; one call of `post` per request."""

    def __init__(self, responder: Responder, chat: ChatEndpoint, model: ServedModel) -> None:
        self._responder = responder
        self._chat = chat
        self._model = model

    async def post(self, request: web.Request) -> web.StreamResponse:
        return await self._responder.post(request, self._prepare)

    async def _prepare(self, request: web.Request, lease: MediaLease, lookup: LookUp) -> Prepared:
        body = await self._responder.read_body(request, lease)
        asked, ignored = parse_responses_request(body)
        num_body_bytes = len(body)
        del body
        chat, names = chat_of_responses(asked)
        chat = msgspec.structs.replace(chat, cache_salt=tenant_salt(request, chat.cache_salt))
        with names.restoring():
            generation = await self._chat.generation(chat, lease, lookup, request[TIMELINE], body_bytes=num_body_bytes)
        answer_id = f"resp_{secrets.token_hex(24)}"
        return Prepared(
            answer_id=answer_id,
            generations=(generation,),
            format=ResponsesFormat(answer_id, asked, generation.rule.sampling, self._model.names[0]),
            stream=bool(asked.stream),
            headers=ignored_fields(ignored),
        )
