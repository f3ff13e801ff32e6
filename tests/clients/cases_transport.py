"""Headers, raw responses, timeouts and retries."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import openai

from tests.clients.api import TIMEOUT_S, Api, asking, needs, raises
from tests.clients.cases import each

PASSED_ON = ("content-type", "x-request-id", "retry-after")


def the_request_id_is_told(api: Api) -> None:
    answer = api.chat(max_tokens=1)
    assert answer._request_id


def the_clients_own_request_id_comes_back(api: Api) -> None:
    answer = api.chat(max_tokens=1, extra_headers={"X-Request-ID": "mine-42"})
    assert answer._request_id == "mine-42"


def raw_responses_have_headers_and_parse(api: Api) -> None:
    raw = api.client.chat.completions.with_raw_response.create(**asking(max_tokens=2))
    assert raw.status_code == 200
    assert raw.headers["content-type"].startswith("application/json")
    assert int(raw.headers["openai-processing-ms"]) >= 0
    assert raw.parse().usage.completion_tokens <= 2


def raw_streams_parse(api: Api) -> None:
    raw = api.client.chat.completions.with_raw_response.create(**asking(max_tokens=2, stream=True))
    assert raw.headers["cache-control"] == "no-cache"
    assert raw.headers["x-accel-buffering"] == "no"
    assert list(raw.parse())


def streaming_responses_are_read_in_pieces(api: Api) -> None:
    with api.client.chat.completions.with_streaming_response.create(**asking(max_tokens=2)) as response:
        assert b'"chat.completion"' in response.read()


def further_headers_and_queries_are_harmless(api: Api) -> None:
    answer = api.chat(max_tokens=1, extra_headers={"X-Team": "vision"}, extra_query={"trace": "1"})
    assert answer.choices


def organisations_and_projects_are_harmless(api: Api) -> None:
    with api.other_client(organization="org-1", project="proj-1", default_headers={"X-A": "b"}) as client:
        assert client.chat.completions.create(**asking(max_tokens=1)).choices


def one_client_asks_many_times(api: Api) -> None:
    with api.other_client() as client:
        for _ in range(20):
            assert client.chat.completions.create(**asking(max_tokens=1)).choices


@each(way=["client", "with_options", "call"])
def a_timeout_is_raised_and_ends_the_work(api: Api, way: str) -> None:
    fields = asking(max_tokens=3000, extra_body={"ignore_eos": True})
    with api.other_client(**({"timeout": 0.3} if way == "client" else {})) as client:
        if way == "with_options":
            client = client.with_options(timeout=0.3)
        if way == "call":
            fields["timeout"] = 0.3
        raises(openai.APITimeoutError, lambda: client.chat.completions.create(**fields))
    api.wait_until_idle()


@contextmanager
def _refusing_first(url: str, refusals: list[tuple[int, dict[str, str]]]) -> Iterator[tuple[str, list[str | None]]]:
    """A proxy that refuses as often as told and then passes on; the retry counts of the requests it saw."""
    target = urlsplit(url)
    seen: list[str | None] = []

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(self.headers.get("x-stainless-retry-count"))
            if refusals:
                status, headers = refusals.pop(0)
                self.answer(status, headers, b'{"error": {"message": "m", "type": "t", "param": null, "code": "c"}}')
                return
            connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=TIMEOUT_S)
            passed = {key: value for key, value in self.headers.items() if key.lower() != "host"}
            connection.request("POST", self.path, body, passed)
            response = connection.getresponse()
            kept = {key: value for key, value in response.getheaders() if key.lower() in PASSED_ON}
            self.answer(response.status, kept, response.read())
            connection.close()

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", seen
        finally:
            server.shutdown()
            thread.join()


JSON = {"Content-Type": "application/json"}


@each(status=[408, 409, 429, 500, 503])
def a_retried_request_is_answered(api: Api, status: int) -> None:
    refusals = [(status, {**JSON, "retry-after-ms": "10"})]
    with _refusing_first(api.url, refusals) as (url, seen), api.other_client(base_url=url, max_retries=2) as client:
        assert client.chat.completions.create(**asking(max_tokens=2)).choices[0].message.content
    assert seen == ["0", "1"]


def a_504_of_ours_is_not_tried_again(api: Api) -> None:
    refusals = [(504, {**JSON, "x-should-retry": "false"})]
    with _refusing_first(api.url, refusals) as (url, seen), api.other_client(base_url=url, max_retries=2) as client:
        raises(openai.InternalServerError, lambda: client.chat.completions.create(**asking(max_tokens=2)))
    assert seen == ["0"]


def a_wrong_request_is_not_tried_again(api: Api) -> None:
    with _refusing_first(api.url, []) as (url, seen), api.other_client(base_url=url, max_retries=2) as client:
        raises(openai.BadRequestError, lambda: client.chat.completions.create(**asking(temperature=5)))
    assert seen == ["0"]


def an_instance_of_the_module_works(api: Api) -> None:
    needs(1, 0, "clients as objects")
    with api.other_client() as client, client.with_options(max_retries=1) as copied:
        assert copied.models.list().data
