"""A table of wrong requests: each gets its status, param and code, and the scheduler hears of none."""

from __future__ import annotations

import base64
import io
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from tests.actors.edge.encoded_images import save
from tests.actors.edge.running import RunningEdge, edge_config, http, running_edge, service_status
from tests.pictures import picture
from tests.support import peer_down, peer_up
from vlmrt.runtime.config import ServerOptions
from vlmrt.runtime.control_messages import SchedulerReady

ROUTE = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
JSON = {"Content-Type": "application/json"}


class Wrong(NamedTuple):
    name: str
    body: Any  # bytes as they are, anything else as JSON
    param: str | None
    code: str
    status: int = 400
    says: str = ""


def url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def part(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [fields]}]}


def messages(*fields: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(fields)}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def grey(width: int, height: int) -> bytes:
    return save(Image.new("1", (width, height)), "PNG")


def image(value: Any, **options: Any) -> dict[str, Any]:
    return part(type="image_url", image_url={"url": value, **options})


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, **fields}


PNG = picture(0).data
URL = "messages[0].content[0].image_url.url"
DETAIL = "messages[0].content[0].image_url.detail"
LONG = "context_length_exceeded"

TABLE = [
    Wrong("no JSON", b"hello", None, "invalid_json"),
    Wrong("empty body", b"", None, "invalid_json"),
    Wrong("cut JSON", b'{"messages": [', None, "invalid_json"),
    Wrong("a list", b"[]", None, "invalid_value"),
    Wrong("NaN", b'{"messages": [], "temperature": NaN}', None, "invalid_json"),
    Wrong("Infinity", b'{"messages": [], "temperature": Infinity}', None, "invalid_json"),
    Wrong("broken UTF-8", b'{"messages": [{"role": "user", "content": "\xff"}]}', None, "invalid_json"),
    Wrong("lone surrogate", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None, "invalid_json"),
    Wrong("nested 100,000 deep", b"[" * 100_000, None, "invalid_value"),
    Wrong("nested within a field", b'{"metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "invalid_json"),
    Wrong("10 MB number", b'{"messages": [], "seed": ' + b"9" * 10_000_000 + b"}", "seed", "invalid_value"),
    Wrong("many fields", json.dumps({f"f{i}": 0 for i in range(100_000)}).encode(), None, "too_many_fields"),
    Wrong("no messages", {}, "messages", "missing_field"),
    Wrong("messages null", {"messages": None}, "messages", "invalid_value"),
    Wrong("messages empty", {"messages": []}, "messages", "invalid_value"),
    Wrong("messages text", {"messages": "Hello"}, "messages", "invalid_value"),
    Wrong("too many messages", {"messages": HELLO * 5000}, "messages", "invalid_value", says="4096"),
    Wrong("no role", {"messages": [{"content": "x"}]}, "messages[0].role", "missing_field"),
    Wrong("strange role", messages({"role": "cat", "content": "x"}), "messages[0].role", "invalid_value", says="cat"),
    Wrong("no content", {"messages": [*HELLO, {"role": "user"}]}, "messages[1].content", "missing_field"),
    Wrong("content a number", messages(user(5)), "messages[0].content", "invalid_value"),
    Wrong("content empty list", messages(user([])), "messages[0].content", "invalid_value"),
    Wrong("too many parts", messages(user([{"type": "x"}] * 4097)), "messages[0].content", "invalid_value"),
    Wrong("a million ignored keys", {"metadata": dict.fromkeys(map(str, range(10**6)))}, "messages", "missing_field"),
    Wrong("name with spaces", {"messages": [{**HELLO[0], "name": "a b"}]}, "messages[0].name", "invalid_value"),
    Wrong("part without type", part(text="x"), "messages[0].content[0].type", "missing_field"),
    Wrong("text part without text", part(type="text"), "messages[0].content[0].text", "missing_field"),
    Wrong("audio", part(type="input_audio"), "messages[0].content[0].type", "unsupported_part", says="input_audio"),
    Wrong("file", part(type="file", file={}), "messages[0].content[0].type", "unsupported_part", says="file"),
    Wrong("image without url", part(type="image_url"), "messages[0].content[0].image_url", "missing_field"),
    Wrong("image_url without url", part(type="image_url", image_url={}), URL, "missing_field"),
    Wrong("strange detail", image("x", detail="max"), DETAIL, "invalid_value"),
    Wrong("url without scheme", image("cat.png"), URL, "invalid_image_url"),
    Wrong("ftp", image("ftp://example.com/cat.png"), URL, "invalid_image_url"),
    Wrong("http is off", image("http://example.com/cat.png"), URL, "invalid_image_url", says="--allowed-media-domains"),
    Wrong("files are off", image("file:///etc/passwd"), URL, "invalid_image_url", says="--allowed-media-root"),
    Wrong("data without comma", image("data:image/png;base64"), URL, "invalid_image_url"),
    Wrong("data without base64", image("data:image/png,abc"), URL, "invalid_image_url"),
    Wrong("data empty", image("data:image/png;base64,"), URL, "invalid_image_url"),
    Wrong("broken base64", image("data:image/png;base64,ab!d"), URL, "invalid_image_url"),
    Wrong("text as media type", image(url(PNG, "text/html")), URL, "invalid_image_url"),
    Wrong("not an image", image(url(b"hello world")), URL, "invalid_image"),
    Wrong("SVG", image(url(b"<svg/>", "image/svg+xml")), URL, "invalid_image"),
    Wrong("cut header", image(url(PNG[:20])), URL, "invalid_image"),
    Wrong("too long and thin", image(url(grey(1, 250))), URL, "invalid_image_size"),
    Wrong("decompression bomb", image(url(grey(20_000, 20_000))), URL, "image_too_large"),
    Wrong("too many images", messages(user([picture(0).part] * 65)), "messages", "too_many_images"),
    Wrong("image beyond the context", image(url(grey(1400, 1400))), "messages", LONG, says="2048"),
    Wrong("text beyond the context", messages(user("a b " * 5000)), "messages", LONG, says="2048"),
    Wrong("unknown model", chat(model="gpt-9"), "model", "model_not_found", 404, says="gpt-9"),
    Wrong("model a number", chat(model=3), "model", "invalid_value"),
    Wrong("temperature -0.1", chat(temperature=-0.1), "temperature", "invalid_value", says="-0.1"),
    Wrong("temperature 2.1", chat(temperature=2.1), "temperature", "invalid_value", says="2.1"),
    Wrong("temperature text", chat(temperature="hot"), "temperature", "invalid_value"),
    Wrong("temperature true", chat(temperature=True), "temperature", "invalid_value"),
    Wrong("temperature 1e999", b'{"messages": [], "temperature": 1e999}', "temperature", "invalid_value"),
    Wrong("top_p 0", chat(top_p=0), "top_p", "invalid_value"),
    Wrong("top_p 1.5", chat(top_p=1.5), "top_p", "invalid_value"),
    Wrong("top_k -2", chat(top_k=-2), "top_k", "invalid_value"),
    Wrong("top_k 2**63", chat(top_k=2**63), "top_k", "invalid_value"),
    Wrong("min_p 2", chat(min_p=2), "min_p", "invalid_value"),
    Wrong("max_tokens 0", chat(max_tokens=0), "max_tokens", "invalid_value"),
    Wrong("max_tokens -1", chat(max_tokens=-1), "max_tokens", "invalid_value"),
    Wrong("max_tokens 1.5", chat(max_tokens=1.5), "max_tokens", "invalid_value"),
    Wrong("max_tokens 10**30", chat(max_tokens=10**30), "max_tokens", "invalid_value"),
    Wrong("max_completion_tokens 0", chat(max_completion_tokens=0), "max_completion_tokens", "invalid_value"),
    Wrong("min_tokens above max_tokens", chat(min_tokens=10, max_tokens=5), "min_tokens", "invalid_value"),
    Wrong("min_tokens beyond the context", chat(min_tokens=5000), "min_tokens", LONG),
    Wrong("stop a number", chat(stop=3), "stop", "invalid_value"),
    Wrong("stop with an empty string", chat(stop=["a", ""]), "stop", "invalid_value"),
    Wrong("too many stops", chat(stop=["a"] * 17), "stop", "invalid_value", says="16"),
    Wrong("a stop too long", chat(stop="a" * 513), "stop", "invalid_value", says="512"),
    Wrong("stop_token_ids -1", chat(stop_token_ids=[-1]), "stop_token_ids[0]", "invalid_value"),
    Wrong("stop_token_ids out of vocabulary", chat(stop_token_ids=[10**6]), "stop_token_ids", "invalid_value"),
    Wrong("seed 2**63", chat(seed=2**63), "seed", "invalid_value"),
    Wrong("seed -2**63-1", chat(seed=-(2**63) - 1), "seed", "invalid_value"),
    Wrong("frequency_penalty 3", chat(frequency_penalty=3), "frequency_penalty", "invalid_value"),
    Wrong("presence_penalty -3", chat(presence_penalty=-3), "presence_penalty", "invalid_value"),
    Wrong("repetition_penalty 0", chat(repetition_penalty=0), "repetition_penalty", "invalid_value"),
    Wrong("repetition_penalty 1e300", chat(repetition_penalty=1e300), "repetition_penalty", "invalid_value"),
    Wrong("n 129", chat(n=129), "n", "invalid_value", says="129"),
    Wrong("n 0", chat(n=0), "n", "invalid_value"),
    Wrong("n 10**9", chat(n=10**9), "n", "invalid_value"),
    Wrong("logprobs a number", chat(logprobs=3), "logprobs", "invalid_value"),
    Wrong("top_logprobs without logprobs", chat(top_logprobs=5), "top_logprobs", "invalid_value"),
    Wrong("top_logprobs 21", chat(logprobs=True, top_logprobs=21), "top_logprobs", "invalid_value"),
    Wrong("XML output", chat(response_format={"type": "xml"}), "response_format.type", "unsupported_value"),
    Wrong("no schema", chat(response_format={"type": "json_schema"}), "response_format.json_schema", "missing_field"),
    Wrong("schema of the future", chat(guided_json={"not": {}}), "guided_json", "invalid_grammar"),
    Wrong("broken regex", chat(guided_regex="(("), "guided_regex", "invalid_grammar"),
    Wrong("two forms", chat(guided_regex="a", structured_outputs={"regex": "b"}), "guided_regex", "invalid_value"),
    Wrong("form and minimum", chat(guided_regex="a", min_tokens=1), "min_tokens", "invalid_value"),
    Wrong("form without end", chat(guided_regex="a", ignore_eos=True), "ignore_eos", "invalid_value"),
    Wrong("tool without function", chat(tools=[{"type": "function"}]), "tools[0].function", "missing_field"),
    Wrong("tool of another type", chat(tools=[{"type": "custom"}]), "tools[0].type", "invalid_value"),
    Wrong("tool_choice required", chat(tool_choice="required"), "tool_choice", "invalid_value"),
    Wrong("tool_choice in words", chat(tool_choice="maybe"), "tool_choice", "invalid_value"),
    Wrong("functions of old", chat(functions=[{"name": "f"}]), "functions", "unsupported_value"),
    Wrong("function_call", chat(function_call="auto"), "function_call", "unsupported_value"),
    Wrong(
        "calls of the user",
        chat(messages=[{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}]),
        "messages[0].tool_calls",
        "invalid_value",
    ),
    Wrong(
        "arguments in pieces",
        chat(messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]),
        "messages[0].tool_calls[0].function.arguments",
        "invalid_value",
    ),
    Wrong("functions", chat(functions=[{}]), "functions", "unsupported_value"),
    Wrong("logit_bias a list", chat(logit_bias=[5]), "logit_bias", "invalid_value"),
    Wrong("logit_bias 101", chat(logit_bias={"5": 101}), "logit_bias", "invalid_value", says="101"),
    Wrong("logit_bias -100.5", chat(logit_bias={"5": -100.5}), "logit_bias", "invalid_value", says="-100.5"),
    Wrong("logit_bias of text", chat(logit_bias={"5": "much"}), "logit_bias", "invalid_value"),
    Wrong("logit_bias of null", chat(logit_bias={"5": None}), "logit_bias", "invalid_value"),
    Wrong("logit_bias for a word", chat(logit_bias={"cat": 1}), "logit_bias", "invalid_value", says="cat"),
    Wrong("logit_bias for no word", chat(logit_bias={"": 1}), "logit_bias", "invalid_value"),
    Wrong("logit_bias for -1", chat(logit_bias={"-1": 1}), "logit_bias", "invalid_value", says="-1"),
    Wrong("logit_bias for ٣", chat(logit_bias={"٣": 1}), "logit_bias", "invalid_value"),
    Wrong("logit_bias for 007", chat(logit_bias={"007": 1}), "logit_bias", "invalid_value", says="007"),
    Wrong("logit_bias for 10**99", chat(logit_bias={"1" + "0" * 99: 1}), "logit_bias", "invalid_value"),
    Wrong("logit_bias out of vocabulary", chat(logit_bias={"1000000": 1}), "logit_bias", "invalid_value"),
    Wrong("logit_bias of 301 tokens", chat(logit_bias=dict.fromkeys(map(str, range(301)), 1)), "logit_bias",
          "invalid_value", says="300"),
    Wrong("echo", chat(echo=True), "echo", "unsupported_value"),
    Wrong("continue and begin", chat(continue_final_message=True, add_generation_prompt=True),
          "continue_final_message", "invalid_value"),
    Wrong("continue a picture", {**messages(user([picture(0).part])), "continue_final_message": True},
          "messages[0].content", "invalid_value"),
    Wrong("template variables a list", chat(chat_template_kwargs=[]), "chat_template_kwargs", "invalid_value"),
    Wrong("template variable messages", chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs",
          "invalid_value", says="messages"),
    Wrong("template variable eos_token", chat(chat_template_kwargs={"eos_token": "x"}), "chat_template_kwargs",
          "invalid_value", says="eos_token"),
    Wrong("min_pixels 0", image("x", min_pixels=0), "messages[0].content[0].image_url.min_pixels", "invalid_value"),
    Wrong("max_pixels of the part 0", part(type="image_url", image_url="x", max_pixels=0),
          "messages[0].content[0].max_pixels", "invalid_value"),
    Wrong("min_pixels above max_pixels", image("x", min_pixels=9, max_pixels=8), "messages[0].content[0].min_pixels",
          "invalid_value", says="8"),
    Wrong("max_pixels for all 0", chat(mm_processor_kwargs={"max_pixels": 0}), "mm_processor_kwargs.max_pixels",
          "invalid_value"),
    Wrong("min_pixels above max_pixels for all", chat(mm_processor_kwargs={"min_pixels": 9, "max_pixels": 8}),
          "mm_processor_kwargs.min_pixels", "invalid_value"),
    Wrong("longest_edge below shortest_edge", chat(mm_processor_kwargs={"size": {"shortest_edge": 9,
          "longest_edge": 8}}), "mm_processor_kwargs.min_pixels", "invalid_value"),
    Wrong("unknown option of the processor", chat(mm_processor_kwargs={"do_resize": False}), "mm_processor_kwargs",
          "invalid_value", says="do_resize"),
    Wrong("skip_special_tokens a number", chat(skip_special_tokens=1), "skip_special_tokens", "invalid_value"),
    Wrong("audio output", chat(modalities=["text", "audio"]), "modalities", "unsupported_value"),
    Wrong("prediction", chat(prediction={"type": "content"}), "prediction", "invalid_value"),
    Wrong("stream_options without stream", chat(stream_options={}), "stream_options", "invalid_value"),
    Wrong("stream text", chat(stream="yes"), "stream", "invalid_value"),
    Wrong("cache_salt too long", chat(cache_salt="a" * 129), "cache_salt", "invalid_value"),
    Wrong("cache_salt with control characters", chat(cache_salt="a\nb"), "cache_salt", "invalid_value"),
    Wrong("priority 2**40", chat(priority=2**40), "priority", "invalid_value"),
]  # fmt: skip


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 60
    assert len({wrong.name for wrong in TABLE}) == len(TABLE)


