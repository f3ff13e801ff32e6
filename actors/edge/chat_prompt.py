"""A conversation with its media -> the prompt, and the media whose bytes a media worker may be given."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import msgspec
from msgspec import Struct

from vlmrt.actors.edge.chat_request import Conversation, media_sources, template_messages
from vlmrt.actors.edge.fetch import MediaFetcher
from vlmrt.actors.edge.identify import IdentifiedClip, ImageIdentifier, NamedImage, PromptMedium, SentMedium
from vlmrt.actors.edge.identify_clip import ClipIdentifier
from vlmrt.actors.edge.media_parts import ImageSource, MediaSource, VideoSource
from vlmrt.actors.edge.open_requests import MediaLease
from vlmrt.actors.edge.prompt import Prompt, PromptBuilder
from vlmrt.actors.edge.scheduler_link import LookUp
from vlmrt.actors.edge.timelines import OpenTimeline, span_of
from vlmrt.actors.edge.tool_prompt import write_tools
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.metrics import Metrics


class ChatPrompt(Struct, frozen=True):
    """What a conversation became."""

    prompt: Prompt
    media: tuple[SentMedium, ...]


class ChatPrompts:
    """Makes prompts of conversations."""

    def __init__(
        self,
        fetcher: MediaFetcher,
        images: ImageIdentifier,
        clips: ClipIdentifier,
        prompts: PromptBuilder,
        executor: Executor,
        metrics: Metrics,
        *,
        limit_images: int,
        limit_videos: int,
    ) -> None:
        self._fetcher = fetcher
        self._images = images
        self._clips = clips
        self._prompts = prompts
        self._executor = executor
        self._metrics = metrics
        self._limit_images = limit_images
        self._limit_videos = limit_videos

    async def build(
        self,
        conversation: Conversation,
        lease: MediaLease,
        lookup: LookUp,
        timeline: OpenTimeline | None,
        *,
        body_bytes: int,
        check_size: Callable[[int], object] | None = None,
    ) -> ChatPrompt:
        """Identify, render, tokenize, expand.

        Args: body_bytes: of the lease, what is given back once the body that the conversation came in is not needed
        any more; check_size is told how long the prompt is at least, before the scheduler is asked about pictures,
        and may refuse it; without it a prompt may be longer than the context.
        """
        sources = media_sources(conversation.messages, conversation.defaults)
        self._check_counts(sources)
        identified = await self._identify(sources, conversation.cache_salt, lease, timeline)
        lease.give_back(min(body_bytes, lease.held_bytes))
        messages, options = template_messages(conversation.messages), conversation.options
        if not self._prompts.reads_tools:
            messages = write_tools(messages, options.tools or ())
            options = msgspec.structs.replace(options, tools=None)
        media: list[PromptMedium] = [medium for medium in identified if medium is not None]
        with span_of(timeline, "prompt"):
            token_ids = await self._prompts.tokenize(messages, self._executor, options)
        if len(media) < len(sources):  # what can be refused without the scheduler is, before it is asked for the rest
            if check_size is not None:
                self._prompts.check(token_ids, [isinstance(source, VideoSource) for source in sources], media)
                check_size(len(token_ids))
            with span_of(timeline, "look_up"):
                media = await self._find_named(sources, identified, conversation.cache_salt, lookup)
        prompt = self._prompts.expand(token_ids, media, bounded=check_size is not None)
        return ChatPrompt(prompt, tuple(medium for medium in media if not isinstance(medium, NamedImage)))

    def _check_counts(self, sources: Sequence[MediaSource]) -> None:
        num_videos = sum(isinstance(source, VideoSource) for source in sources)
        for name, count, limit in (
            ("images", len(sources) - num_videos, self._limit_images),
            ("videos", num_videos, self._limit_videos),
        ):
            if count > limit:
                message = f"messages hold {count} {name}, more than {limit}"
                raise RequestError(message, param="messages", code=f"too_many_{name}")

    async def _identify(
        self, sources: Sequence[MediaSource], cache_salt: str, lease: MediaLease, timeline: OpenTimeline | None
    ) -> list[SentMedium | None]:
        """All media whose bytes were sent, fetched side by side; None for pictures that are only named."""

        async def one(source: MediaSource) -> SentMedium | None:
            if isinstance(source, ImageSource) and not source.url and source.uuid:
                return None
            with span_of(timeline, "fetch", source.param):
                encoded = await self._fetcher.fetch(source, lease)
            with span_of(timeline, "identify", source.param):
                if isinstance(source, VideoSource):
                    return await self._identify_clip(source, encoded, cache_salt)
                return await self._images.identify(
                    encoded,
                    limits=source.limits,
                    cache_salt=cache_salt,
                    param=source.param,
                    executor=self._executor,
                    uuid=source.uuid,
                )

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(source)) for source in sources]
        except* RequestError as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _identify_clip(self, source: VideoSource, encoded: bytes, cache_salt: str) -> IdentifiedClip:
        self._metrics.add("videos_total")
        return await self._clips.identify(
            encoded, options=source.options, cache_salt=cache_salt, param=source.param, executor=self._executor
        )

    async def _find_named(
        self,
        sources: Sequence[MediaSource],
        identified: Sequence[SentMedium | None],
        cache_salt: str,
        lookup: LookUp,
    ) -> list[PromptMedium]:
        """Fill the gaps with what the request itself names elsewhere, then with what the scheduler knows.

        Raises: RequestError 400 `media_not_cached` for the first picture that nobody knows.
        """
        known: dict[str, PromptMedium] = {}
        named: list[ImageSource] = []
        for source, medium in zip(sources, identified, strict=True):
            if isinstance(source, ImageSource) and medium is None:
                named.append(source)
            elif isinstance(source, ImageSource) and medium is not None and source.uuid:
                known[source.uuid] = medium
        missing = tuple(dict.fromkeys(source.uuid for source in named if source.uuid not in known))
        if missing:
            for uuid, item in zip(missing, await lookup.find(cache_salt, missing), strict=True):
                if item is not None:
                    known[uuid] = NamedImage(uuid, item.mm_hash, item.grid_thw, item.num_tokens)
        for source in named:
            if source.uuid not in known:
                raise RequestError(
                    f"{source.param} = {source.uuid!r}: the server does not have this image; send its bytes as well",
                    param=source.param,
                    code="media_not_cached",
                )
        found = (known[source.uuid] for source in named)
        return [next(found) if medium is None else medium for medium in identified]
