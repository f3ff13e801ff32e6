"""The OpenAPI document: valid, of the routes that there are, and true of what they answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from tests.actors.edge.running import RunningEdge, edge_config, http, running_edge
from vlmrt.actors.edge.openapi import OPERATIONS, error_form, openapi_document
from vlmrt.runtime.config import ApiKey, ServerOptions

HELLO = [{"role": "user", "content": "Hello"}]


def document(**options: Any) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(openapi_document(ServerOptions(**options)))
    return parsed


def checker(spec: dict[str, Any], name: str) -> Any:
    return jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": spec["components"]})


@pytest.mark.parametrize("admin_routes", [False, True])
@pytest.mark.parametrize("api_keys", [(), (ApiKey.of("k"),)])
def test_the_document_is_valid(admin_routes: bool, api_keys: tuple[ApiKey, ...]) -> None:
    spec = document(admin_routes=admin_routes, api_keys=api_keys)
    OpenAPIV31SpecValidator(spec).validate()
    assert ("/reset_mm_cache" in spec["paths"]) == admin_routes
    assert ("security" in spec["paths"]["/v1/models"]["get"]) == bool(api_keys)
    assert ("401" in spec["paths"]["/v1/models"]["get"]["responses"]) == bool(api_keys)
    assert "security" not in spec["paths"]["/health"]["get"]


@pytest.mark.parametrize("page", [False, True])
@pytest.mark.parametrize("admin_routes", [False, True])
async def test_every_route_is_in_the_document_and_the_reverse(
    admin_routes: bool, page: bool, checkpoint: Path, tmp_path: Path
) -> None:
    config = edge_config(checkpoint, server=ServerOptions(admin_routes=admin_routes, page=page))
    async with running_edge(config, tmp_path) as edge, http() as session:
        async with session.get(edge.url + "/openapi.json") as response:
            assert response.content_type == "application/json"
            spec = await response.json()
        described = {(method.upper(), path) for path, methods in spec["paths"].items() for method in methods}
        assert described == set(edge.actor.routes)


def refs(value: Any) -> Iterator[str]:
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from refs(inner)
    if isinstance(value, dict) and isinstance(value.get("$ref"), str):
        yield value["$ref"]


def test_every_reference_leads_to_a_component() -> None:
    spec = document(admin_routes=True)
    found = set(refs(spec))
    assert len(found) > 20
    for ref in found:
        kind, name = ref.removeprefix("#/components/").split("/")
        assert name in spec["components"][kind], ref


ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": HELLO}),
    ("/v1/completions", {"prompt": "Hello"}),
    ("/v1/responses", {"input": "Hello"}),
    ("/v1/messages", {"messages": HELLO, "max_tokens": 9}),
    ("/v1/messages/count_tokens", {"messages": HELLO}),
    ("/tokenize", {"prompt": "Hello"}),
    ("/detokenize", {"tokens": [1, 2]}),
]


@pytest.mark.parametrize(("path", "body"), ASKED, ids=[path for path, _ in ASKED])
async def test_requests_answers_and_errors_are_what_the_document_says(
    path: str, body: dict[str, Any], edge: RunningEdge
) -> None:
    spec = document()
    (operation,) = (operation for operation in OPERATIONS if operation.path == path)
    assert operation.answer is not None
    assert operation.body is not None
    checker(spec, operation.body.__name__).validate(body)
    async with http() as session, asyncio.timeout(20), edge.answering("fine"):
        async with session.post(edge.url + path, json=body) as response:
            assert response.status == 200
            answer = await response.json()
            checker(spec, operation.answer.__name__).validate(answer)
        async with session.post(edge.url + path, json={**body, "model": 5}) as response:
            assert str(response.status) in spec["paths"][path]["post"]["responses"]
            checker(spec, error_form(path).__name__).validate(await response.json())
    with pytest.raises(jsonschema.ValidationError):
        checker(spec, operation.answer.__name__).validate({})


def test_all_that_reads_a_body_is_asked_above() -> None:
    assert {path for path, _ in ASKED} == {operation.path for operation in OPERATIONS if operation.body}


def test_no_path_is_described_twice() -> None:
    assert len({operation.key for operation in OPERATIONS}) == len(OPERATIONS)


async def test_small_answers_are_what_the_document_says(edge: RunningEdge) -> None:
    spec = document()
    async with http() as session:
        for operation in OPERATIONS:
            if operation.method == "get":
                path = operation.path.replace("{id}", "model").replace("{file}", "style.css")
                async with session.get(edge.url + path) as response:
                    described = spec["paths"][operation.path]["get"]["responses"][str(response.status)]
                    assert response.content_type in described["content"]
                    if operation.answer is not None:
                        checker(spec, operation.answer.__name__).validate(await response.json())


def test_requests_are_described_by_their_bounds() -> None:
    check = checker(document(), "ChatRequest")
    good = {"model": "model", "messages": HELLO, "temperature": 0.5, "metadata": {"a": 1}, "unknown": 1}
    check.validate(good)
    for wrong in ({"temperature": 3}, {"messages": "Hello"}, {"max_tokens": 0}, {"messages": [{"role": "cat"}]}):
        with pytest.raises(jsonschema.ValidationError):
            check.validate({**good, **wrong})