@pytest.mark.parametrize("wrong", TABLE, ids=lambda wrong: wrong.name)
async def test_a_wrong_request_says_what_is_wrong_and_reaches_nobody(wrong: Wrong, edge: RunningEdge) -> None:
    await check_refused(edge, ROUTE, wrong)


async def check_refused(edge: RunningEdge, route: str, wrong: Wrong) -> None:
    body = wrong.body if isinstance(wrong.body, bytes) else json.dumps(wrong.body).encode()
    started = time.process_time()  # not what a busy machine does meanwhile
    async with http() as session, session.post(edge.url + route, data=io.BytesIO(body), headers=JSON) as response:
        answer = await response.json()
    assert set(answer) == {"error"}
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status, error["param"], error["code"]) == (wrong.status, wrong.param, wrong.code), error
    assert error["message"]
    assert len(error["message"]) < 600
    assert wrong.says in error["message"]
    assert wrong.param is None or wrong.param in error["message"] or wrong.code == LONG
    assert error["type"] == ("not_found_error" if wrong.status == 404 else "invalid_request_error")
    assert edge.sent == []
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "route_not_found"),
        ("POST", "/v1/embeddings", 404, "route_not_found"),
        ("GET", ROUTE, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/unknown", 404, "model_not_found"),
        ("GET", "/" + "a" * 20_000, 400, None),
    ],
)
async def test_wrong_routes_get_error_bodies(method: str, path: str, status: int, code: str, edge: RunningEdge) -> None:
    async with http() as session, session.request(method, edge.url + path) as response:
        assert response.status == status
        if code is not None:
            assert (await response.json())["error"]["code"] == code


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Content-Type": "text/plain"}, "unsupported_media_type"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "unsupported_media_type"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, "unsupported_encoding"),
    ],
)
async def test_other_content_types_are_refused(headers: dict[str, str], code: str, edge: RunningEdge) -> None:
    body = json.dumps(chat()).encode()
    async with http() as session, session.post(edge.url + ROUTE, data=body, headers=headers) as response:
        assert response.status == 415
        assert (await response.json())["error"]["code"] == code
    assert edge.sent == []


