"""A conversation with its pictures -> the prompt, and the pictures whose bytes a media worker may ask for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import msgspec
from msgspec import Struct

from vlmrt.actors.edge.chat_request import Conversation, ImageSource, image_sources, template_messages
from vlmrt.actors.edge.fetch import MediaFetcher
from vlmrt.actors.edge.identify import IdentifiedImage, ImageIdentifier, NamedImage, PromptImage
from vlmrt.actors.edge.open_requests import MediaLease
from vlmrt.actors.edge.prompt import Prompt, PromptBuilder
from vlmrt.actors.edge.scheduler_link import LookUp
from vlmrt.actors.edge.tool_prompt import write_tools
from vlmrt.runtime.errors import RequestError


class ChatPrompt(Struct, frozen=True):
    """What a conversation became."""

    prompt: Prompt
    images: tuple[IdentifiedImage, ...]


class ChatPrompts:
    """Makes prompts of conversations."""

    def __init__(
        self,
        fetcher: MediaFetcher,
        identifier: ImageIdentifier,
        prompts: PromptBuilder,
        executor: Executor,
        limit_images: int,
    ) -> None:
        self._fetcher = fetcher
        self._identifier = identifier
        self._prompts = prompts
        self._executor = executor
        self._limit_images = limit_images

    async def build(
        self,
        conversation: Conversation,
        lease: MediaLease,
        lookup: LookUp,
        *,
        body_bytes: int,
        check_size: Callable[[int], object] | None = None,
    ) -> ChatPrompt:
        """Identify, render, tokenize, expand.

        Args: body_bytes: of the lease, what is given back once the body that the conversation came in is not needed
        any more; check_size is told how long the prompt is at least, before the scheduler is asked about pictures,
        and may refuse it; without it a prompt may be longer than the context.
        """
        sources = image_sources(conversation.messages, conversation.limits)
        self._check_count(len(sources))
        identified = await self._identify(sources, conversation.cache_salt, lease)
        lease.give_back(min(body_bytes, lease.held_bytes))
        messages, options = template_messages(conversation.messages), conversation.options
        if not self._prompts.reads_tools:
            messages = write_tools(messages, options.tools or ())
            options = msgspec.structs.replace(options, tools=None)
        images: list[PromptImage] = [image for image in identified if image is not None]
        token_ids = await self._prompts.tokenize(messages, self._executor, options)
        if len(images) < len(sources):  # what can be refused without the scheduler is, before it is asked for the rest
            if check_size is not None:
                self._prompts.check(token_ids, len(sources), images)
                check_size(len(token_ids))
            images = await self._find_named(sources, identified, conversation.cache_salt, lookup)
        prompt = self._prompts.expand(token_ids, images, bounded=check_size is not None)
        return ChatPrompt(prompt, tuple(image for image in images if isinstance(image, IdentifiedImage)))

    def _check_count(self, count: int) -> None:
        limit = self._limit_images
        if count > limit:
            raise RequestError(
                f"messages hold {count} images, more than {limit}", param="messages", code="too_many_images"
            )

    async def _identify(
        self, sources: Sequence[ImageSource], cache_salt: str, lease: MediaLease
    ) -> list[IdentifiedImage | None]:
        """All pictures whose bytes were sent, fetched side by side; None for those that are only named."""

        async def one(source: ImageSource) -> IdentifiedImage | None:
            if not source.url and source.uuid:
                return None
            encoded = await self._fetcher.fetch(source, lease)
            return await self._identifier.identify(
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
