"""Requests of other APIs -> chat requests, with errors that name the fields their clients wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from vlmrt.actors.edge.chat_request import ChatRequest, check_chat_request
from vlmrt.actors.edge.refusals import short
from vlmrt.actors.edge.request_fields import SamplingFields, wrong_field
from vlmrt.runtime.errors import RequestError

UNSUPPORTED = "unsupported_value"


class FieldNames:
    """Which field of the client's request a field of the chat request was made from."""

    def __init__(self) -> None:
        self._origins: dict[str, str] = {}

    def add(self, chat_path: str, origin: str) -> None:
        """What lies below chat_path has come from below origin."""
        self._origins[chat_path] = origin

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Errors that leave the block name the client's fields."""
        try:
            yield
        except RequestError as error:
            raise self.restored(error) from None

    def restored(self, error: RequestError) -> RequestError:
        """The error of a chat request, as one of the request that it was made from."""
        if error.param is None:
            return error
        path = self._origin(error.param)
        message = error.message.replace(error.param, path)
        return RequestError(
            message, status=error.status, code=error.code, param=path, retry_after_s=error.retry_after_s
        )

    def _origin(self, path: str) -> str:
        rest = ""
        while path not in self._origins:
            cut = max(path.rfind("."), path.rfind("["))
            if cut < 0:
                return path + rest
            path, rest = path[:cut], path[cut:] + rest
        return self._origins[path] + rest


class ChatMessages:
    """The messages of a chat request, as they grow."""

    def __init__(self, names: FieldNames) -> None:
        self.names = names
        self.all: list[dict[str, Any]] = []

    def add(self, role: str, content: str | list[dict[str, Any]], origin: str, **fields: Any) -> None:
        """A message made from the field at `origin`; the origins of its parts are added by `add_part`."""
        self.names.add(f"messages[{len(self.all)}]", origin)
        self.all.append({"role": role, "content": content, **fields})

    def add_call(self, call_id: str, name: str, arguments: str, origin: str, arguments_name: str) -> None:
        """A call of the assistant; it joins the assistant's message right before it."""
        if not self.all or self.all[-1]["role"] != "assistant":
            self.names.add(f"messages[{len(self.all)}]", origin)
            self.all.append({"role": "assistant", "content": None})
        calls = self.all[-1].setdefault("tool_calls", [])
        path = f"messages[{len(self.all) - 1}].tool_calls[{len(calls)}]"
        self.names.add(path, origin)
        self.names.add(f"{path}.function", origin)
        self.names.add(f"{path}.function.arguments", f"{origin}.{arguments_name}")
        calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})


def chat_request(asked: SamplingFields, fields: dict[str, Any], names: FieldNames) -> ChatRequest:
    """A checked chat request of these fields, and for the rest of the sampling fields of `asked`.

    Raises: RequestError 400 naming the client's field.
    """
    sampling = {name: getattr(asked, name) for name in SamplingFields.__struct_fields__}
    with names.restoring():
        try:
            request = msgspec.convert({**sampling, **fields}, ChatRequest)
        except msgspec.ValidationError as error:
            raise wrong_field(error, b"") from None
        check_chat_request(request)
    return request


def not_supported(param: str, value: str, known: str, code: str = UNSUPPORTED) -> RequestError:
    return RequestError(f"{param} = {short(value)!r} is not supported ({known})", param=param, code=code)