@pytest.fixture
def small_server() -> ServerOptions:
    return ServerOptions(max_body_mib=1, max_media_mib=2)


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_large_body_is_413_without_being_read(
    chunked: bool, checkpoint: Path, tmp_path: Path, small_server: ServerOptions
) -> None:
    async def pieces() -> Any:
        for _ in range(24):
            yield b" " * (64 << 10)

    async with running_edge(edge_config(checkpoint, server=small_server), tmp_path) as edge, http() as session:
        data = pieces() if chunked else io.BytesIO(b" " * (24 * 64 << 10))
        async with session.post(edge.url + ROUTE, data=data, headers=JSON) as response:
            assert response.status == 413
            assert (await response.json())["error"]["code"] == "body_too_large"
        assert edge.sent == []


async def test_a_service_without_scheduler_is_503_with_retry_after(edge: RunningEdge) -> None:
    await edge.actor.peer_down(peer_down("scheduler:0"))
    async with http() as session, session.post(edge.url + ROUTE, json=chat()) as response:
        assert response.status == 503
        assert 0 < int(response.headers["Retry-After"]) <= 60
        assert (await response.json())["error"]["code"] == "service_unavailable"
    await edge.actor.peer_up(peer_up("scheduler:0", SchedulerReady(), epoch=2))
    edge.context.outbox.full.add("scheduler:0")  # type: ignore[arg-type]
    async with http() as session, session.post(edge.url + ROUTE, json=chat()) as response:
        assert response.status == 503
    assert edge.sent == []


