"""Messages -> token ids with every picture's placeholder expanded to as many tokens as the picture has rows."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from itertools import pairwise
from pathlib import Path
from typing import Any

from msgspec import Struct
from tokenizers import Tokenizer

from vlmrt.actors.edge.chat_template import ChatTemplate, load_chat_template
from vlmrt.actors.edge.identify import IdentifiedImage, PromptImage
from vlmrt.actors.models.config import ModelConfig
from vlmrt.actors.models.rope_index import MediaSpan, rope_delta
from vlmrt.runtime.errors import RequestError, StartupError
from vlmrt.runtime.messages import MediaItem

LONG_TEXT_CHARS = 8192  # rendered and tokenized off the event loop from here on (about 2 ms)
_MARKS = range(0xF0000, 0xFFFFE)  # private use characters


class Prompt(Struct, frozen=True):
    token_ids: tuple[int, ...]
    media: tuple[MediaItem, ...]
    rope_delta: int

    @property
    def num_image_tokens(self) -> int:
        return sum(item.num_tokens for item in self.media)


class PromptBuilder:
    """The chat template and the tokenizer of one model."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, model: ModelConfig, max_model_len: int) -> None:
        self.tokenizer = tokenizer
        self._template = template
        self._model = model
        self._max_model_len = max_model_len
        self._plain_tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._plain_tokenizer.encode_special_tokens = True  # reads their names as text
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token.content: id for id, token in added.items() if token.special and token.content}
        self._special_ids = frozenset(self._special.values())
        names = sorted(self._special, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._risky = re.compile(_risky_pattern(names))

    async def build(
        self, messages: Sequence[dict[str, Any]], images: Sequence[PromptImage], executor: Executor
    ) -> Prompt:
        """Render, tokenize, expand.

        Raises: RequestError 400: the template refuses, it has no place for the pictures, the context is too short.
        """
        if _is_short(messages):
            return self.expand(self.encode(messages), images)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(executor, lambda: self.expand(self.encode(messages), images))

    async def tokenize(self, messages: Sequence[dict[str, Any]], executor: Executor) -> list[int]:
        """The first half of `build`, for `expand` to go on with."""
        if _is_short(messages):
            return self.encode(messages)
        return await asyncio.get_running_loop().run_in_executor(executor, self.encode, messages)

    def encode(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids as transformers' apply_chat_template, except that a control token's name in a message is text."""
        texts = _texts(messages)
        if not any(self._risky.search(text) for text in texts):
            ids: list[int] = self.tokenizer.encode(self._template.render(messages), add_special_tokens=False).ids
            return ids
        mark = next(char for char in map(chr, _MARKS) if not any(char in text for text in texts))
        marked = _map_texts(
            messages, lambda text: self._risky.sub(lambda found: found[0][0] + mark + found[0][1:], text)
        )
        return self._encode_marked(self._template.render(marked), mark)

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        """Names of control tokens in the text are the template's; with the mark inside them, they were a client's."""
        ids: list[int] = []
        places = [(0, 0), *(found.span() for found in self._control.finditer(text)), (len(text), len(text))]
        for (start, stop), (next_start, _) in pairwise(places):
            if start < stop:
                ids.append(self._special[text[start:stop]])
            ids += self._encode_plain(text[stop:next_start].replace(mark, ""))
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        if not text:
            return []
        ids: list[int] = self._plain_tokenizer.encode(text, add_special_tokens=False).ids
        if not self._special_ids.isdisjoint(ids):  # a vocabulary that holds such names as words
            raise RequestError("messages hold the name of a control token", param="messages", code="control_token")
        return ids

    def check(self, token_ids: Sequence[int], num_images: int, known: Sequence[PromptImage]) -> None:
        """Refuse now what no finding about the pictures that are not known yet could make right.

        Raises: RequestError 400, as `expand` does.
        """
        self._places(token_ids, num_images)
        self._check_length(len(token_ids), known)

    def _places(self, token_ids: Sequence[int], num_images: int) -> list[int]:
        image_token_id = self._model.image_token_id
        places = [index for index, token_id in enumerate(token_ids) if token_id == image_token_id]
        if len(places) != num_images:
            raise RequestError(
                f"the model's chat template made {len(places)} placeholders for {num_images} images",
                param="messages",
                code="placeholder_mismatch",
            )
        return places

    def expand(self, token_ids: Sequence[int], images: Sequence[PromptImage]) -> Prompt:
        """Replace the n-th placeholder by the n-th picture's tokens; linear in the length of the result."""
        image_token_id = self._model.image_token_id
        places = self._places(token_ids, len(images))
        self._check_length(len(token_ids), images)
        expanded: list[int] = []
        media = []
        done = 0
        for place, image in zip(places, images, strict=True):
            expanded += token_ids[done:place]
            has_bytes = isinstance(image, IdentifiedImage)
            media.append(
                MediaItem(image.mm_hash, len(expanded), image.num_tokens, image.grid_thw, image.uuid, has_bytes)
            )
            expanded += [image_token_id] * image.num_tokens
            done = place + 1
        expanded += token_ids[done:]
        spans = [MediaSpan(item.start, item.num_tokens, item.grid_thw) for item in media]
        delta = rope_delta(len(expanded), spans, self._model.vision.spatial_merge_size)
        return Prompt(tuple(expanded), tuple(media), delta)

    def _check_length(self, num_tokens: int, images: Sequence[PromptImage]) -> None:
        num_image_tokens = sum(image.num_tokens for image in images)
        total = num_tokens - len(images) + num_image_tokens
        if total + 1 > self._max_model_len:
            raise RequestError(
                f"the prompt has {total} tokens, {num_image_tokens} of them for {len(images)} images; with at least "
                f"one token of answer it must fit the context of {self._max_model_len} tokens",
                param="messages",
                code="context_length_exceeded",
            )
        if total == 0:
            raise RequestError("the prompt is empty", param="messages", code="empty_prompt")


def _risky_pattern(names: Sequence[str]) -> str:
    """What a client's text must not put before the tokenizer as it is: a control token's name, or its beginning at the
    end of the text, which the next text could complete."""
    beginnings = {name[:length] for name in names for length in range(1, len(name))}
    endings = "|".join(map(re.escape, sorted(beginnings, key=len, reverse=True)))
    whole = "|".join(map(re.escape, names))
    return f"{whole}|(?:{endings})\\Z" if names else r"(?!)"


def _is_short(messages: Sequence[dict[str, Any]]) -> bool:
    return sum(map(len, _texts(messages))) < LONG_TEXT_CHARS


def _texts(value: object) -> list[str]:
    """Every string in the messages that a client chose."""
    texts: list[str] = []
    waiting = [value]
    while waiting:
        match waiting.pop():
            case str(text):
                texts.append(text)
            case dict(items):
                waiting.extend(items)
                waiting.extend(items.values())
            case list(items):
                waiting.extend(items)
    return texts


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    match value:
        case str():
            return change(value)
        case dict():
            return {change(key): _map_texts(item, change) for key, item in value.items()}
        case list():
            return [_map_texts(item, change) for item in value]
    return value


def load_prompt_builder(
    directory: Path, model: ModelConfig, max_model_len: int, chat_template: str | None
) -> PromptBuilder:
    """Raises: StartupError where tokenizer.json or the chat template is missing or cannot be read."""
    file = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{file}: {error}") from None
    except Exception as error:  # the library raises no narrower type
        raise StartupError(f"{file}: not a tokenizer: {error}") from None
    return PromptBuilder(load_chat_template(directory, chat_template), tokenizer, model, max_model_len)
