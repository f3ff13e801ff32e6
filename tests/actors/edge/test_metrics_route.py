"""GET /metrics of an edge: what the supervisor last told, under our names, and under vLLM's where that is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.actors.edge.running import MODEL, RunningEdge, edge_config, http, running_edge, service_status
from vlmrt.runtime.config import ServerOptions
from vlmrt.runtime.control_messages import ServiceStatus


async def scrape(edge: RunningEdge) -> str:
    """After the supervisor has heard the edge's own figures and told them."""
    status = service_status()
    figures = {"edge:0": edge.context.metrics.snapshot()}
    await edge.actor.status(ServiceStatus(True, status.actors, figures))
    async with http() as session, session.get(f"{edge.url}/metrics") as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        return await response.text()


async def ask(edge: RunningEdge, **fields: object) -> None:
    async with edge.answering("Hi there"), http() as session:
        body = {"messages": [{"role": "user", "content": "Hello"}], **fields}
        async with session.post(f"{edge.url}/v1/chat/completions", json=body) as response:
            assert response.status == 200


async def test_an_edge_says_what_it_serves_and_counts_what_it_answers(edge: RunningEdge) -> None:
    await ask(edge)
    text = await scrape(edge)
    assert f'vlmrt_server_info{{actor="edge:0",device="cpu",model="{MODEL}",version="' in text
    assert 'vlmrt_request_success_total{actor="edge:0",finished_reason="stop"} 1.0' in text
    assert 'vlmrt_request_params_n_sum{actor="edge:0"} 1.0' in text
    assert 'vlmrt_grammar_seconds_count{actor="edge:0"} 0.0' in text
    assert "vllm:" not in text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_grammar_is_timed_where_there_is_one(path: str, edge: RunningEdge) -> None:
    asked = {"messages": [{"role": "user", "content": "Hello"}]} if "chat" in path else {"prompt": "Hello"}
    async with edge.answering("Hi"), http() as session:
        body = {**asked, "structured_outputs": {"choice": ["Hi", "Ho"]}}
        async with session.post(f"{edge.url}{path}", json=body, headers={"x-request-id": "g"}) as response:
            assert response.status == 200
    found = edge.actor.timelines.find("g")
    assert found is not None
    assert [span.name for span in found.spans].count("grammar") == 1
    assert sum(edge.context.metrics.snapshot().histograms["grammar_seconds"].counts) == 1


async def test_vllms_names_stand_beside_ours_where_they_are_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    config = edge_config(checkpoint, server=ServerOptions(metrics_compat="vllm"))
    async with running_edge(config, tmp_path) as edge:
        await ask(edge)
        text = await scrape(edge)
    labels = f'engine="0",finished_reason="stop",model_name="{MODEL}"'
    assert f"vllm:request_success_total{{{labels}}} 1.0" in text
    assert 'vlmrt_request_success_total{actor="edge:0",finished_reason="stop"} 1.0' in text
