"""POST /v1/completions: prompts as they are, without template and pictures."""

from __future__ import annotations

import secrets
import time
from concurrent.futures import Executor

import msgspec
from aiohttp import web

from vlmrt.actors.edge.answer_form import AnswerForms
from vlmrt.actors.edge.api_keys import tenant_salt
from vlmrt.actors.edge.completion_format import CompletionFormat
from vlmrt.actors.edge.completion_request import CompletionRequest, parse_completion_request
from vlmrt.actors.edge.detokenizer import Vocabulary
from vlmrt.actors.edge.generation import Generation
from vlmrt.actors.edge.open_requests import MediaLease
from vlmrt.actors.edge.prompt import PromptBuilder
from vlmrt.actors.edge.responder import Prepared, Responder, ignored_fields
from vlmrt.actors.edge.sampling import SamplingDefaults
from vlmrt.actors.edge.scheduler_link import LookUp
from vlmrt.actors.edge.served_model import ServedModel
from vlmrt.actors.edge.timelines import TIMELINE


class CompletionEndpoint:
    """Answers text completions; one call of `post` per request."""

    def __init__(
        self,
        responder: Responder,
        prompts: PromptBuilder,
        executor: Executor,
        sampling: SamplingDefaults,
        model: ServedModel,
        vocabulary: Vocabulary,
        forms: AnswerForms,
    ) -> None:
        self._responder = responder
        self._prompts = prompts
        self._executor = executor
        self._sampling = sampling
        self._model = model
        self._vocabulary = vocabulary
        self._forms = forms

    async def post(self, request: web.Request) -> web.StreamResponse:
        return await self._responder.post(request, self._prepare)

    async def _prepare(self, request: web.Request, lease: MediaLease, lookup: LookUp) -> Prepared:
        body = await self._responder.read_body(request, lease)
        fields, ignored = parse_completion_request(body)
        self._model.check(fields.model)
        fields = msgspec.structs.replace(fields, cache_salt=tenant_salt(request, fields.cache_salt))
        lease.give_back(len(body))
        del body
        prompts = fields.prompts()
        self._responder.check_room(len(prompts) * (fields.n or 1))
        begin_s = time.monotonic()
        grammar = (await self._forms.form(fields)).grammar
        if grammar:
            request[TIMELINE].add_since(begin_s, "grammar")
        with request[TIMELINE].span("prompt"):
            generations = tuple([await self._generation(fields, prompt, grammar) for prompt in prompts])
        token_ids = [generation.prompt.token_ids for generation in generations]
        answer_id = f"cmpl-{secrets.token_hex(16)}"
        echoes = list(map(self._text, prompts)) if fields.echo else None
        return Prepared(
            answer_id=answer_id,
            generations=generations,
            format=CompletionFormat(answer_id, fields, token_ids, echoes, self._model, self._vocabulary),
            stream=bool(fields.stream),
            headers=ignored_fields(ignored),
        )

    async def _generation(self, fields: CompletionRequest, prompt: str | list[int], grammar: str) -> Generation:
        if isinstance(prompt, str):
            special = fields.add_special_tokens is not False
            token_ids = await self._prompts.encode_text(prompt, self._executor, add_special_tokens=special)
        else:
            self._sampling.check_token_ids(prompt, "prompt")
            token_ids = prompt
        room = self._model.max_model_len - len(token_ids)
        return Generation(
            prompt=self._prompts.text_prompt(token_ids, "prompt"),
            rule=self._sampling.choice_rule(fields, room, fields.num_logprobs, grammar=grammar),
            num_choices=fields.n or 1,
            cache_salt=fields.cache_salt or "",
            priority=fields.priority or 0,
        )

    def _text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._prompts.decode(prompt)
