"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time

import msgspec
from aiohttp import web

from vlmrt.actors.edge.answer_form import AnswerForms
from vlmrt.actors.edge.api_keys import tenant_salt
from vlmrt.actors.edge.chat_format import ChatFormat
from vlmrt.actors.edge.chat_prompt import ChatPrompts
from vlmrt.actors.edge.chat_request import ChatRequest, parse_chat_request
from vlmrt.actors.edge.choice import ChoiceRule
from vlmrt.actors.edge.detokenizer import Vocabulary
from vlmrt.actors.edge.generation import Generation
from vlmrt.actors.edge.open_requests import MediaLease
from vlmrt.actors.edge.responder import Prepared, Responder, ignored_fields
from vlmrt.actors.edge.sampling import SamplingDefaults
from vlmrt.actors.edge.scheduler_link import LookUp
from vlmrt.actors.edge.served_model import ServedModel
from vlmrt.actors.edge.timelines import TIMELINE, OpenTimeline


class ChatEndpoint:
    """Answers chat completions; one call of `post` per request."""

    def __init__(
        self,
        responder: Responder,
        prompts: ChatPrompts,
        sampling: SamplingDefaults,
        model: ServedModel,
        vocabulary: Vocabulary,
        forms: AnswerForms,
    ) -> None:
        self._responder = responder
        self._prompts = prompts
        self._sampling = sampling
        self._model = model
        self._vocabulary = vocabulary
        self._forms = forms

    async def post(self, request: web.Request) -> web.StreamResponse:
        return await self._responder.post(request, self._prepare)

    async def _prepare(self, request: web.Request, lease: MediaLease, lookup: LookUp) -> Prepared:
        body = await self._responder.read_body(request, lease)
        chat, ignored = parse_chat_request(body)
        num_body_bytes = len(body)
        del body
        chat = msgspec.structs.replace(chat, cache_salt=tenant_salt(request, chat.cache_salt))
        generation = await self.generation(chat, lease, lookup, request[TIMELINE], body_bytes=num_body_bytes)
        answer_id = f"chatcmpl-{secrets.token_hex(16)}"
        return Prepared(
            answer_id=answer_id,
            generations=(generation,),
            format=ChatFormat(answer_id, chat, generation.prompt.token_ids, self._model, self._vocabulary),
            stream=bool(chat.stream),
            headers=ignored_fields(ignored),
        )

    async def generation(
        self, chat: ChatRequest, lease: MediaLease, lookup: LookUp, timeline: OpenTimeline, *, body_bytes: int
    ) -> Generation:
        """What the scheduler is to run for a request that check_chat_request has passed.

        Args: body_bytes: of the lease, what is given back once the body is not needed any more.
        Raises: RequestError 400 or 404, and those of fetching media.
        """
        self._model.check(chat.model)
        max_model_len = self._model.max_model_len
        use = chat.tool_use()
        conversation = chat.conversation(use.shown)
        begin_s = time.monotonic()
        form = await self._forms.form(chat, use)
        if form.grammar:
            timeline.add_since(begin_s, "grammar")

        def rule(num_tokens: int) -> ChoiceRule:
            room = max_model_len - num_tokens
            return self._sampling.choice_rule(chat, room, chat.num_logprobs, grammar=form.grammar, shape=form.shape)

        built = await self._prompts.build(conversation, lease, lookup, timeline, body_bytes=body_bytes, check_size=rule)
        return Generation(
            prompt=built.prompt,
            rule=rule(len(built.prompt.token_ids)),
            num_choices=chat.n or 1,
            media=built.media,
            cache_salt=chat.cache_salt or "",
            priority=chat.priority or 0,
            lookup_id=lookup.lookup_id,
        )
