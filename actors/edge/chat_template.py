"""A checkpoint's chat template, rendered in a sandbox as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import msgspec
from jinja2.sandbox import ImmutableSandboxedEnvironment
from msgspec import Struct

from vlmrt.runtime.errors import RequestError, StartupError

_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
RESERVED_NAMES = frozenset(("messages", "tools", "documents", *TOKEN_NAMES, "add_generation_prompt"))


class TemplateOptions(Struct, frozen=True):
    """What a template is told beside the messages."""

    add_generation_prompt: bool = True  # the prompt ends where the assistant's next message begins
    continue_final_message: bool = False  # the prompt ends with the last message, unfinished; see PromptBuilder
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = {}  # further names that the template may know; none of RESERVED_NAMES


class ChatTemplate:
    """Messages -> the text of a prompt."""

    def __init__(self, source: str, special_tokens: dict[str, str] | None = None) -> None:
        """Raises: StartupError where the source is not a template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            self.reads_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise StartupError(f"chat template: {error}; pass another with --chat-template") from None
        self.source = source
        self._special_tokens = special_tokens or {}

    def render(self, messages: Sequence[dict[str, Any]], options: TemplateOptions | None = None) -> str:
        """The prompt, by default up to where the assistant's answer begins, also after a last message of the assistant.

        Raises: RequestError 400 where the template refuses the messages.
        """
        options = options or TemplateOptions()
        try:
            return self._template.render(
                {
                    **options.variables,
                    **self._special_tokens,
                    "messages": messages,
                    "tools": options.tools,
                    "documents": None,
                    "add_generation_prompt": options.add_generation_prompt and not options.continue_final_message,
                }
            )
        except jinja2.TemplateError as error:
            raise _refused(str(error)) from None
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise _refused(type(error).__name__) from None


def _refused(reason: str) -> RequestError:
    return RequestError(
        f"the model's chat template refuses these messages: {reason[:200]}", param="messages", code="template_error"
    )


class _GenerationBlock(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def load_chat_template(directory: Path, override: str | None = None) -> ChatTemplate:
    """The template of a checkpoint, or the one in the file `override`.

    Raises: StartupError where there is none or it cannot be read.
    """
    special_tokens = _special_tokens(directory / "tokenizer_config.json")
    if override is not None:
        try:
            return ChatTemplate(Path(override).read_text(encoding="utf-8"), special_tokens)
        except (OSError, UnicodeDecodeError) as error:
            raise StartupError(f"--chat-template {override}: {error}") from None
    for name in _TEMPLATE_FILES:
        source = _template_in(directory / name)
        if source is not None:
            return ChatTemplate(source, special_tokens)
    raise StartupError(f"{directory}: no chat template in {', '.join(_TEMPLATE_FILES)}; pass one with --chat-template")


def _template_in(file: Path) -> str | None:
    if not file.is_file():
        return None
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{file}: {error}") from None
    if file.suffix == ".jinja":
        return text
    template = _read_object(file).get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    config = _read_object(file)
    tokens = {}
    for name in TOKEN_NAMES:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _read_object(file: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StartupError(f"{file}: {error}") from None