async def test_foreign_hosts_and_origins_are_refused(edge: RunningEdge) -> None:
    async with http() as session:
        for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
            for path in ("/v1/models", "/health", "/nowhere"):
                async with session.get(edge.url + path, headers=headers) as response:
                    assert response.status == 403, headers
        for headers in ({"Host": "localhost:1"}, {"Origin": edge.url}, {"Host": f"127.0.0.1:{edge.port}"}):
            async with session.get(edge.url + "/v1/models", headers=headers) as response:
                assert response.status == 200, headers


async def test_allowed_origins_get_their_headers(checkpoint: Path, tmp_path: Path) -> None:
    origin = "https://app.example"
    config = edge_config(checkpoint, server=ServerOptions(cors_origins=(origin,)))
    async with running_edge(config, tmp_path) as edge, http() as session:
        async with session.get(edge.url + "/v1/models", headers={"Origin": origin}) as response:
            assert response.headers["Access-Control-Allow-Origin"] == origin
        asks = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        async with session.options(edge.url + ROUTE, headers=asks) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == origin
        async with session.options(edge.url + ROUTE, headers={**asks, "Origin": "https://evil.example"}) as response:
            assert response.status == 403
        async with session.get(edge.url + "/v1/models") as response:
            assert "Access-Control-Allow-Origin" not in response.headers


