"""Requests that are wrong, each in its own way, and the status that each is answered with."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from typing import Any, NamedTuple

from tests.pictures import encode, noise

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
QUESTION = {"type": "text", "text": "What is in the image?"}
JSON = "application/json"


class Wrong(NamedTuple):
    """One request: bytes as they are, anything else as JSON."""

    body: Any
    status: int = 400
    route: str = CHAT
    content_type: str = JSON
    num_decodes: int = 0  # that it may cost

    @property
    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims this size and has next to no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def user(content: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def about(url: object, **fields: object) -> dict[str, Any]:
    return user([{"type": "image_url", "image_url": {"url": url, **fields}}, QUESTION])


def part(**fields: object) -> dict[str, Any]:
    return user([fields, QUESTION])


def chat(**fields: object) -> dict[str, Any]:
    return {**user("Hello"), **fields}


def tools(*functions: object, **fields: object) -> dict[str, Any]:
    return chat(tools=[{"type": "function", "function": function} for function in functions], **fields)


def schema(value: object, **fields: object) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": value}}
    return chat(response_format=form, **fields)


def deep_schema(depth: int) -> bytes:
    form = b'{"type": "json_schema", "json_schema": {"name": "answer", "schema": %s}}'
    nested = b'{"items": ' * depth + b"{}" + b"}" * depth
    return b'{"messages": [{"role": "user", "content": "Hello"}], "response_format": %s}' % (form % nested)


GOOD_PNG = encode(noise(60, 60, 1), "PNG", "good").data
GOOD_JPEG = encode(noise(300, 200, 1), "JPEG", "good").data
GOOD_WEBP = encode(noise(90, 70, 2), "WEBP", "good").data
ONE_PIXEL = encode(noise(1, 1, 1), "PNG", "one").data
GOOD_PART = about(data_url(GOOD_PNG))["messages"][0]["content"][0]

PICTURES = {
    "not an image": Wrong(about(data_url(b"hello, this is text"))),
    "empty image": Wrong(about(data_url(b""))),
    "svg": Wrong(about(data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"))),
    "pdf": Wrong(about(data_url(b"%PDF-1.7\n", "application/pdf"))),
    "text as mime": Wrong(about(data_url(GOOD_PNG, "text/html"))),
    "video as mime": Wrong(about(data_url(GOOD_PNG, "video/mp4"))),
    "png signature alone": Wrong(about(data_url(GOOD_PNG[:8]))),
    "cut in the header": Wrong(about(data_url(GOOD_PNG[:20]))),
    "jpeg cut before its size": Wrong(about(data_url(GOOD_JPEG[:60], "image/jpeg"))),
    "webp cut in the header": Wrong(about(data_url(GOOD_WEBP[:14], "image/webp"))),
    "gif of nothing": Wrong(about(data_url(b"GIF89a", "image/gif"))),
    "huge header dimensions": Wrong(about(data_url(png_header(100_000, 100_000)))),
    "bomb in one direction": Wrong(about(data_url(png_header(2_000_000_000, 1)))),
    "zero width": Wrong(about(data_url(png_header(0, 10)))),
    "1x20000": Wrong(about(data_url(png_header(1, 20_000)))),
    "20000x1": Wrong(about(data_url(png_header(20_000, 1)))),
    "wrong base64": Wrong(about("data:image/png;base64,@@@@")),
    "base64 of one character": Wrong(about("data:image/png;base64,a")),
    "base64 with a null": Wrong(about("data:image/png;base64,iVBO\0Rw0")),
    "data url without base64": Wrong(about("data:image/png,abc")),
    "data url without comma": Wrong(about("data:image/png;base64")),
    "data url of nothing": Wrong(about("data:")),
    "empty url": Wrong(about("")),
    "url is null": Wrong(about(None)),
    "url is a number": Wrong(about(7)),
    "url is a list": Wrong(about(["data:image/png;base64,"])),
    "url of a megabyte": Wrong(about("x" * (1 << 20))),
    "url without scheme": Wrong(about("cat.png")),
    "unknown scheme": Wrong(about("ftp://example.org/a.png")),
    "javascript": Wrong(about("javascript:alert(1)")),
    "fetching is off": Wrong(about("http://example.org/a.png")),
    "https is off": Wrong(about("https://example.org/a.png")),
    "private address": Wrong(about("http://10.0.0.1/a.png")),
    "loopback address": Wrong(about("http://127.0.0.1:1/a.png")),
    "loopback as a number": Wrong(about("http://2130706433/a.png")),
    "loopback of six": Wrong(about("http://[::1]/a.png")),
    "link-local address": Wrong(about("http://169.254.169.254/latest/meta-data")),
    "http without a host": Wrong(about("http:///a.png")),
    "http with a password": Wrong(about("http://user:word@127.0.0.1/a.png")),
    "file outside the root": Wrong(about("file:///etc/passwd")),
    "file with dots": Wrong(about("file:///tmp/../etc/passwd")),
    "file of another host": Wrong(about("file://host/etc/passwd")),
    "detail unknown": Wrong(about(data_url(GOOD_PNG), detail="max")),
    "detail a number": Wrong(about(data_url(GOOD_PNG), detail=1)),
    "image_url a number": Wrong(part(type="image_url", image_url=7)),
    "image_url a list": Wrong(part(type="image_url", image_url=[data_url(GOOD_PNG)])),
    "image_url empty": Wrong(part(type="image_url", image_url={})),
    "image_url missing": Wrong(part(type="image_url")),
    "image missing": Wrong(part(type="image")),
    "uuid unknown": Wrong(part(type="image_url", uuid="nobody-sent-this")),
    "uuid empty": Wrong(part(type="image_url", image_url={"url": data_url(GOOD_PNG)}, uuid="")),
    "uuid with spaces": Wrong(part(type="image_url", uuid="a b")),
    "uuid of a kilobyte": Wrong(part(type="image_url", uuid="u" * 1024)),
    "too many images": Wrong(user([GOOD_PART] * 65)),
    "the second of two is broken": Wrong(user([GOOD_PART, about(data_url(b"hello"))["messages"][0]["content"][0]])),
    "broken png": Wrong(about(data_url(GOOD_PNG[: len(GOOD_PNG) // 2])), num_decodes=1),
    "broken jpeg": Wrong(about(data_url(GOOD_JPEG[: len(GOOD_JPEG) // 3], "image/jpeg")), num_decodes=1),
    "broken webp": Wrong(about(data_url(GOOD_WEBP[: len(GOOD_WEBP) // 2], "image/webp")), num_decodes=1),
    "flipped bytes": Wrong(about(data_url(GOOD_PNG[:60] + bytes(200) + GOOD_PNG[260:])), num_decodes=1),
    "header without pixels": Wrong(about(data_url(png_header(50, 50))), num_decodes=1),
}

MESSAGES = {
    "no messages": Wrong({}),
    "messages null": Wrong({"messages": None}),
    "messages empty": Wrong({"messages": []}),
    "messages is a string": Wrong({"messages": "Hello"}),
    "messages is an object": Wrong({"messages": {"role": "user", "content": "Hello"}}),
    "message is a string": Wrong({"messages": ["Hello"]}),
    "message without role": Wrong({"messages": [{"content": "Hello"}]}),
    "message without content": Wrong({"messages": [{"role": "user"}]}),
    "too many messages": Wrong({"messages": [{"role": "user", "content": "a"}] * 5000}),
    "unknown role": Wrong({"messages": [{"role": "wizard", "content": "Hello"}]}),
    "role is null": Wrong({"messages": [{"role": None, "content": "Hello"}]}),
    "name with spaces": Wrong({"messages": [{"role": "user", "name": "a b", "content": "Hello"}]}),
    "unknown part type": Wrong(part(type="smell", smell="rose")),
    "audio part": Wrong(part(type="input_audio", input_audio={})),
    "file part": Wrong(part(type="file", file={"file_id": "f"})),
    "video part": Wrong(part(type="video_url", video_url={"url": "x", "fps": 2})),
    "part without type": Wrong(part(text="Hello")),
    "text part without text": Wrong(part(type="text")),
    "text part of a number": Wrong(part(type="text", text=3)),
    "part is a string": Wrong(user(["Hello"])),
    "content is a number": Wrong(user(3)),
    "content is null": Wrong(user(None)),
    "content is empty": Wrong(user([])),
    "content is an object": Wrong(user({"type": "text", "text": "Hello"})),
    "too many parts": Wrong(user([QUESTION] * 5000)),
    "lone surrogate": Wrong(b'{"messages": [{"role": "user", "content": "\\ud800"}]}'),
    "too long": Wrong(user("red circle " * 20_000)),
    "too long by its history": Wrong({"messages": [{"role": "user", "content": "a b c " * 90}] * 90}),
}

VALUES: dict[str, list[Any]] = {
    "temperature": [-1, 2.01, "hot", True, [], 10**400],
    "top_p": [0, -0.5, 1.01, "all"],
    "top_k": [-5, 1.5, 2**31],
    "min_p": [-0.1, 1.1],
    "max_tokens": [0, -3, 1.5, 10**30, "many"],
    "max_completion_tokens": [0, -1, 1.5],
    "min_tokens": [-1, 5000],
    "frequency_penalty": [5, -2.1, "none"],
    "presence_penalty": [-5, 2.1],
    "repetition_penalty": [0, -1, 1e300],
    "stop": [["x"] * 100, 4, [""], "", [1], "s" * 600],
    "stop_token_ids": [[-1], [10**6], "5", [1.5]],
    "seed": ["luck", 2**70, 1.5],
    "n": [0, -1, 129, 1.5, "two"],
    "stream": ["yes", 1],
    "logprobs": [3, "true"],
    "top_logprobs": [3, -1, 21],
    "logit_bias": [{"1": 101}, {"1": -101}, {"a": 1}, {"99999999": 1}, {"-1": 1}, {"1": "x"}, [1], {"1": None}],
    "ignore_eos": ["yes"],
    "priority": ["high", 2**40],
    "cache_salt": ["s" * 200, "a b", "a\nb", 5],
    "modalities": [["text", "audio"], "text"],
    "prediction": [{"type": "content"}],
    "functions": [[{"name": "f"}]],
}

FIELDS = {
    "unknown model": Wrong(chat(model="gpt-nothing"), 404),
    "model of a kilobyte": Wrong(chat(model="m" * 1024), 404),
    "model is a number": Wrong(chat(model=5)),
    **{f"{name} = {value!r}": Wrong(chat(**{name: value})) for name, values in VALUES.items() for value in values},
    "min_tokens above max_tokens": Wrong(chat(min_tokens=9, max_tokens=3)),
    "stream_options without stream": Wrong(chat(stream_options={"include_usage": True})),
    "stream_options is a list": Wrong(chat(stream=True, stream_options=[])),
    "include_usage is a string": Wrong(chat(stream=True, stream_options={"include_usage": "yes"})),
    "logprobs of 21": Wrong(chat(logprobs=True, top_logprobs=21)),
    "wrong in a stream": Wrong(chat(stream=True, temperature=9)),
    "too long in a stream": Wrong({**user("red circle " * 20_000), "stream": True}),
}

STRUCTURED = {
    "response_format is a string": Wrong(chat(response_format="json")),
    "response_format without type": Wrong(chat(response_format={})),
    "response_format unknown": Wrong(chat(response_format={"type": "poem"})),
    "json_schema missing": Wrong(chat(response_format={"type": "json_schema"})),
    "json_schema a string": Wrong(chat(response_format={"type": "json_schema", "json_schema": "x"})),
    "schema a number": Wrong(schema(5)),
    "schema of an unknown type": Wrong(schema({"type": "wizard"})),
    "schema of a reference to nowhere": Wrong(schema({"$ref": "#/$defs/nothing"})),
    "schema of a foreign reference": Wrong(schema({"$ref": "http://127.0.0.1:1/schema"})),
    "schema nested too deeply": Wrong(deep_schema(20_000)),
    "schema of a megabyte": Wrong(schema({"enum": ["x" * 100 + str(number) for number in range(10_000)]})),
    "schema that nothing fits": Wrong(schema({"type": "integer", "minimum": 5, "maximum": 1})),
    "schema with ignored ends": Wrong(schema({"type": "object"}, ignore_eos=True)),
    "schema with least tokens": Wrong(schema({"type": "object"}, min_tokens=5)),
    "tools not a list": Wrong(chat(tools="hammer")),
    "tool without function": Wrong(chat(tools=[{"type": "function"}])),
    "tool of another type": Wrong(chat(tools=[{"type": "retrieval"}])),
    "function without name": Wrong(tools({})),
    "function name with spaces": Wrong(tools({"name": "a b"})),
    "function name too long": Wrong(tools({"name": "f" * 65})),
    "parameters a list": Wrong(tools({"name": "f", "parameters": []})),
    "parameters of an unknown type": Wrong(
        tools({"name": "f", "parameters": {"type": "wizard"}}, tool_choice="required")
    ),
    "the same function twice": Wrong(tools({"name": "f"}, {"name": "f"}, tool_choice="required")),
    "tool_choice without tools": Wrong(chat(tool_choice="required")),
    "tool_choice unknown": Wrong(tools({"name": "f"}, tool_choice="sometimes")),
    "tool_choice of no tool": Wrong(tools({"name": "f"}, tool_choice={"type": "function", "function": {"name": "g"}})),
    "tool_choice empty": Wrong(tools({"name": "f"}, tool_choice={})),
    "parallel_tool_calls a string": Wrong(tools({"name": "f"}, parallel_tool_calls="no")),
    "tool_calls without function": Wrong(
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "c"}]}, {"role": "user", "content": "Hello"}]}
    ),
}

BODIES = {
    "a list": Wrong([1, 2]),
    "a string": Wrong("Hello"),
    "null": Wrong(None),
    "no body": Wrong(b""),
    "cut": Wrong(b"{"),
    "cut within": Wrong(b'{"messages": [{"role": "user", "con'),
    "no JSON": Wrong(b"hello"),
    "two values": Wrong(b"{} {}"),
    "not utf-8": Wrong(b"\xff\xfe"),
    "broken utf-8 in a string": Wrong(b'{"messages": [{"role": "user", "content": "\xff"}]}'),
    "NaN": Wrong(b'{"messages": [], "temperature": NaN}'),
    "Infinity": Wrong(b'{"messages": [], "temperature": Infinity}'),
    "nested 100,000 deep": Wrong(b"[" * 100_000),
    "nested within a field": Wrong(b'{"metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a number of a megabyte": Wrong(b'{"messages": [], "seed": ' + b"9" * (1 << 20) + b"}"),
    "a million keys": Wrong({f"k{number}": 0 for number in range(10**6)}),
    "a million keys within": Wrong({"metadata": {f"k{number}": 0 for number in range(10**6)}}),
    "a million parts": Wrong(b'{"messages": [{"role": "user", "content": [' + b"{}," * 10**6 + b"{}]}]}"),
    "a form": Wrong(b"messages=hello", 415, content_type="application/x-www-form-urlencoded"),
    "plain text": Wrong(b"{}", 415, content_type="text/plain"),
    "no type": Wrong(b"{}", content_type=""),
    "too large": Wrong(b'{"pad": "' + b"x" * (65 << 20) + b'"}', 413),
}

OTHER_ROUTES = {
    "completion without prompt": Wrong({}, route=COMPLETIONS),
    "completion of a number": Wrong({"prompt": 3}, route=COMPLETIONS),
    "completion of nothing": Wrong({"prompt": []}, route=COMPLETIONS),
    "completion of an unknown token": Wrong({"prompt": [99_999_999]}, route=COMPLETIONS),
    "completion of a mixed list": Wrong({"prompt": ["a", 1]}, route=COMPLETIONS),
    "completion with a suffix": Wrong({"prompt": "a", "suffix": "b"}, route=COMPLETIONS),
    "completion with best_of": Wrong({"prompt": "a", "best_of": 3}, route=COMPLETIONS),
    "completion with echo and logprobs": Wrong({"prompt": "a", "echo": True, "logprobs": 1}, route=COMPLETIONS),
    "completion with logprobs of 99": Wrong({"prompt": "a", "logprobs": 99}, route=COMPLETIONS),
    "completion of an unknown model": Wrong({"model": "gpt-nothing", "prompt": "a"}, 404, COMPLETIONS),
    "completion too long": Wrong({"prompt": "red circle " * 20_000}, route=COMPLETIONS),
    "completion of too many prompts": Wrong({"prompt": ["a"] * 100_000}, route=COMPLETIONS),
    "tokenize without prompt": Wrong({}, route="/tokenize"),
    "tokenize a number": Wrong({"prompt": 3}, route="/tokenize"),
    "detokenize a text": Wrong({"tokens": "abc"}, route="/detokenize"),
    "detokenize an unknown token": Wrong({"tokens": [99_999_999]}, route="/detokenize"),
    "detokenize a negative token": Wrong({"tokens": [-1]}, route="/detokenize"),
    "responses without input": Wrong({"model": "model"}, route="/v1/responses"),
    "responses of a number": Wrong({"model": "model", "input": 3}, route="/v1/responses"),
    "responses of an unknown role": Wrong({"input": [{"role": "wizard", "content": "a"}]}, route="/v1/responses"),
    "embeddings": Wrong({"model": "model", "input": "Hello"}, 404, "/v1/embeddings"),
    "no such route": Wrong({}, 404, "/v1/nowhere"),
    "a route that is read": Wrong({}, 405, "/v1/models"),
}

WRONG: dict[str, Wrong] = {**PICTURES, **MESSAGES, **FIELDS, **STRUCTURED, **BODIES, **OTHER_ROUTES}
