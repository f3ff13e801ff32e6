"""`LLM`: answers to lists of conversations and prompts, from the actors that `vlmrt launch` starts."""

from __future__ import annotations

import os
import weakref
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, NoReturn, Unpack, cast, overload

from vlmrt.runtime.errors import RequestError
from vlmrt.tools.offline.client import CHAT_PATH, COMPLETIONS_PATH, Client, Request, Result
from vlmrt.tools.offline.engine import Engine
from vlmrt.tools.offline.errors import BatchError
from vlmrt.tools.offline.messages import Conversation, PictureStore
from vlmrt.tools.offline.options import EngineOptions, command_line
from vlmrt.tools.offline.outputs import RequestOutput, decode_answer
from vlmrt.tools.offline.progress import BatchProgress
from vlmrt.tools.offline.sampling_params import SamplingParams

Params = SamplingParams | Sequence[SamplingParams] | None
Prompt = str | Mapping[str, Any]


class LLM:
    """A model in processes of its own, for this process alone.

    `model` is a directory or a hub id, as `vlmrt launch --model`; None is the demo model.  Options have the names and
    checks of the command line (`tensor_parallel_size` is `tp`); the preset is throughput.  Use it as a context
    manager, or `close` it; otherwise its processes end when it is collected, or with this process, however that ends.

    Raises: TypeError or ValueError for a wrong option, StartupError where the engine cannot start.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        tensor_parallel_size: int | None = None,
        show_loading: bool = True,
        **options: Unpack[EngineOptions],
    ) -> None:
        tp = options.get("tp", tensor_parallel_size)
        if tensor_parallel_size not in (None, tp):
            raise ValueError(f"tensor_parallel_size = {tensor_parallel_size} and tp = {tp} differ")
        if tp is not None:
            options["tp"] = tp
        options.setdefault("preset", "throughput")
        self._engine = Engine(command_line(model, options), show_loading=show_loading)
        weakref.finalize(self, self._engine.close)

    @overload
    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        extra_body: Mapping[str, Any] | None = None,
        return_exceptions: Literal[False] = False,
    ) -> list[RequestOutput]: ...

    @overload
    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        extra_body: Mapping[str, Any] | None = None,
        return_exceptions: Literal[True],
    ) -> list[RequestOutput | RequestError]: ...

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        extra_body: Mapping[str, Any] | None = None,
        return_exceptions: bool = False,
    ) -> list[RequestOutput] | list[RequestOutput | RequestError]:
        """Answers to one conversation or to many, in their order.

        Messages are OpenAI's.  A part may be {"type": "image", "image": X}, or vLLM's {"type": "image_pil",
        "image_pil": X}, where X is a PIL image, a path, the bytes of an image file or a URL; http(s) and file URLs need
        `allowed_media_domains` and `allowed_media_root`.  Pictures are sent without loss, the same object once.
        `extra_body` has further fields of a chat completion, such as tools or response_format, for all conversations.

        Raises: BatchError once all have ended, if some failed (with return_exceptions they are in the list instead);
        EngineDeadError; TypeError or ValueError, before anything is sent, for arguments that cannot be right.
        """
        conversations = cast(Sequence[Conversation], [messages] if _is_one(messages) else messages)
        store = PictureStore()
        requests = [
            Request(
                CHAT_PATH,
                {
                    **(extra_body or {}),
                    **params.fields(chat=True),
                    "messages": store.messages(conversation, f"messages[{index}]"),
                    "return_token_ids": True,
                },
                params.n,
            )
            for index, (conversation, params) in enumerate(_with_params(conversations, sampling_params))
        ]
        return self._answers(requests, [None] * len(requests), use_tqdm, return_exceptions)

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        extra_body: Mapping[str, Any] | None = None,
        return_exceptions: Literal[False] = False,
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        extra_body: Mapping[str, Any] | None = None,
        return_exceptions: Literal[True],
    ) -> list[RequestOutput | RequestError]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        extra_body: Mapping[str, Any] | None = None,
        return_exceptions: bool = False,
    ) -> list[RequestOutput] | list[RequestOutput | RequestError]:
        """Continuations of one prompt or of many, in their order; no chat template is applied.

        A prompt is text, {"prompt": text} or {"prompt_token_ids": ids}.  Pictures belong into `chat`: the completions
        endpoint has none.  The rest is as in `chat`.
        """
        listed = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        requests = []
        texts = []
        for index, (prompt, params) in enumerate(_with_params(listed, sampling_params)):
            content = _prompt_content(prompt, f"prompts[{index}]")
            fields = {**(extra_body or {}), **params.fields(chat=False), "prompt": content, "return_token_ids": True}
            requests.append(Request(COMPLETIONS_PATH, fields, params.n))
            texts.append(content if isinstance(content, str) else None)
        return self._answers(requests, texts, use_tqdm, return_exceptions)

    def close(self) -> None:
        """End every process of the engine.  Twice is once."""
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an LLM cannot be pickled or copied: its processes belong to the process that made it")

    def _answers(
        self, requests: Sequence[Request], prompts: Sequence[str | None], use_tqdm: bool, return_exceptions: bool
    ) -> list[RequestOutput] | list[RequestOutput | RequestError]:
        outputs: dict[int, RequestOutput | RequestError] = {}
        with BatchProgress(len(requests), shown=use_tqdm) as progress:

            def deliver(index: int, result: Result) -> None:
                output = read_output(result, prompts[index])
                outputs[index] = output
                progress.done(num_output_tokens(output))

            async def work(client: Client) -> None:
                await client.answer_all(_each(requests), deliver)

            if requests:
                self._engine.call(work)
        ordered = [outputs[index] for index in range(len(requests))]
        if not return_exceptions and any(isinstance(output, RequestError) for output in ordered):
            raise BatchError(ordered)
        return ordered


def read_output(result: Result, prompt: str | None) -> RequestOutput | RequestError:
    """A field that the service does not know is an error: the answer is not the one that was asked for."""
    if isinstance(result, RequestError):
        return result
    if result.ignored_fields:
        return RequestError(f"{result.ignored_fields}: not known to this version", code="unknown_field")
    return decode_answer(result.body).output(prompt)


def num_output_tokens(output: RequestOutput | RequestError) -> int:
    return 0 if isinstance(output, RequestError) else sum(len(choice.token_ids) for choice in output.outputs)


async def _each(requests: Iterable[Request]) -> AsyncIterator[Request]:
    for request in requests:
        yield request


def _is_one(messages: Conversation | Sequence[Conversation]) -> bool:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(
            f"messages is {type(messages).__name__}: a list of messages, or a list of such lists, is expected"
        )
    return bool(messages) and isinstance(messages[0], Mapping)


def _with_params(items: Sequence[Any], params: Params) -> Iterable[tuple[Any, SamplingParams]]:
    """Each with its own parameters."""
    if params is None or isinstance(params, SamplingParams):
        return ((item, params or SamplingParams()) for item in items)
    for index, one in enumerate(params):
        if not isinstance(one, SamplingParams):
            raise TypeError(f"sampling_params[{index}] is {type(one).__name__}: a SamplingParams is expected")
    if len(params) != len(items):
        raise ValueError(f"sampling_params has {len(params)} entries for {len(items)} requests")
    return zip(items, params, strict=True)


def _prompt_content(prompt: object, where: str) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Mapping):
        raise TypeError(f"{where} is {type(prompt).__name__}: a string or a dict is expected")
    if prompt.get("multi_modal_data"):
        raise ValueError(
            f"{where}['multi_modal_data']: a raw prompt has no pictures here; put them into messages and use chat"
        )
    given = [key for key in ("prompt", "prompt_token_ids") if prompt.get(key) is not None]
    if len(given) != 1:
        raise ValueError(f"{where} has {given or 'no prompt'}: exactly one of prompt and prompt_token_ids is needed")
    content = prompt[given[0]]
    if given[0] == "prompt":
        if not isinstance(content, str):
            raise TypeError(f"{where}['prompt'] is {type(content).__name__}: a string is expected")
        return content
    return [int(token_id) for token_id in content]