async def test_health_names_what_is_down(edge: RunningEdge) -> None:
    async with http() as session:
        for path in ("/health", "/health/ready"):
            async with session.get(edge.url + path) as response:
                assert response.status == 200
        await edge.actor.status(service_status(("vit:0", "restarting"), ("llm:0", "ready"), ready=False))
        async with session.get(edge.url + "/health") as response:
            assert response.status == 503
            assert (await response.json())["down"] == ["vit:0 (restarting)"]
        for path in ("/health/live", "/ping", "/version", "/"):
            async with session.get(edge.url + path) as response:
                assert response.status == 200


async def test_models_are_listed_by_every_name_and_found_by_ids_with_slashes(checkpoint: Path, tmp_path: Path) -> None:
    names = ("org/model-7b", "short")
    async with running_edge(edge_config(checkpoint, model={"served_names": names}), tmp_path) as edge:
        models = [model async for model in edge.client.models.list()]
        assert tuple(model.id for model in models) == names
        for name in (*names, "model"):
            found = await edge.client.models.retrieve(name)
            assert found.id == name
            assert found.object == "model"
            assert found.model_dump()["max_model_len"] == 2048


async def test_metrics_are_the_services_totals(edge: RunningEdge) -> None:
    async with http() as session, session.get(edge.url + "/metrics") as response:
        assert response.status == 200
        assert 'vlmrt_actor_up{actor="scheduler:0"} 1.0' in await response.text()
