"""Messages -> token ids with every picture's placeholder expanded to as many tokens as the picture has rows."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from tokenizers import Tokenizer

from vlmrt.actors.edge.chat_template import ChatTemplate, TemplateOptions, load_chat_template
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
        self.template_source = template.source
        self.reads_tools = template.reads_tools
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

    async def tokenize(
        self, messages: Sequence[dict[str, Any]], executor: Executor, options: TemplateOptions | None = None
    ) -> list[int]:
        """As `encode`; long conversations leave the event loop."""
        options = options or TemplateOptions()
        if sum(map(len, _texts([messages, options.tools, options.variables]))) < LONG_TEXT_CHARS:
            return self.encode(messages, options)
        return await asyncio.get_running_loop().run_in_executor(executor, self.encode, messages, options)

    def encode(self, messages: Sequence[dict[str, Any]], options: TemplateOptions | None = None) -> list[int]:
        """Token ids as transformers' apply_chat_template, except that a control token's name in a message is text."""
        options = options or TemplateOptions()
        texts = _texts([messages, options.tools, options.variables])
        if not any(self._risky.search(text) for text in texts):
            return self._encode_raw(self._render(messages, options, texts))
        mark = _unused_char(texts)

        def marked(value: Any) -> Any:
            return _map_texts(value, lambda text: self._risky.sub(lambda name: name[0][0] + mark + name[0][1:], text))

        changed = msgspec.structs.replace(
            options,
            tools=marked(options.tools),
            variables={name: marked(value) for name, value in options.variables.items()},
        )
        return self._encode_marked(self._render(marked(messages), changed, [*texts, mark]), mark)

    async def encode_text(self, text: str, executor: Executor, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a raw prompt, in which the names of control tokens are control tokens."""
        if len(text) < LONG_TEXT_CHARS:
            return self._encode_raw(text, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(executor, self._encode_raw, text, add_special_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, names of control tokens included."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=False)
        return text

    def _encode_raw(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _render(self, messages: Sequence[dict[str, Any]], options: TemplateOptions, texts: Sequence[str]) -> str:
        if not options.continue_final_message:
            return self._template.render(messages, options)
        end = _unused_char(texts)
        rendered, found, _ = self._template.render(_with_end(messages, end), options).rpartition(end)
        if not found:
            raise RequestError(
                "continue_final_message: the model's chat template does not show the last message's text",
                param="continue_final_message",
                code="template_error",
            )
        return rendered

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

    def text_prompt(self, token_ids: Sequence[int], param: str) -> Prompt:
        """A prompt without pictures.

        Raises: RequestError 400: it has none or too many tokens, or one that stands for a picture.
        """
        for token_id in (self._model.image_token_id, self._model.video_token_id):
            if token_id in token_ids:
                name = self.tokenizer.id_to_token(token_id)
                problem = f"holds {name}, token {token_id}, which stands for media that this route does not take"
                raise RequestError(f"{param} {problem}", param=param, code="placeholder_mismatch")
        self._check_length(len(token_ids), (), param)
        return Prompt(tuple(token_ids), (), 0)

    def expand(self, token_ids: Sequence[int], images: Sequence[PromptImage], *, bounded: bool = True) -> Prompt:
        """Replace the n-th placeholder by the n-th picture's tokens; linear in the length of the result.

        Args: bounded: refuse what the context does not hold.
        """
        image_token_id = self._model.image_token_id
        places = self._places(token_ids, len(images))
        if bounded:
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

    def _check_length(self, num_tokens: int, images: Sequence[PromptImage], param: str = "messages") -> None:
        num_image_tokens = sum(image.num_tokens for image in images)
        total = num_tokens - len(images) + num_image_tokens
        if total + 1 > self._max_model_len:
            raise RequestError(
                f"the prompt has {total} tokens, {num_image_tokens} of them for {len(images)} images; with at least "
                f"one token of answer it must fit the context of {self._max_model_len} tokens",
                param=param,
                code="context_length_exceeded",
            )
        if total == 0:
            raise RequestError("the prompt is empty", param=param, code="empty_prompt")


def _risky_pattern(names: Sequence[str]) -> str:
    """What a client's text must not put before the tokenizer as it is: a control token's name, or its beginning at the
    end of the text, which the next text could complete."""
    beginnings = {name[:length] for name in names for length in range(1, len(name))}
    endings = "|".join(map(re.escape, sorted(beginnings, key=len, reverse=True)))
    whole = "|".join(map(re.escape, names))
    return f"{whole}|(?:{endings})\\Z" if names else r"(?!)"


def _unused_char(texts: Sequence[str]) -> str:
    return next(char for char in map(chr, _MARKS) if not any(char in text for text in texts))


def _with_end(messages: Sequence[dict[str, Any]], end: str) -> list[dict[str, Any]]:
    """The last message's text, or the text of its last part, with a mark behind it.

    Raises: RequestError 400 where it does not end with text.
    """
    *before, last = messages
    content = last.get("content")
    if isinstance(content, str):
        return [*before, {**last, "content": content + end}]
    if not content or content[-1].get("type") != "text":
        raise RequestError(
            f"messages[{len(before)}].content must end with text where continue_final_message is true",
            param=f"messages[{len(before)}].content",
            code="invalid_value",
        )
    part = content[-1]
    return [*before, {**last, "content": [*content[:-1], {**part, "text": part["text"] + end}]}]


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
