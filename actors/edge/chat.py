"""POST /v1/chat/completions, from the body to the last byte of the answer."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager

from aiohttp import web
from msgspec import UNSET, Struct

from vlmrt.actors.edge.body import read_json_body
from vlmrt.actors.edge.chat_request import (
    ChatRequest,
    ImageSource,
    image_sources,
    parse_chat_request,
    template_messages,
)
from vlmrt.actors.edge.detokenizer import Detokenizer, Vocabulary
from vlmrt.actors.edge.fetch import MediaFetcher
from vlmrt.actors.edge.identify import IdentifiedImage, ImageIdentifier, NamedImage, PromptImage
from vlmrt.actors.edge.open_requests import MediaBudget, MediaLease, OpenRequest
from vlmrt.actors.edge.prompt import Prompt, PromptBuilder
from vlmrt.actors.edge.responses import AnswerMessage, ChatCompletion, ChatUsage, Choice, chat_usage, encode_json
from vlmrt.actors.edge.sampling import SamplingDefaults
from vlmrt.actors.edge.scheduler_link import LookUp, SchedulerLink
from vlmrt.actors.edge.stream import ChunkEncoder, EventStream, UsageStyle
from vlmrt.runtime.config import Config
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.messages import FinishReason, RequestId, Submit, TokenOutput, Usage
from vlmrt.runtime.metrics import Metrics

ALIAS = "model"  # answers always, whatever the model is called
_FIELD_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
MAX_NAMED_FIELDS = 16

logger = logging.getLogger(__name__)


class ChatCollaborators(Struct, frozen=True):
    """What the endpoint works with."""

    config: Config
    link: SchedulerLink
    metrics: Metrics
    budget: MediaBudget
    fetcher: MediaFetcher
    identifier: ImageIdentifier
    prompts: PromptBuilder
    vocabulary: Vocabulary
    sampling: SamplingDefaults
    executor: Executor
    write_timeout_s: float


class Prepared(Struct, frozen=True):
    """A request that the scheduler can run, and how to answer it; the body it came from is no longer held."""

    submit: Submit
    images: tuple[IdentifiedImage, ...]
    num_image_tokens: int
    stops: tuple[str, ...]
    stream: bool
    usage_style: UsageStyle
    return_token_ids: bool
    headers: dict[str, str]


class ChatEndpoint:
    """Answers chat completions; one call of `post` per request."""

    def __init__(self, collaborators: ChatCollaborators) -> None:
        self._with = collaborators
        self._served_names = collaborators.config.model.served_names

    async def post(self, request: web.Request) -> web.StreamResponse:
        """Answer one request.  Cancelled when the client goes; then the request is aborted."""
        try:
            return await self._answer(request)
        except (asyncio.CancelledError, ConnectionResetError):
            self._with.metrics.add("requests_aborted_total")
            raise

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        """Parse, identify, render, submit, answer."""
        arrived_s = time.monotonic()
        self._with.link.check_open()
        timeout_s = self._with.config.server.request_timeout_s
        with self._with.budget.lease() as lease, self._with.link.look_up() as lookup:
            try:
                async with asyncio.timeout(timeout_s):
                    prepared = await self._prepare(request, lease, lookup)
            except TimeoutError:
                raise _too_late(timeout_s) from None
            with (
                self._with.link.submit(prepared.submit, prepared.images) as open_request,
                _deadline(open_request, arrived_s + timeout_s, timeout_s),
            ):
                answer = Answer(prepared, self._with.vocabulary, self._with.metrics, arrived_s)
                if prepared.stream:
                    return await self._stream(request, prepared, open_request, answer)
                return await self._whole(prepared, open_request, answer)

    async def _prepare(self, request: web.Request, lease: MediaLease, lookup: LookUp) -> Prepared:
        body = await read_json_body(request, self._with.config.server.max_body_mib << 20, lease)
        chat, ignored = parse_chat_request(body)
        num_body_bytes = len(body)
        del body
        self._check_model(chat.model)
        sources = self._sources(chat)
        identified = await self._identify(sources, chat.cache_salt or "", lease)
        lease.give_back(min(num_body_bytes, lease.held_bytes))
        messages = template_messages(chat.messages)
        images: list[PromptImage] = [image for image in identified if image is not None]
        if len(images) == len(sources):
            prompt = await self._with.prompts.build(messages, images, self._with.executor)
        else:  # what can be refused without the scheduler is, before it is asked for the rest
            token_ids = await self._with.prompts.tokenize(messages, self._with.executor)
            self._with.prompts.check(token_ids, len(sources), images)
            self._with.sampling.stop_rule(chat, self._with.config.model.max_model_len - len(token_ids))
            images = await self._find_named(sources, identified, chat.cache_salt or "", lookup)
            prompt = self._with.prompts.expand(token_ids, images)
        submit = self._submit(chat, prompt, lookup.lookup_id)
        headers = {"x-vlmrt-ignored": _shown_fields(ignored)} if ignored else {}
        return Prepared(
            submit=submit,
            images=tuple(image for image in images if isinstance(image, IdentifiedImage)),
            num_image_tokens=prompt.num_image_tokens,
            stops=chat.stops,
            stream=bool(chat.stream),
            usage_style=_usage_style(chat),
            return_token_ids=bool(chat.return_token_ids),
            headers=headers,
        )

    def _check_model(self, model: str | None) -> None:
        if model is not None and model not in (ALIAS, *self._served_names):
            raise RequestError(
                f"the model {model[:100]!r} does not exist; served here: {', '.join(self._served_names)}",
                status=404,
                code="model_not_found",
                param="model",
            )

    def _sources(self, chat: ChatRequest) -> list[ImageSource]:
        sources = image_sources(chat.messages)
        limit = self._with.config.server.limit_images
        if len(sources) > limit:
            raise RequestError(
                f"messages hold {len(sources)} images, more than {limit}", param="messages", code="too_many_images"
            )
        return sources

    async def _identify(
        self, sources: Sequence[ImageSource], cache_salt: str, lease: MediaLease
    ) -> list[IdentifiedImage | None]:
        """All pictures whose bytes were sent, fetched side by side; None for those that are only named."""

        async def one(source: ImageSource) -> IdentifiedImage | None:
            if not source.url and source.uuid:
                return None
            encoded = await self._with.fetcher.fetch(source, lease)
            return await self._with.identifier.identify(
                encoded,
                low_detail=source.low_detail,
                cache_salt=cache_salt,
                param=source.param,
                executor=self._with.executor,
                uuid=source.uuid,
            )

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(source)) for source in sources]
        except* RequestError as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _find_named(
        self,
        sources: Sequence[ImageSource],
        identified: Sequence[IdentifiedImage | None],
        cache_salt: str,
        lookup: LookUp,
    ) -> list[PromptImage]:
        """Fill the gaps with what the request itself names elsewhere, then with what the scheduler knows.

        Raises: RequestError 400 `media_not_cached` for the first picture that nobody knows.
        """
        known: dict[str, PromptImage] = {image.uuid: image for image in identified if image is not None and image.uuid}
        named = [source.uuid for source, image in zip(sources, identified, strict=True) if image is None]
        missing = tuple(dict.fromkeys(uuid for uuid in named if uuid not in known))
        if missing:
            for uuid, item in zip(missing, await lookup.find(cache_salt, missing), strict=True):
                if item is not None:
                    known[uuid] = NamedImage(uuid, item.mm_hash, item.grid_thw, item.num_tokens)
        for source, image in zip(sources, identified, strict=True):
            if image is None and source.uuid not in known:
                raise RequestError(
                    f"{source.param} = {source.uuid!r}: the server does not have this image; send its bytes as well",
                    param=source.param,
                    code="media_not_cached",
                )
        return [image or known[source.uuid] for source, image in zip(sources, identified, strict=True)]

    def _submit(self, chat: ChatRequest, prompt: Prompt, lookup_id: int) -> Submit:
        num_prompt_tokens = len(prompt.token_ids)
        return Submit(
            request_id=RequestId(f"chatcmpl-{secrets.token_hex(16)}"),
            prompt_token_ids=prompt.token_ids,
            media=prompt.media,
            rope_delta=prompt.rope_delta,
            sampling=self._with.sampling.sampling(chat),
            stop=self._with.sampling.stop_rule(chat, self._with.config.model.max_model_len - num_prompt_tokens),
            cache_salt=chat.cache_salt or "",
            priority=chat.priority or 0,
            lookup_id=lookup_id,
        )

    async def _whole(self, prepared: Prepared, open_request: OpenRequest, answer: Answer) -> web.Response:
        texts = []
        token_ids: list[int] = []
        while answer.finish_reason is None:
            outputs = await open_request.outputs()
            token_ids += [token_id for output in outputs for token_id in output.token_ids]
            texts.append(answer.take(outputs))
        message = AnswerMessage("".join(texts))
        completion = ChatCompletion(
            id=open_request.request_id,
            created=answer.created,
            model=self._served_names[0],
            choices=(
                Choice(
                    message, answer.finish_reason, token_ids=tuple(token_ids) if prepared.return_token_ids else UNSET
                ),
            ),
            usage=answer.usage,
            prompt_token_ids=prepared.submit.prompt_token_ids if prepared.return_token_ids else UNSET,
        )
        headers = {**prepared.headers, **answer.headers()}
        return web.Response(body=encode_json(completion), content_type="application/json", headers=headers)

    async def _stream(
        self, request: web.Request, prepared: Prepared, open_request: OpenRequest, answer: Answer
    ) -> web.StreamResponse:
        chunks = ChunkEncoder(open_request.request_id, answer.created, self._served_names[0], prepared.usage_style)
        outputs = await open_request.outputs()  # an error until here is an ordinary answer with its own status
        stream = EventStream(request, {**prepared.headers, **answer.headers()}, self._with.write_timeout_s)
        try:
            text = answer.take(outputs)
            data = chunks.role(_counts(chunks, answer))
            while True:
                if text:
                    data += chunks.text(text, _counts(chunks, answer))
                if answer.finish_reason is not None:
                    data += chunks.finish(answer.finish_reason, _counts(chunks, answer)) + chunks.end(answer.usage)
                if data:
                    await stream.write(data)
                if answer.finish_reason is not None:
                    break
                text, data = answer.take(await open_request.outputs()), b""
        except RequestError as error:
            self._with.metrics.add("request_errors_total", code=error.code or str(error.status))
            await stream.fail(error)
        except ConnectionError:
            raise
        except Exception:
            if not stream.begun:
                raise
            logger.exception("%s failed while it was streamed", open_request.request_id)
            self._with.metrics.add("request_errors_total", code="internal_error")
            await stream.fail(RequestError("internal error", status=500, code="internal_error"))
        return await stream.close()


class Answer:
    """What has come of one answer: its text cut at stops, its usage, its end."""

    def __init__(self, prepared: Prepared, vocabulary: Vocabulary, metrics: Metrics, arrived_s: float) -> None:
        stop = prepared.submit.stop
        self.created = int(time.time())
        self.finish_reason: FinishReason | None = None
        self._last_usage = Usage(len(prepared.submit.prompt_token_ids), 0, 0)
        self._num_image_tokens = prepared.num_image_tokens
        self._stop_token_ids = frozenset(stop.stop_token_ids)
        self._detokenizer = Detokenizer(vocabulary, prepared.stops, stop.min_tokens)
        self._metrics = metrics
        self._arrived_s = arrived_s
        self._last_token_s: float | None = None

    @property
    def usage(self) -> ChatUsage:
        return chat_usage(self._last_usage, self._num_image_tokens)

    def headers(self) -> dict[str, str]:
        return {"openai-processing-ms": str(int((time.monotonic() - self._arrived_s) * 1000))}

    def take(self, outputs: Sequence[TokenOutput]) -> str:
        """The text that these outputs let out; sets finish_reason where they end the answer."""
        token_ids = [token_id for output in outputs for token_id in output.token_ids]
        self._measure(len(token_ids))
        last = outputs[-1]
        self._last_usage = last.usage
        finish_reason = last.finish_reason
        if finish_reason == "stop" and token_ids and token_ids[-1] in self._stop_token_ids:
            token_ids.pop()
        text = self._detokenizer.push(token_ids)
        if finish_reason is not None:
            text += self._detokenizer.flush()
        self.finish_reason = "stop" if self._detokenizer.stopped else finish_reason
        if self.finish_reason is not None:
            self._metrics.add("request_success_total", finished_reason=self.finish_reason)
            self._metrics.observe("e2e_request_latency_seconds", time.monotonic() - self._arrived_s)
        return text

    def _measure(self, num_tokens: int) -> None:
        if not num_tokens:
            return
        now_s = time.monotonic()
        if self._last_token_s is None:
            self._metrics.observe("time_to_first_token_seconds", now_s - self._arrived_s)
        else:
            self._metrics.observe("inter_token_latency_seconds", (now_s - self._last_token_s) / num_tokens)
        self._last_token_s = now_s


@contextmanager
def _deadline(open_request: OpenRequest, at_s: float, timeout_s: float) -> Iterator[None]:
    """Fail the request at a time of the monotonic clock."""
    loop = asyncio.get_running_loop()
    timer = loop.call_later(max(0.0, at_s - time.monotonic()), lambda: open_request.fail(_too_late(timeout_s)))
    try:
        yield
    finally:
        timer.cancel()


def _too_late(timeout_s: float) -> RequestError:
    return RequestError(f"the request took longer than {timeout_s:g} s", status=504, code="request_timeout")


def _counts(chunks: ChunkEncoder, answer: Answer) -> ChatUsage | None:
    return answer.usage if chunks.usage == "every" else None


def _usage_style(chat: ChatRequest) -> UsageStyle:
    options = chat.stream_options
    if options is None:
        return "none"
    if options.continuous_usage_stats:
        return "every"
    return "last" if options.include_usage else "none"


def _shown_fields(names: Sequence[str]) -> str:
    """Names of ignored fields as a header may hold them."""
    shown = [name if _FIELD_NAME.fullmatch(name) else "?" for name in names[:MAX_NAMED_FIELDS]]
    return ",".join(shown + ["..."] * (len(names) > MAX_NAMED_FIELDS))
